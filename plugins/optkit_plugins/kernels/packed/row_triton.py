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


@triton.jit
def load_words(words, row_tile, first, blocks, lane, KIND: tl.constexpr, U: tl.constexpr, EVEN: tl.constexpr):
    """Words of U neighbouring tiles; zero past the last."""
    j = tl.arange(0, 4)[None, :]
    loaded = ()
    for u in tl.static_range(U):
        block = first + u
        inside = (block < blocks)[:, None]
        if KIND == BYTES:
            pointer = words + ((row_tile * blocks + block) * 256 + lane * 4)[:, None] + j
            for half in tl.static_range(2):
                if EVEN:
                    loaded = loaded + (tl.load(pointer + half * 128, eviction_policy="evict_first"),)
                else:
                    loaded = loaded + (tl.load(pointer + half * 128, mask=inside, other=0, eviction_policy="evict_first"),)
        else:
            pointer = words + ((row_tile * blocks + block) * 128 + lane * 4)[:, None] + j
            if EVEN:
                loaded = loaded + (tl.load(pointer, eviction_policy="evict_first"),)
            else:
                loaded = loaded + (tl.load(pointer, mask=inside, other=0, eviction_policy="evict_first"),)
    return loaded


@triton.jit
def load_rest(
    x, norm, scales, zeros, row_tile, first, blocks, g, t,
    KIND: tl.constexpr, SCALE: tl.constexpr, TILES_A_GROUP: tl.constexpr, ZEROS: tl.constexpr, NORM: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Second operands of the U tiles and their norm's weights (two halves each), scales and zeros of the two tiles that the thread sums."""
    j = tl.arange(0, 4)[None, :]
    inside = (g < U) & (first + g < blocks)
    at = tl.where(inside, (first + g) * 32 + t * 4, 0)[:, None] + j
    halves = (tl.load(x + at, mask=inside[:, None], other=0), tl.load(x + at + 16, mask=inside[:, None], other=0))
    if NORM:
        halves = halves + (tl.load(norm + at, mask=inside[:, None], other=0), tl.load(norm + at + 16, mask=inside[:, None], other=0))
    factors = ()
    offsets = ()
    if KIND != BYTES:
        for p in tl.static_range(2):
            # of the tiles 2 t and 2 t + 1, rows g and g + 8 side by side
            tile = tl.minimum(first + t * 2 + p, blocks - 1)
            group = (row_tile * (blocks // TILES_A_GROUP) + tile // TILES_A_GROUP) * 8 + g
            if SCALE == FP32:
                factors = factors + (tl.load(scales + group * 2), tl.load(scales + group * 2 + 1))
            else:
                factors = factors + (tl.load(scales + group),)
            if ZEROS:
                offsets = offsets + (tl.load(zeros + group),)
    return halves, factors, offsets


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
    EXPAND: tl.constexpr,
    EXPAND_REGISTERS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    MULTIPLY_REGISTERS: tl.constexpr,
    MAGIC: tl.constexpr,
    ONES: tl.constexpr,
    FILL: tl.constexpr,
    TIMES: tl.constexpr,
):
    ROUNDS: tl.constexpr = 2 if WK * WM == 4 else 1
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
    loaded = load_words(words, row_tile, wk * U, blocks, lane, KIND, U, EVEN)
    halves, factors, offsets = load_rest(
        x, norm, scales, zeros, row_tile, wk * U, blocks, g, t, KIND, SCALE, TILES_A_GROUP, ZEROS, NORM, U
    )  # fmt: skip
    if KIND == PERMUTE:
        # every lane has its own copy: what is equal in all lanes is kept in uniform registers and fetched anew for each use
        more = (
            tl.load(table + lane)[:, None],
            tl.load(table + 32 + lane)[:, None],
            tl.load(table + 64 + lane)[:, None],
            tl.load(table + 96 + lane)[:, None],
            tl.load(table + 128 + lane)[:, None],
            tl.load(table + 160 + lane)[:, None],
            tl.load(table + 192 + lane)[:, None],
            tl.load(table + 224 + lane)[:, None],
        )
    if KIND == PAIRS:
        values = ()
        for round in tl.static_range(ROUNDS):
            values = values + (tl.load(table + (thread + round * (WK * WM * 32)) % 256),)
    # Loads don't move across barriers, nor arithmetic across branches. Else the assembler puts loads where their words are used.
    tl.debug_barrier()
    if KIND == PAIRS:
        # 256 pairs, each in all 32 banks: a thread reads its own bank's copy and never meets another
        base = tl.inline_asm_elementwise(
            "{ .shared .align 128 .b8 pairs[32768]; mov.u32 $0, pairs; }", "=r,r", [rows], dtype=tl.int32, is_pure=False, pack=1
        )
        for round in tl.static_range(ROUNDS):
            entry = (thread + round * (WK * WM * 32)) % 256
            for chunk in tl.static_range(8):
                where = base + entry * 128 + (entry + chunk) % 8 * 16
                tl.inline_asm_elementwise(FILL, "=r,r,r", [where, values[round]], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
        base = tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [base + lane * 4], dtype=tl.int32, is_pure=False, pack=1)
        more = (base[:, None],)
    elif KIND != PERMUTE:
        more = ()
    total = tl.zeros((WK * WM * 32, 4), tl.float32)
    squares = tl.zeros((WK * WM * 32, 4), tl.float32)
    for step in range(STEPS):
        if STEPS > 1:
            following = (step + 1) * (WK * U) + wk * U
            next = load_words(words, row_tile, following, blocks, lane, KIND, U, False)
            next_rest = load_rest(
                x, norm, scales, zeros, row_tile, following, blocks, g, t, KIND, SCALE, TILES_A_GROUP, ZEROS, NORM, U
            )  # fmt: skip
        if once != 0:
            low = halves[0]
            high = halves[1]
            if NORM:
                for half in tl.static_range(2):
                    first = (halves[half] << 16).to(tl.float32, bitcast=True)
                    second = (halves[half] & -65536).to(tl.float32, bitcast=True)
                    squares += first * first + second * second
                low = tl.inline_asm_elementwise(TIMES, "=r,r,r", [low, halves[2]], dtype=tl.int32, is_pure=True, pack=1)
                high = tl.inline_asm_elementwise(TIMES, "=r,r,r", [high, halves[3]], dtype=tl.int32, is_pure=True, pack=1)
            picked = tl.zeros((WK * WM * 32, 4), tl.float32)
            for u in tl.static_range(U):
                if KIND == BYTES:
                    first = tl.inline_asm_elementwise(
                        EXPAND, EXPAND_REGISTERS, [loaded[2 * u]], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
                    )
                    second = tl.inline_asm_elementwise(
                        EXPAND, EXPAND_REGISTERS, [loaded[2 * u + 1]], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
                    )
                    expanded = first + second
                else:
                    expanded = tl.inline_asm_elementwise(
                        EXPAND,
                        EXPAND_REGISTERS,
                        (loaded[u],) + more,
                        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                        is_pure=True,
                        pack=4,
                    )
                part = tl.inline_asm_elementwise(
                    MULTIPLY, MULTIPLY_REGISTERS, expanded + (low, high), dtype=tl.float32, is_pure=True, pack=4
                )  # fmt: skip
                picked = tl.where((t[:, None] == u // 2) & (j % 2 == u % 2), part, picked)
            if KIND == BYTES:
                total += picked
            else:
                if KIND == BIASED:
                    ones = tl.full((WK * WM * 32, 4), ONES, tl.int32)
                    sums = tl.inline_asm_elementwise(
                        MULTIPLY, MULTIPLY_REGISTERS, (ones, ones, ones, ones, low, high), dtype=tl.float32, is_pure=True, pack=4
                    )
                    if ZEROS:
                        codes = tl.where(j % 2 == 0, offsets[0][:, None], offsets[1][:, None]).to(tl.int32)
                        picked -= sums * (tl.where(j < 2, codes & 0xFF, codes >> 8 & 0xFF).to(tl.float32) + MAGIC)
                    else:
                        picked -= sums * (MAGIC + 8)
                total += picked * spread(factors, j, SCALE)
        if STEPS > 1:
            loaded = next
            halves, factors, offsets = next_rest
    result = tl.sum(tl.sum(tl.sum(tl.reshape(total, (WM, WK, 8, 4, 2, 2)), axis=5), axis=3), axis=1) * inverse  # WM, g, half
    inside = tl.arange(0, 8)[None, :, None] + tl.arange(0, 2)[None, None, :] * 8
    row = tile[:, None, None] * 16 + inside
    if KIND == BYTES:
        result *= tl.load(scales + row // 16 * 16 + row % 8 * 2 + row % 16 // 8, mask=row < rows, other=0).to(tl.float32)
    if NORM:
        mean = tl.sum(tl.reshape(squares, (WM, WK * 128)), axis=1) / (blocks * 64)
        result *= tl.rsqrt(mean + eps)[:, None, None]
    if BIAS:
        result += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(result, (WM // 2, 2, 8, 2)), (0, 2, 3, 1)))
        result = gate / (1 + tl.exp(-gate)) * up
        row = (tl.program_id(0) * (WM // 2) + tl.arange(0, WM // 2))[:, None, None] * 16 + inside
        rows = rows // 2
    if RESIDUAL:
        result += tl.load(residual + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)
