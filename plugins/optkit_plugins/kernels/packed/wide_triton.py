"""Products of many activations with a packed weight, and the expanded weight, in Triton (sm_80 and later; fast from sm_90 on).

Above some 16 activations a product is bound by arithmetic beside the tensor cores, not by reading: each word is expanded once for all of
a program's activations, goes through shared memory into the order that ``dot`` wants, and waits there beside the activations while the
next ones are under way. ``ASSEMBLY`` is off under the interpreter, which has none; everything else is the same there.
"""

# Triton reads the kernels' own annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from optkit_plugins.kernels.packed.assembly import AFFINE, BF16, BYTES, FLOATS, FP32, NAMED, PERMUTE
from optkit_plugins.kernels.packed.plain import float8


@triton.jit
def halves(pairs, dtype: tl.constexpr):
    """Two 16-bit values of each word, in a further dimension."""
    return tl.join(pairs.to(tl.int16).to(dtype, bitcast=True), (pairs >> 16).to(tl.int16).to(dtype, bitcast=True))


@triton.jit
def tables(table, some, KIND: tl.constexpr, ASSEMBLY: tl.constexpr, FILL: tl.constexpr, SHARED_PAIRS: tl.constexpr, WARPS: tl.constexpr):
    """What the assembly needs beside words: registers of byte permutes, or the place of all pairs of values in shared memory.

    :param some: any number; assembly of numbers has to have an input.
    """
    lane = tl.arange(0, 32)[None, :, None]
    if not ASSEMBLY:
        return (table,)
    elif KIND == PERMUTE:
        # every thread its own copy: what is equal in all goes through uniform registers
        return (
            tl.load(table + lane),
            tl.load(table + 32 + lane),
            tl.load(table + 64 + lane),
            tl.load(table + 96 + lane),
            tl.load(table + 128 + lane),
            tl.load(table + 160 + lane),
            tl.load(table + 192 + lane),
            tl.load(table + 224 + lane),
        )
    elif KIND == NAMED:
        # 256 pairs, each in all 32 banks: a thread reads its own bank's copy and never meets another
        thread = tl.arange(0, WARPS * 32)
        base = tl.inline_asm_elementwise(SHARED_PAIRS, "=r,r", [some], dtype=tl.int32, is_pure=False, pack=1)
        for round in tl.static_range(2 if WARPS == 4 else 1):
            entry = (thread + round * (WARPS * 32)) % 256
            value = tl.load(table + entry)
            for chunk in tl.static_range(8):
                where = base + entry * 128 + (entry + chunk) % 8 * 16
                tl.inline_asm_elementwise(FILL, "=r,r,r", [where, value], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
        return (tl.load(table + 256 + lane),)  # four times the lane, loaded like words, so that both get the order that ``dot`` wants
    else:
        return ()


@triton.jit
def expand_tile(
    words,
    scales,
    zeros,
    lookup,
    tile,  # (RT,)
    block,
    blocks,
    dtype: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,  # dtype of the scales
    TILES_A_GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SCALED: tl.constexpr,  # the assembly multiplies with the scales too
    EXPAND: tl.constexpr,
    EXPAND_REGISTERS: tl.constexpr,
    RT: tl.constexpr,
    B: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """RT row tiles of B column tiles, (RT * 16, B * 64) in ``dtype``, without the rows' scales for 8 bits.

    :param lookup: what ``tables`` gave. :param block: the first column tile.
    :param ORDERED: columns as they are; else in the order of ``columns_of``, in which no thread needs another's values for a product.
    """
    column_tile = block + tl.arange(0, B)[None, :]
    place = tl.reshape(tile[:, None] * blocks + column_tile, (RT * B, 1))
    # words as one dimension, since Triton would read of several tiles at once from several dimensions, with gaps between
    if KIND >= BYTES:
        word = tl.load(words + place * 256 + tl.arange(0, 256)[None, :])
        word = tl.reshape(word, (RT * B, 2, 32, 4))  # tile, j1, thread, word
        if ASSEMBLY:
            first, second = tl.inline_asm_elementwise(
                EXPAND, EXPAND_REGISTERS, [word], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
            )  # fmt: skip
            value = halves(tl.join(first, second), dtype)
        else:
            e = tl.arange(0, 4)[None, None, None, None, :]
            byte = word[:, :, :, :, None] >> (e % 2 * 2 + e // 2) * 8 & 0xFF
            value = (float8(byte) if KIND == FLOATS else (byte ^ 128) - 128).to(dtype)
        value = tl.reshape(value, (RT, B, 2, 8, 4, 2, 2, 2, 2))  # tile, block, j1, g, t, j0, half, c1, c0
        value = tl.permute(value, (0, 6, 3, 1, 2, 4, 5, 7, 8) if ORDERED else (0, 6, 3, 1, 2, 5, 7, 4, 8))
        return tl.reshape(value, (RT * 16, B * 64))
    word = tl.reshape(tl.load(words + place * 128 + tl.arange(0, 128)[None, :]), (RT * B, 32, 4))  # tile, thread, word
    group = tl.reshape(tile[:, None] * (blocks // TILES_A_GROUP) + column_tile // TILES_A_GROUP, (RT * B,))
    # in words of 32 bits, since smaller ones are not copied in the background
    if SCALED:
        both = tl.load(scales + (group * 8)[:, None] + tl.arange(0, 8)[None, :])
        both = tl.reshape(tl.broadcast_to(both[:, :, None, None], (RT * B, 8, 4, 4)), (RT * B, 32, 4))
    elif SCALE == FP32:
        scale = tl.load(scales + (group * 16)[:, None, None] + tl.arange(0, 8)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :])
    else:
        both = tl.load(scales + (group * 8)[:, None] + tl.arange(0, 8)[None, :])
        scale = halves(both, tl.bfloat16 if SCALE == BF16 else tl.float16)
    if not SCALED:
        scale = scale[:, :, None, None, None, :, None, None]
    if KIND == AFFINE:
        zero = 8 + tl.zeros((RT * B, 8, 2), tl.int32)
        if ZEROS:
            four = tl.load(zeros + (group * 4)[:, None] + tl.arange(0, 4)[None, :])[:, :, None]
            zero = tl.reshape(four >> tl.arange(0, 4)[None, None, :] * 8 & 0xFF, (RT * B, 8, 2))
        zero = zero[:, :, None, None, None, :, None, None]
    if ASSEMBLY:
        operands = (word,) + lookup + ((both,) if SCALED else ())
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            EXPAND, EXPAND_REGISTERS, operands, dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
        value = halves(tl.join(tl.join(p0, p1), tl.join(p2, p3)), dtype)
    else:
        e = tl.arange(0, 8)[None, None, None, :]
        if KIND != AFFINE:
            value = tl.load(lookup[0] + (word[:, :, :, None] >> e * 4 & 15))
        else:
            value = (word[:, :, :, None] >> (e % 2 * 4 + e // 2 % 2 * 2 + e // 4) * 4 & 15).to(dtype)
    value = tl.reshape(value, (RT * B, 8, 4, 2, 2, 2, 2, 2))  # tile, g, t, j1, j0, half, c1, c0
    if KIND == AFFINE:
        # the assembly's integers have a power of two added
        value -= (zero + ((128 if dtype == tl.bfloat16 else 1024) if ASSEMBLY else 0)).to(dtype)
    if not SCALED:
        value = (value * scale).to(dtype)
    value = tl.reshape(value, (RT, B, 8, 4, 2, 2, 2, 2, 2))
    value = tl.permute(value, (0, 6, 2, 1, 4, 3, 5, 7, 8) if ORDERED else (0, 6, 2, 1, 4, 5, 7, 3, 8))
    return tl.reshape(value, (RT * 16, B * 64))


@triton.jit
def columns_of(B: tl.constexpr):
    """Column of B tiles that is multiplied k-th. ``mma`` gives a thread columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9; it holds 4 neighbours."""
    k = tl.arange(0, 64 * B)
    column = k // 32 * 32 + k % 8 // 2 * 8 + k // 16 % 2 * 4 + k // 8 % 2 * 2 + k % 2
    return tl.max_contiguous(tl.multiple_of(column, 2), 2)  # pairs can be copied in the background


@triton.jit(do_not_specialize=["batch", "share", "inverse"])
def weight_only_product_wide(
    x,  # (batch, columns)
    words,
    scales,  # *int32 for scales of 16 bits, else *float32
    zeros,  # *int32: four codes
    table,
    bias,
    out,  # (batch, rows), or (splits, batch, rows)
    batch,
    rows,
    row_tiles,
    blocks,  # column tiles
    share,  # column tiles a program; divides them
    inverse,  # float: what the sum is multiplied with at the end
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    TILES_A_GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SCALED: tl.constexpr,
    EXPAND: tl.constexpr,
    EXPAND_REGISTERS: tl.constexpr,
    RT: tl.constexpr,  # row tiles a program
    TOKENS: tl.constexpr,  # activations a program
    STEPS: tl.constexpr,  # the same where it has to be known beforehand (the interpreter under numpy 2.4), else 0
    STAGES: tl.constexpr,  # steps under way
    BLOCKS: tl.constexpr,  # column tiles a step; divides the share
    WARPS: tl.constexpr,
    READY: tl.constexpr,  # x is in the order of ``columns_of``
    EARLY: tl.constexpr,  # the kernel may start before the one in front of it is done
    NEXT_EARLY: tl.constexpr,  # and lets the next do so: not one with programs so large that they had to share multiprocessors unevenly
    FILL: tl.constexpr,
    SHARED_PAIRS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """``x`` times the weight's transpose."""
    if NEXT_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY:
        tl.extra.cuda.gdc_wait()
    first = tl.program_id(0) * RT
    # rows past the end are computed with the last tile's weights, and tokens past the batch with the last one; neither is stored
    tile = tl.minimum(first + tl.arange(0, RT), row_tiles - 1)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, 64 * BLOCKS) if READY else columns_of(BLOCKS)
    activation = x + tl.minimum(token, batch - 1)[None, :] * (blocks * 64) + column[:, None]
    start = tl.program_id(2) * share
    lookup = tables(table, blocks, KIND, ASSEMBLY, FILL, SHARED_PAIRS, WARPS)
    total = tl.zeros((RT * 16, TOKENS), tl.float32)
    tl.assume(share > 0)
    for step in tl.range(0, STEPS if STEPS > 0 else share, BLOCKS, num_stages=STAGES):
        block = start + step
        weight = expand_tile(
            words, scales, zeros, lookup, tile, block, blocks, x.dtype.element_ty,
            KIND, SCALE, TILES_A_GROUP, ZEROS, ASSEMBLY, SCALED, EXPAND, EXPAND_REGISTERS, RT, BLOCKS, False,
        )  # fmt: skip
        total = tl.dot(weight, tl.load(activation + block * 64), total)
        if ASSEMBLY and WAIT != "":
            # Triton up to 3.6 lets the next weights into registers that products under way may still have to read
            tl.inline_asm_elementwise(WAIT, "=r,r", [step], dtype=tl.int32, is_pure=False, pack=1)
    total *= inverse
    row = first * 16 + tl.arange(0, RT * 16)
    if KIND >= BYTES:
        scale = tl.load(scales + row // 16 * 16 + row % 8 * 2 + row % 16 // 8, mask=row < rows, other=0)
        total *= scale.to(tl.float32)[:, None]
    if BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    out += tl.program_id(2) * batch * rows
    tl.store(
        out + token[None, :] * rows + row[:, None], total.to(out.dtype.element_ty), mask=(token < batch)[None, :] & (row < rows)[:, None]
    )


@triton.jit
def weight_only_order(x, out, blocks, TILES: tl.constexpr, EARLY: tl.constexpr):
    """``x`` (batch, columns) in the order of ``columns_of``. One program for TILES column tiles of one activation."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)[:, None]
    first = tl.program_id(0) * (blocks * 64) + tile * 64
    value = tl.load(x + first + columns_of(1)[None, :], mask=tile < blocks)
    tl.store(out + first + tl.arange(0, 64)[None, :], value, mask=tile < blocks)


@triton.jit(do_not_specialize=["inverse"])
def weight_only_expand(
    words, scales, zeros, table, out, rows, row_tiles, blocks, inverse,
    KIND: tl.constexpr, SCALE: tl.constexpr, TILES_A_GROUP: tl.constexpr, ZEROS: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALED: tl.constexpr, EXPAND: tl.constexpr, EXPAND_REGISTERS: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """The weight, (rows, columns). One program for RT row tiles of one column tile."""
    first = tl.program_id(0) * RT
    tile = tl.minimum(first + tl.arange(0, RT), row_tiles - 1)
    dtype: tl.constexpr = out.dtype.element_ty
    block = tl.program_id(1)
    weight = expand_tile(
        words,
        scales,
        zeros,
        tables(table, blocks, KIND, ASSEMBLY, "", "", 4),
        tile,
        block,
        blocks,
        dtype,
        KIND,
        SCALE,
        TILES_A_GROUP,
        ZEROS,
        ASSEMBLY,
        SCALED,
        EXPAND,
        EXPAND_REGISTERS,
        RT,
        1,
        True,
    )
    row = (first * 16 + tl.arange(0, RT * 16))[:, None]
    if KIND >= BYTES:
        scale = tl.load(scales + row // 16 * 16 + row % 8 * 2 + row % 16 // 8, mask=row < rows, other=0)
        weight = (weight * scale.to(tl.float32)).to(dtype)
    elif ASSEMBLY:
        weight = (weight.to(tl.float32) * inverse).to(dtype)
    column = block * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + row.to(tl.int64) * (blocks * 64) + column, weight, mask=row < rows)
