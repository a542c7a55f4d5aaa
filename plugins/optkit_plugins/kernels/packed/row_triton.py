"""The product of one activation with a packed weight, in Triton with inline PTX (sm_80 and later).

Eight warps, say, share the columns of 16 rows. Each asks for all its weights of a step before anything else, eight tiles of 64 columns,
and expands them in registers to first operands of ``mma.m16n8k16``. The instruction multiplies with eight columns at a time where there
is only one activation, so each of its columns gets the activations of another tile: eight tiles share one second operand, read once. Of
tile ``u``'s product column ``u`` is the one that means something; it lies with the threads ``t = u // 2``, which read its scales alone.

Integers of 4 bits are multiplied with what ``mma`` understands without arithmetic, the integer plus a power of two. What that and the
zero add up to is taken off again with the sum of the tile's activations, which a product with ones gives.
"""

# Triton reads the kernels' own annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from optkit_plugins.kernels.packed.assembly import BF16, BIASED, BYTES, FP32, PAIRS, PERMUTE
from optkit_plugins.kernels.packed.table_triton import expand, fill_pairs, load_pairs, load_permuted


@triton.jit
def load_words(start, first, blocks, KIND: tl.constexpr, U: tl.constexpr, MASKED: tl.constexpr):
    """Words of U neighbouring tiles from ``first`` on, which begin at ``start``; zero past the last column tile."""
    loaded = ()
    for u in tl.static_range(U):
        for half in tl.static_range(2 if KIND == BYTES else 1):
            pointer = start + (u * (256 if KIND == BYTES else 128) + half * 128)
            if MASKED:
                loaded = loaded + (tl.load(pointer, mask=(first + u < blocks)[:, None], other=0, eviction_policy="evict_first"),)
            else:
                loaded = loaded + (tl.load(pointer, eviction_policy="evict_first"),)
    return loaded


@triton.jit
def load_columns(values, first, blocks, g, t, U: tl.constexpr):
    """Second operands of U neighbouring tiles, in two halves: from the activations, or the norm's weight."""
    j = tl.arange(0, 4)[None, :]
    inside = (g < U) & (first + g < blocks)
    at = tl.where(inside, (first + g) * 32 + t * 4, 0)[:, None] + j
    return tl.load(values + at, mask=inside[:, None], other=0), tl.load(values + at + 16, mask=inside[:, None], other=0)


@triton.jit
def load_groups(
    scales, zeros, row_tile, first, blocks, g, t,
    KIND: tl.constexpr, SCALE: tl.constexpr, TILES_A_GROUP: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of the two tiles that the thread sums, 2 t and 2 t + 1, rows g and g + 8 side by side."""
    factors = ()
    offsets = ()
    if KIND != BYTES:
        for p in tl.static_range(2):
            tile = tl.minimum(first + t * 2 + p, blocks - 1)
            group = (row_tile * (blocks // TILES_A_GROUP) + tile // TILES_A_GROUP) * 8 + g
            if SCALE == FP32:
                factors = factors + (tl.load(scales + group * 2), tl.load(scales + group * 2 + 1))
            else:
                factors = factors + (tl.load(scales + group),)
            if ZEROS:
                offsets = offsets + (tl.load(zeros + group),)
    return factors, offsets


@triton.jit
def spread(loaded, j, SCALE: tl.constexpr):
    """Scales of two tiles as float32 (threads, 4), in the order of the sums: register 2 h + p is row g + 8 h of tile 2 t + p."""
    if SCALE == FP32:
        factors = tl.where(
            j < 2,
            tl.where(j % 2 == 0, loaded[0][:, None], loaded[2][:, None]),
            tl.where(j % 2 == 0, loaded[1][:, None], loaded[3][:, None]),
        )
    else:
        both = tl.where(j % 2 == 0, loaded[0][:, None], loaded[1][:, None])
        if SCALE == BF16:
            factors = tl.where(j < 2, both << 16, both & -65536).to(tl.float32, bitcast=True)
        else:
            factors = tl.where(j < 2, both, both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return factors


@triton.jit
def normalized(halves, norms, squares, TIMES: tl.constexpr):
    """Activations times the norm's weights, and the sums of their squares so far: what they are divided by is the same for all."""
    for half in tl.static_range(2):
        first = (halves[half] << 16).to(tl.float32, bitcast=True)
        second = (halves[half] & -65536).to(tl.float32, bitcast=True)
        squares += first * first + second * second
    low = tl.inline_asm_elementwise(TIMES, "=r,r,r", [halves[0], norms[0]], dtype=tl.int32, is_pure=True, pack=1)
    high = tl.inline_asm_elementwise(TIMES, "=r,r,r", [halves[1], norms[1]], dtype=tl.int32, is_pure=True, pack=1)
    return low, high, squares


@triton.jit
def zeros_of(offsets, low, high, j, MULTIPLY: tl.constexpr, MULTIPLY_REGISTERS: tl.constexpr, MAGIC, ONES, ZEROS: tl.constexpr):
    """What integers plus a power of two multiplied too much: the sums of the tiles' activations times power and zero."""
    ones = tl.full((low.shape[0], 4), ONES, tl.int32)
    sums = tl.inline_asm_elementwise(
        MULTIPLY, MULTIPLY_REGISTERS, (ones, ones, ones, ones, low, high), dtype=tl.float32, is_pure=True, pack=4
    )
    if ZEROS:
        codes = tl.where(j % 2 == 0, offsets[0][:, None], offsets[1][:, None]).to(tl.int32)
        sums *= tl.where(j < 2, codes & 0xFF, codes >> 8 & 0xFF).to(tl.float32) + MAGIC
    else:
        sums *= MAGIC + 8
    return sums


@triton.jit(do_not_specialize=["rows", "row_tiles", "blocks", "inverse", "eps", "once"])
def weight_only_product_row(
    x,  # *int32: activations (columns,), two 16-bit values a word
    words,
    scales,  # *int32 for scales of 16 bits, else *float32
    zeros,  # *int16: two codes
    table,  # *int32
    bias,
    norm,  # *int32: the norm's weight (columns,), like x
    residual,
    out,  # (rows,), or half of them where GATED
    rows,
    row_tiles,
    blocks,  # column tiles
    inverse,  # float: what the sum is multiplied with at the end
    eps,
    once,  # 1, which the compiler does not know
    KIND: tl.constexpr,
    SCALE: tl.constexpr,  # dtype of the scales
    TILES_A_GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,  # bfloat16 alone: before they are normalized, activations may be too large for float16
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,  # the first half of the rows is the gate's
    WK: tl.constexpr,  # warps that share the columns
    WM: tl.constexpr,  # warps that share the rows
    U: tl.constexpr,  # column tiles that a warp loads at once, at most 8
    STEPS: tl.constexpr,  # of WK * U column tiles
    EVEN: tl.constexpr,  # the columns divide into steps without a rest
    EARLY: tl.constexpr,  # start before the kernel in front is done, and let the next do so: only weights may be read before the wait
    EXPAND: tl.constexpr,
    EXPAND_REGISTERS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    MULTIPLY_REGISTERS: tl.constexpr,
    MAGIC: tl.constexpr,
    ONES: tl.constexpr,
    FILL: tl.constexpr,
    TIMES: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    thread = tl.arange(0, WK * WM * 32)
    j = tl.arange(0, 4)[None, :]
    lane = thread % 32
    warp = thread // 32
    wk = warp % WK
    g = lane // 4
    t = lane % 4
    # rows past the end are computed with the last tile's weights, and not stored
    wm = tl.arange(0, WM)
    if GATED:
        tile = tl.program_id(0) * (WM // 2) + wm // 2 + wm % 2 * (row_tiles // 2)
        row_tile = tl.program_id(0) * (WM // 2) + warp // WK // 2 + warp // WK % 2 * (row_tiles // 2)
    else:
        tile = tl.program_id(0) * WM + wm
        row_tile = tl.program_id(0) * WM + warp // WK
    row_tile = tl.minimum(row_tile, row_tiles - 1)
    inside = tl.arange(0, 8)[None, :, None] + tl.arange(0, 2)[None, None, :] * 8
    row = tile[:, None, None] * 16 + inside
    if GATED:
        place = (tl.program_id(0) * (WM // 2) + tl.arange(0, WM // 2))[:, None, None] * 16 + inside
        places = rows // 2
    else:
        place = row
        places = rows
    TILE: tl.constexpr = 256 if KIND == BYTES else 128  # words of one
    start = words + ((row_tile * blocks + wk * U) * TILE + lane * 4)[:, None] + j
    loaded = load_words(start, wk * U, blocks, KIND, U, not EVEN)
    factors, offsets = load_groups(scales, zeros, row_tile, wk * U, blocks, g, t, KIND, SCALE, TILES_A_GROUP, ZEROS)
    if NORM:
        norms = load_columns(norm, wk * U, blocks, g, t, U)
    if not EARLY:
        halves = load_columns(x, wk * U, blocks, g, t, U)
    if KIND == BYTES:
        factor = tl.load(scales + row // 16 * 16 + row % 8 * 2 + row % 16 // 8, mask=row < rows, other=0).to(tl.float32)
    if BIAS:
        added = tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
    if KIND == PERMUTE:
        more = load_permuted(table, lane)
    elif KIND == PAIRS:
        pairs = load_pairs(table, thread, WK * WM * 32)
    # Loads don't move across barriers, nor arithmetic across branches. Else the assembler puts loads where their words are used.
    tl.debug_barrier()
    if KIND == PAIRS:
        more = (fill_pairs(pairs, thread, rows, WK * WM * 32, FILL),)
    elif KIND != PERMUTE:
        more = ()
    if EARLY:
        tl.extra.cuda.gdc_wait()
        halves = load_columns(x, wk * U, blocks, g, t, U)
    if RESIDUAL:
        rest = tl.load(residual + place, mask=place < places, other=0).to(tl.float32)
    total = tl.zeros((WK * WM * 32, 4), tl.float32)
    squares = tl.zeros((WK * WM * 32, 4), tl.float32)
    for step in range(STEPS):
        if STEPS > 1:
            following = (step + 1) * (WK * U) + wk * U
            start += WK * U * TILE
            next = load_words(start, following, blocks, KIND, U, True)
            next_factors, next_offsets = load_groups(
                scales, zeros, row_tile, following, blocks, g, t, KIND, SCALE, TILES_A_GROUP, ZEROS
            )  # fmt: skip
            next_halves = load_columns(x, following, blocks, g, t, U)
            if NORM:
                next_norms = load_columns(norm, following, blocks, g, t, U)
        if once != 0:
            low = halves[0]
            high = halves[1]
            if NORM:
                low, high, squares = normalized(halves, norms, squares, TIMES)
            picked = tl.zeros((WK * WM * 32, 4), tl.float32)
            for u in tl.static_range(U):
                expanded = expand(loaded, u, more, KIND, EXPAND, EXPAND_REGISTERS)
                part = tl.inline_asm_elementwise(
                    MULTIPLY, MULTIPLY_REGISTERS, expanded + (low, high), dtype=tl.float32, is_pure=True, pack=4
                )  # fmt: skip
                picked = tl.where((t[:, None] == u // 2) & (j % 2 == u % 2), part, picked)
            if KIND == BYTES:
                total += picked
            else:
                if KIND == BIASED:
                    picked -= zeros_of(offsets, low, high, j, MULTIPLY, MULTIPLY_REGISTERS, MAGIC, ONES, ZEROS)
                total += picked * spread(factors, j, SCALE)
        if STEPS > 1:
            loaded = next
            factors = next_factors
            offsets = next_offsets
            halves = next_halves
            if NORM:
                norms = next_norms
    total = tl.sum(tl.reshape(total, (WM, WK, 8, 4, 2, 2)), axis=5)
    if NORM:  # both sums in one go: each has to wait for all warps
        squares = tl.sum(tl.reshape(squares, (WM, WK, 8, 4, 2, 2)), axis=5)
        result, square = tl.split(tl.sum(tl.sum(tl.join(total, squares), axis=3), axis=1))
        mean = tl.sum(tl.sum(square, axis=2), axis=1) / (blocks * 64)
        result *= inverse * tl.rsqrt(mean + eps)[:, None, None]
    else:
        result = tl.sum(tl.sum(total, axis=3), axis=1) * inverse  # WM, g, half
    if KIND == BYTES:
        result *= factor
    if BIAS:
        result += added
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(result, (WM // 2, 2, 8, 2)), (0, 2, 3, 1)))
        result = gate / (1 + tl.exp(-gate)) * up
    if RESIDUAL:
        result += rest
    tl.store(out + place, result.to(out.dtype.element_ty), mask=place < places)
