"""Packed weights in plain Triton, without assembly: for older GPUs, for expanding weights, and for the interpreter on a CPU.

The twin of the kernels with inline assembly: one element at a time, by the layout's definition.
"""

# Triton reads the kernels' own annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

TABLE, AFFINE, BYTES, FLOATS = (tl.constexpr(i) for i in range(4))


@triton.jit
def float8(byte):
    """The value of e4m3 bits, float32: in float16 it is 2^8 times smaller, subnormal values included."""
    half = ((byte & 127) << 7 | (byte & 128) << 8).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256


@triton.jit
def tile(words, scales, zeros, table, row_tile, block, blocks, KIND: tl.constexpr, TILES_A_GROUP: tl.constexpr, ZEROS: tl.constexpr):
    """One tile, (16, 64), in float32."""
    row = tl.arange(0, 16)[:, None]
    column = tl.arange(0, 64)[None, :]
    half = row // 8
    lane = row % 8 * 4 + column % 32 // 8
    step = column // 32 * 2 + column % 8 // 4  # of the four products
    at = row_tile * blocks + block
    scale_at = scales + row % 8 * 2 + half
    if KIND >= BYTES:
        # two loads of 16 bytes a thread; words by step and row, bytes by column
        word = tl.load(words + (at * 2 + step // 2) * 128 + lane * 4 + step % 2 * 2 + half)
        byte = word >> (column % 2 * 2 + column % 4 // 2) * 8 & 0xFF
        value = float8(byte) if KIND == FLOATS else tl.where(byte < 128, byte, byte - 256).to(tl.float32)
        return value * tl.load(scale_at + row_tile * 16).to(tl.float32)
    group = (row_tile * (blocks // TILES_A_GROUP) + block // TILES_A_GROUP) * 16
    scale = tl.load(scale_at + group).to(tl.float32)
    word = tl.load(words + at * 128 + lane * 4 + step)
    if KIND == TABLE:
        label = word >> (half * 4 + column % 4) * 4 & 15
        return tl.load(table + label) * scale
    code = word >> (column % 2 * 4 + column % 4 // 2 * 2 + half) * 4 & 15
    zero = 8
    if ZEROS:
        zero = tl.load(zeros + group + row % 8 * 2 + half).to(tl.int32)
    return (code - zero).to(tl.float32) * scale


@triton.jit
def expand(
    words, scales, zeros, table, out, rows, blocks: tl.constexpr, KIND: tl.constexpr, TILES_A_GROUP: tl.constexpr, ZEROS: tl.constexpr
):
    """The weight, (rows, columns). One program a tile."""
    row_tile = tl.program_id(0)
    block = tl.program_id(1)
    value = tile(words, scales, zeros, table, row_tile, block, blocks, KIND, TILES_A_GROUP, ZEROS)
    row = row_tile * 16 + tl.arange(0, 16)[:, None]
    column = block * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + row.to(tl.int64) * (blocks * 64) + column, value.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def product(
    x,
    words,
    scales,
    zeros,
    table,
    bias,
    out,
    rows,
    blocks: tl.constexpr,  # the interpreter of Triton 3.6 does not loop to a run-time bound under numpy 2.4
    KIND: tl.constexpr,
    TILES_A_GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """``x`` (batch, columns) times the weight's transpose, one program for 16 rows and one of the batch."""
    row_tile = tl.program_id(0)
    token = tl.program_id(1)
    row = row_tile * 16 + tl.arange(0, 16)
    total = tl.zeros((16,), tl.float32)
    for block in range(0, blocks):
        values = tile(words, scales, zeros, table, row_tile, block, blocks, KIND, TILES_A_GROUP, ZEROS)
        activations = tl.load(x + token * (blocks * 64) + block * 64 + tl.arange(0, 64)).to(tl.float32)
        total += tl.sum(values * activations[None, :], axis=1)
    if BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(out + token * rows + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def add_up(parts, bias, out, size, rows, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr = False):
    """``out`` (batch, rows) = sum of ``parts`` (SPLITS, batch, rows), float32, plus bias. One program for BLOCK values.

    :param EARLY: the kernel may start before the one in front of it is done, and waits for that at once.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * size + at, mask=inside, other=0)
    if BIAS:
        total += tl.load(bias + at % rows, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
