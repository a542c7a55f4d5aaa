"""The product of a few activations with a packed weight, in Triton with inline PTX (sm_80 and later).

One warp computes 16 rows (times ``R``) by 8 columns (times ``NT``) of the result. Weights go from memory to registers, are expanded there
to 16 bits in just the order that ``mma.m16n8k16`` takes, and are never seen by shared memory.

All tensors of the loop are (threads, 4): one row a thread, so that the elementwise assembly, which holds a warp-wide ``mma``, sees the
thread's own four registers. 4-bit tables are looked up with byte permutes in registers, or in a copy of all pairs of values that every
bank of shared memory has for itself.
"""

# Triton reads the kernels' own annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from optkit_plugins.kernels.packed.assembly import AFFINE, BF16, BYTES, FP32, PAIRS, PERMUTE
from optkit_plugins.kernels.packed.table_triton import expand, fill_pairs, load_pairs, load_permuted


@triton.jit
def load_tiles(
    words, scales, zeros, tile, first, end, row_tiles, blocks, lane,
    KIND: tl.constexpr, SCALE: tl.constexpr, TILES_A_GROUP: tl.constexpr, ZEROS: tl.constexpr,
    WK: tl.constexpr, R: tl.constexpr, U: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Words, scales and zeros of U column tiles by R row tiles, with what lies at ``end`` and past it as zero."""
    j = tl.arange(0, 4)[None, :]
    loaded = ()
    grouped = ()
    offsets = ()
    for u in tl.static_range(U):
        block = first + u * WK
        for r in tl.static_range(R):
            # rows past the end are computed with the last tile's weights, and not stored
            row_tile = tl.minimum(tile + r, row_tiles - 1)
            at = row_tile * blocks + block
            if KIND == BYTES:
                pointer = words + (at * 256 + lane * 4)[:, None] + j
                if EVEN:
                    loaded = loaded + (tl.load(pointer), tl.load(pointer + 128))
                else:
                    inside = (block < end)[:, None]
                    loaded = loaded + (tl.load(pointer, mask=inside, other=0), tl.load(pointer + 128, mask=inside, other=0))
            else:
                pointer = words + (at * 128 + lane * 4)[:, None] + j
                group = (row_tile * (blocks // TILES_A_GROUP) + block // TILES_A_GROUP) * 8 + lane // 4
                if EVEN:
                    loaded = loaded + (tl.load(pointer),)
                else:
                    loaded = loaded + (tl.load(pointer, mask=(block < end)[:, None], other=0),)
                    group = tl.where(block < end, group, 0)
                if SCALE == FP32:
                    grouped = grouped + (tl.load(scales + group * 2), tl.load(scales + group * 2 + 1))
                else:
                    grouped = grouped + (tl.load(scales + group),)
                if ZEROS:
                    offsets = offsets + (tl.load(zeros + group),)
    return loaded, grouped, offsets


@triton.jit
def load_activations(x, token, block, end, batch, blocks, t, WK: tl.constexpr, U: tl.constexpr, NT: tl.constexpr, EVEN: tl.constexpr):
    """The second operands of U column tiles by NT tiles of activations, straight from memory.

    Past the batch the last activation is read again: what comes of it is not stored, and nothing has to be set to zero.
    """
    j = tl.arange(0, 4)[None, :]
    activations = ()
    for u in tl.static_range(U):
        at = block + u * WK
        for n in tl.static_range(NT):
            pointer = x + (tl.minimum(token + n * 8, batch - 1) * (blocks * 32) + at * 32 + t * 4)[:, None] + j
            if EVEN:
                activations = activations + (tl.load(pointer), tl.load(pointer + 16))
            else:
                inside = (at < end)[:, None]
                activations = activations + (tl.load(pointer, mask=inside, other=0), tl.load(pointer + 16, mask=inside, other=0))
    return activations


@triton.jit
def spread(grouped, at: tl.constexpr, j, SCALE: tl.constexpr):
    """A tile's scales as float32 (threads, 4), in the order of the sums: registers 0 and 1 are row g, 2 and 3 row g + 8."""
    if SCALE == FP32:
        factors = tl.where(j < 2, grouped[2 * at][:, None], grouped[2 * at + 1][:, None])
    else:
        both = grouped[at][:, None]
        if SCALE == BF16:
            factors = tl.where(j < 2, both << 16, both & -65536).to(tl.float32, bitcast=True)
        else:
            factors = tl.where(j < 2, both, both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return factors


@triton.jit
def add_tiles(
    sums, loaded, grouped, offsets, activations, more, j, u: tl.constexpr,
    KIND: tl.constexpr, SCALE: tl.constexpr, ZEROS: tl.constexpr, R: tl.constexpr, NT: tl.constexpr,
    EXPAND: tl.constexpr, EXPAND_REGISTERS: tl.constexpr, MULTIPLY: tl.constexpr, MULTIPLY_REGISTERS: tl.constexpr, MAGIC: tl.constexpr,
):  # fmt: skip
    """Multiply the column tile ``u`` of R row tiles with NT tiles of activations."""
    expanded = ()
    factors = ()
    for r in tl.static_range(R):
        if KIND == AFFINE:
            if ZEROS:
                pair = offsets[u * R + r].to(tl.int32)
                more = (((pair & 0xFF) * 0x10001 | MAGIC)[:, None], ((pair >> 8 & 0xFF) * 0x10001 | MAGIC)[:, None])
            else:
                more = (MAGIC | 0x80008, MAGIC | 0x80008)
        expanded = expanded + (expand(loaded, u * R + r, more, KIND, EXPAND, EXPAND_REGISTERS),)
        if KIND != BYTES:
            factors = factors + (spread(grouped, u * R + r, j, SCALE),)
    for n in tl.static_range(NT):
        second = (activations[2 * (u * NT + n)], activations[2 * (u * NT + n) + 1])
        for r in tl.static_range(R):
            if KIND == BYTES:
                total = tl.inline_asm_elementwise(
                    MULTIPLY, MULTIPLY_REGISTERS, expanded[r] + second + (sums[n * R + r],), dtype=tl.float32, is_pure=True, pack=4
                )
            else:
                part = tl.inline_asm_elementwise(
                    MULTIPLY, MULTIPLY_REGISTERS, expanded[r] + second, dtype=tl.float32, is_pure=True, pack=4
                )  # fmt: skip
                total = sums[n * R + r] + part * factors[r]
            sums = sums[: n * R + r] + (total,) + sums[n * R + r + 1 :]
    return sums


@triton.jit(do_not_specialize=["batch", "rows", "row_tiles", "blocks", "share", "inverse", "once"])
def weight_only_product_few(
    x,  # *int32: activations (batch, columns), two 16-bit values a word
    words,
    scales,  # *int32 for scales of 16 bits, else *float32
    zeros,  # *int16: two codes
    table,  # *int32
    bias,
    out,  # (batch, rows); (splits, batch, rows) where several programs share the columns
    batch,
    rows,
    row_tiles,
    blocks,  # column tiles
    share,  # column tiles of a program
    inverse,  # float: what the sum is multiplied with at the end
    once,  # 1, which the compiler does not know: loads stay in front of a branch, but not of arithmetic
    KIND: tl.constexpr,
    SCALE: tl.constexpr,  # dtype of the scales
    TILES_A_GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    WK: tl.constexpr,  # warps that share the columns
    WM: tl.constexpr,  # warps that share the rows
    R: tl.constexpr,  # row tiles a warp
    U: tl.constexpr,  # column tiles that a warp loads at once
    NT: tl.constexpr,  # tiles of 8 activations
    EVEN: tl.constexpr,  # a program's columns divide into steps without a rest
    AHEAD: tl.constexpr,  # steps whose weights are under way while one is computed
    EXPAND: tl.constexpr,
    EXPAND_REGISTERS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    MULTIPLY_REGISTERS: tl.constexpr,
    MAGIC: tl.constexpr,
    FILL: tl.constexpr,
):
    thread = tl.arange(0, WK * WM * 32)
    j = tl.arange(0, 4)[None, :]
    lane = thread % 32
    warp = thread // 32
    wk = warp % WK
    wm = warp // WK
    g = lane // 4
    t = lane % 4
    first = tl.program_id(1) * (NT * 8)
    begin = tl.program_id(2) * share
    end = begin + share
    tile = (tl.program_id(0) * WM + wm) * R
    sums = ()
    for _ in tl.static_range(R * NT):
        sums = sums + (tl.zeros((WK * WM * 32, 4), tl.float32),)
    if AHEAD:
        loaded = ()
        grouped = ()
        offsets = ()
    for ahead in tl.static_range(AHEAD):
        tiles = load_tiles(
            words, scales, zeros, tile, begin + ahead * (WK * U) + wk, end, row_tiles, blocks, lane,
            KIND, SCALE, TILES_A_GROUP, ZEROS, WK, R, U, EVEN and ahead == 0,
        )  # fmt: skip
        loaded = loaded + tiles[0]
        grouped = grouped + tiles[1]
        offsets = offsets + tiles[2]
    if KIND == PERMUTE:
        more = load_permuted(table, lane)
    elif KIND == PAIRS:
        more = (fill_pairs(load_pairs(table, thread, WK * WM * 32), thread, rows, WK * WM * 32, FILL),)
    else:
        more = ()
    token = first + g
    if AHEAD:
        activations = load_activations(x, token, begin + wk, end, batch, blocks, t, WK, U, NT, EVEN)
    for step in range(begin, end, WK * U):
        if AHEAD:
            next = load_tiles(
                words, scales, zeros, tile, step + AHEAD * (WK * U) + wk, end, row_tiles, blocks, lane,
                KIND, SCALE, TILES_A_GROUP, ZEROS, WK, R, U, False,
            )  # fmt: skip
            more_activations = load_activations(x, token, step + WK * U + wk, end, batch, blocks, t, WK, U, NT, False)
        else:
            loaded, grouped, offsets = load_tiles(
                words, scales, zeros, tile, step + wk, end, row_tiles, blocks, lane, KIND, SCALE, TILES_A_GROUP, ZEROS, WK, R, U, EVEN
            )
            activations = load_activations(x, token, step + wk, end, batch, blocks, t, WK, U, NT, EVEN)
        if once != 0:
            for u in tl.static_range(U):
                sums = add_tiles(
                    sums, loaded, grouped, offsets, activations, more, j, u,
                    KIND, SCALE, ZEROS, R, NT, EXPAND, EXPAND_REGISTERS, MULTIPLY, MULTIPLY_REGISTERS, MAGIC,
                )  # fmt: skip
        if AHEAD:
            loaded = loaded[U * R * (2 if KIND == BYTES else 1) :] + next[0]
            grouped = grouped[(0 if KIND == BYTES else U * R * (2 if SCALE == FP32 else 1)) :] + next[1]
            offsets = offsets[(U * R if ZEROS else 0) :] + next[2]
            activations = more_activations
    for n in tl.static_range(NT):
        for r in tl.static_range(R):
            result = tl.sum(tl.reshape(sums[n * R + r], (WM, WK, 32, 4)), axis=1) * inverse
            lanes = tl.arange(0, 32)[None, :, None]
            column = tl.arange(0, 4)[None, None, :]
            row = ((tl.program_id(0) * WM + tl.arange(0, WM)[:, None, None]) * R + r) * 16 + lanes // 4 + 8 * (column // 2)
            token_out = first + n * 8 + lanes % 4 * 2 + column % 2
            if KIND == BYTES:
                result *= tl.load(scales + row // 16 * 16 + row % 8 * 2 + row % 16 // 8, mask=row < rows, other=0).to(tl.float32)
            if BIAS:
                result += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
            part = tl.program_id(2) * batch + token_out
            tl.store(out + part * rows + row, result.to(out.dtype.element_ty), mask=(token_out < batch) & (row < rows))
