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


@triton.jit
def load_tiles(
    words,
    scales,
    zeros,
    tile,
    first,
    row_tiles,
    blocks,
    lane,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    TILES_A_GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    WK: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Words, scales and zeros of U column tiles by R row tiles, with what lies past the last column tile as zero."""
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
                    inside = (block < blocks)[:, None]
                    loaded = loaded + (tl.load(pointer, mask=inside, other=0), tl.load(pointer + 128, mask=inside, other=0))
            else:
                pointer = words + (at * 128 + lane * 4)[:, None] + j
                group = (row_tile * (blocks // TILES_A_GROUP) + block // TILES_A_GROUP) * 8 + lane // 4
                if EVEN:
                    loaded = loaded + (tl.load(pointer),)
                else:
                    loaded = loaded + (tl.load(pointer, mask=(block < blocks)[:, None], other=0),)
                    group = tl.where(block < blocks, group, 0)
                if SCALE == FP32:
                    grouped = grouped + (tl.load(scales + group * 2), tl.load(scales + group * 2 + 1))
                else:
                    grouped = grouped + (tl.load(scales + group),)
                if ZEROS:
                    offsets = offsets + (tl.load(zeros + group),)
    return loaded, grouped, offsets


@triton.jit
def load_activations(x, token, block, batch, blocks, t, WK: tl.constexpr, U: tl.constexpr, NT: tl.constexpr, EVEN: tl.constexpr):
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
                inside = (at < blocks)[:, None]
                activations = activations + (tl.load(pointer, mask=inside, other=0), tl.load(pointer + 16, mask=inside, other=0))
    return activations


@triton.jit(do_not_specialize=["batch", "rows", "row_tiles", "blocks", "inverse", "once"])
def weight_only_product_few(
    x,  # *int32: activations (batch, columns), two 16-bit values a word
    words,
    scales,  # *int32 for scales of 16 bits, else *float32
    zeros,  # *int16: two codes
    table,  # *int32
    bias,
    out,  # (batch, rows)
    batch,
    rows,
    row_tiles,
    blocks,  # column tiles
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
    EVEN: tl.constexpr,  # the columns divide into steps without a rest
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
            words,
            scales,
            zeros,
            tile,
            ahead * (WK * U) + wk,
            row_tiles,
            blocks,
            lane,
            KIND,
            SCALE,
            TILES_A_GROUP,
            ZEROS,
            WK,
            R,
            U,
            EVEN and ahead == 0,
        )
        loaded = loaded + tiles[0]
        grouped = grouped + tiles[1]
        offsets = offsets + tiles[2]
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
        # 256 pairs, each in all 32 banks: a thread reads its own bank's copy and never meets another
        base = tl.inline_asm_elementwise(
            "{ .shared .align 128 .b8 pairs[32768]; mov.u32 $0, pairs; }", "=r,r", [rows], dtype=tl.int32, is_pure=False, pack=1
        )
        for round in tl.static_range(256 // (WK * WM * 32) if WK * WM * 32 < 256 else 1):
            entry = (thread + round * (WK * WM * 32)) % 256
            value = tl.load(table + entry)
            for chunk in tl.static_range(8):
                where = base + entry * 128 + (entry + chunk) % 8 * 16
                tl.inline_asm_elementwise(FILL, "=r,r,r", [where, value], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
        base = tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [base + lane * 4], dtype=tl.int32, is_pure=False, pack=1)
        more = (base[:, None],)

    token = first + g
    if AHEAD:
        activations = load_activations(x, token, wk, batch, blocks, t, WK, U, NT, EVEN)
    for step in range(0, blocks, WK * U):
        if AHEAD:
            next = load_tiles(
                words,
                scales,
                zeros,
                tile,
                step + AHEAD * (WK * U) + wk,
                row_tiles,
                blocks,
                lane,
                KIND,
                SCALE,
                TILES_A_GROUP,
                ZEROS,
                WK,
                R,
                U,
                False,
            )
            more_activations = load_activations(x, token, step + WK * U + wk, batch, blocks, t, WK, U, NT, False)
        else:
            loaded, grouped, offsets = load_tiles(
                words, scales, zeros, tile, step + wk, row_tiles, blocks, lane, KIND, SCALE, TILES_A_GROUP, ZEROS, WK, R, U, EVEN
            )
            activations = load_activations(x, token, step + wk, batch, blocks, t, WK, U, NT, EVEN)
        if once != 0:
            for u in tl.static_range(U):
                expanded = ()
                factors = ()
                for r in tl.static_range(R):
                    if KIND == BYTES:
                        for half in tl.static_range(2):
                            expanded = expanded + tl.inline_asm_elementwise(
                                EXPAND, EXPAND_REGISTERS, [loaded[2 * (u * R + r) + half]], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
                            )
                    else:
                        if KIND == AFFINE:
                            if ZEROS:
                                pair = offsets[u * R + r].to(tl.int32)
                                more = (
                                    ((pair & 0xFF) * 0x10001 | MAGIC)[:, None],
                                    ((pair >> 8 & 0xFF) * 0x10001 | MAGIC)[:, None],
                                )
                            else:
                                more = (MAGIC | 0x80008, MAGIC | 0x80008)
                        expanded = expanded + tl.inline_asm_elementwise(
                            EXPAND,
                            EXPAND_REGISTERS,
                            (loaded[u * R + r],) + more,
                            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                            is_pure=True,
                            pack=4,
                        )
                        if SCALE == FP32:
                            factors = factors + (tl.where(j < 2, grouped[2 * (u * R + r)][:, None], grouped[2 * (u * R + r) + 1][:, None]),)
                        elif SCALE == BF16:
                            both = grouped[u * R + r][:, None]
                            factors = factors + (tl.where(j < 2, both << 16, both & -65536).to(tl.float32, bitcast=True),)
                        else:
                            both = grouped[u * R + r][:, None]
                            one = tl.where(j < 2, both, both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
                            factors = factors + (one.to(tl.float32),)
                for n in tl.static_range(NT):
                    low = activations[2 * (u * NT + n)]
                    high = activations[2 * (u * NT + n) + 1]
                    for r in tl.static_range(R):
                        if KIND == BYTES:
                            total = tl.inline_asm_elementwise(
                                MULTIPLY,
                                MULTIPLY_REGISTERS,
                                [
                                    expanded[4 * r],
                                    expanded[4 * r + 1],
                                    expanded[4 * r + 2],
                                    expanded[4 * r + 3],
                                    low,
                                    high,
                                    sums[n * R + r],
                                ],
                                dtype=tl.float32,
                                is_pure=True,
                                pack=4,
                            )
                        else:
                            part = tl.inline_asm_elementwise(
                                MULTIPLY,
                                MULTIPLY_REGISTERS,
                                [expanded[4 * r], expanded[4 * r + 1], expanded[4 * r + 2], expanded[4 * r + 3], low, high],
                                dtype=tl.float32,
                                is_pure=True,
                                pack=4,
                            )
                            total = sums[n * R + r] + part * factors[r]
                        sums = sums[: n * R + r] + (total,) + sums[n * R + r + 1 :]
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
            tl.store(out + token_out * rows + row, result.to(out.dtype.element_ty), mask=(token_out < batch) & (row < rows))
