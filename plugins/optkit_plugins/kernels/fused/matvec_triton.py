"""The kernel of ``matvec`` and ``fused_matvec``, in plain Triton."""

# Triton reads the kernels' own annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read(start, column, begin: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    if begin + BLOCK <= COLUMNS:
        return tl.load(start + begin, eviction_policy=POLICY)
    else:
        return tl.load(start + begin, mask=begin + column < COLUMNS, other=0.0, eviction_policy=POLICY)


@triton.jit
def product(
    x, weight, norm, bias, residual, out, stride, outputs, eps,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``LINES`` rows of the weight a program; gated, ``LINES // 2`` rows of the gate and their partners.

    :param outputs: how many there are: where the gate's rows end.
    :param EARLY: the kernel may start before the one in front of it is done, and lets the next do so: the first weights are under way
        while it waits. Only weights may be read before.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    if GATED:
        line = line // 2 + line % 2 * outputs
    column = tl.arange(0, BLOCK)
    start = weight + line.to(tl.int64)[:, None] * stride + column[None, :]
    part = read(start, column[None, :], 0, COLUMNS, BLOCK, "evict_first")
    if EARLY:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((LINES, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in tl.static_range(0, COLUMNS, BLOCK):
        if begin > 0:
            part = read(start, column[None, :], begin, COLUMNS, BLOCK, "evict_first")
        value = read(x + column, column, begin, COLUMNS, BLOCK, "").to(tl.float32)
        if NORM:
            squares += value * value
            value *= read(norm + column, column, begin, COLUMNS, BLOCK, "").to(tl.float32)
        total += part.to(tl.float32) * value[None, :]
    if NORM:  # both sums in one go: each has to wait for all warps
        value, square = tl.split(tl.sum(tl.join(total, tl.broadcast_to(squares[None, :], (LINES, BLOCK))), axis=1))
        value *= tl.rsqrt(square / COLUMNS + eps)
    else:
        value = tl.sum(total, axis=1)
    if BIAS:
        value += tl.load(bias + line).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.reshape(value, (LINES // 2, 2)))
        place = tl.program_id(0) * (LINES // 2) + tl.arange(0, LINES // 2)
        value = gate / (1 + tl.exp(-gate)) * up
    else:
        place = line
    if RESIDUAL:
        value += tl.load(residual + place).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty))
