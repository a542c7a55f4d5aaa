"""The kernel of ``matvec``, in plain Triton."""

# Triton reads the kernels' own annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matvec(x, weight, bias, out, stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """One row of the weight a program."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    start = weight + row.to(tl.int64) * stride
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in tl.static_range(0, COLUMNS, BLOCK):
        if begin + BLOCK <= COLUMNS:
            part = tl.load(start + begin + column, eviction_policy="evict_first")
            total += part.to(tl.float32) * tl.load(x + begin + column).to(tl.float32)
        else:
            there = begin + column < COLUMNS
            part = tl.load(start + begin + column, mask=there, other=0.0, eviction_policy="evict_first")
            total += part.to(tl.float32) * tl.load(x + begin + column, mask=there, other=0.0).to(tl.float32)
    value = tl.sum(total, axis=0)
    if BIAS:
        value += tl.load(bias + row).to(tl.float32)
    tl.store(out + row, value.to(out.dtype.element_ty))
