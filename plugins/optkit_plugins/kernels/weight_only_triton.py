"""The product of a few activations with a packed weight, in Triton with inline PTX (sm_80 and later).

One warp computes 16 rows (times ``R``) by 8 columns (times ``NT``) of the result. Weights go from memory to registers, are expanded there
to 16 bits in just the order that ``mma.m16n8k16`` takes, and are never seen by shared memory. The tensor cores multiply even at batch 1,
where seven of their eight columns are idle: arithmetic per weight is what such a kernel is short of, and they take none.

All tensors of the loop are (threads, 4): one row a thread, so that the elementwise assembly, which holds a warp-wide ``mma``, sees the
thread's own four registers. 4-bit tables are looked up with byte permutes in registers, or in a copy of all pairs of values that every
bank of shared memory has for itself.
"""

# Triton reads the kernels' own annotations.
# mypy: ignore-errors

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

PERMUTE, PAIRS, AFFINE, BYTES = (tl.constexpr(i) for i in range(4))
BF16, FP16, FP32 = (tl.constexpr(i) for i in range(3))


@triton.jit
def load_tiles(
    words,
    scales,
    zeros,
    tile,
    first,
    row_tiles,
    blocks,
    end,
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
def load_activations(x, token, block, batch, blocks, end, t, WK: tl.constexpr, U: tl.constexpr, NT: tl.constexpr, EVEN: tl.constexpr):
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
def copy_activations(
    x, slot, thread, first, block, batch, blocks, end, WK: tl.constexpr, WM: tl.constexpr, NT: tl.constexpr, COPY: tl.constexpr
):
    """Start to copy WK column tiles of NT * 8 activations to shared memory, in the order in which warps read them."""
    for i in tl.static_range(NT * 2 // WM):
        chunk = thread + i * (WK * WM * 32)
        token = first + chunk // 64 % NT * 8 + chunk % 32 // 4
        at = block + chunk // (NT * 64)
        inside = (token < batch) & (at < end)
        source = x + tl.where(inside, token * (blocks * 32) + at * 32 + chunk % 64 // 32 * 16 + chunk % 4 * 4, 0)
        size = tl.where(inside, 16, 0)
        tl.inline_asm_elementwise(COPY, "=r,r,l,r", [slot + chunk * 16, source.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise("cp.async.commit_group; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["batch", "rows", "row_tiles", "blocks", "inverse"])
def weight_only_product(
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
    SLOTS: tl.constexpr,  # steps of activations in shared memory; 0: warps read them from memory
    EXPAND: tl.constexpr,
    EXPAND_REGISTERS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    MULTIPLY_REGISTERS: tl.constexpr,
    MAGIC: tl.constexpr,
    FILL: tl.constexpr,
    FENCE: tl.constexpr,
    COPY: tl.constexpr,
    READ: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    WAIT: tl.constexpr,
    READ_REGISTERS: tl.constexpr,
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
    share = tl.cdiv(blocks, tl.num_programs(2))
    start = tl.program_id(2) * share
    end = tl.minimum(start + share, blocks)
    out += tl.program_id(2) * (batch * rows)
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
            start + ahead * (WK * U) + wk,
            row_tiles,
            blocks,
            end,
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
    if SLOTS:
        tl.static_assert(U == 1 and NT * 2 % WM == 0)
        shelf = tl.inline_asm_elementwise(
            "{ .shared .align 128 .b8 activations[" + SLOT_BYTES + "]; mov.u32 $0, activations; }",
            "=r,r",
            [rows],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        for slot in tl.static_range(SLOTS - 1):
            copy_activations(x, shelf + slot * (WK * NT * 1024), thread, first, start + slot * WK, batch, blocks, end, WK, WM, NT, COPY)
    elif AHEAD:
        activations = load_activations(x, token, start + wk, batch, blocks, end, t, WK, U, NT, EVEN)
    for step in range(start, end, WK * U):
        if SLOTS:
            tl.inline_asm_elementwise(WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
            tl.debug_barrier()
            into = shelf + ((step - start) // WK + SLOTS - 1) % SLOTS * (WK * NT * 1024)
            copy_activations(x, into, thread, first, step + (SLOTS - 1) * WK, batch, blocks, end, WK, WM, NT, COPY)
        if AHEAD:
            next = load_tiles(
                words,
                scales,
                zeros,
                tile,
                step + AHEAD * (WK * U) + wk,
                row_tiles,
                blocks,
                end,
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
            if not SLOTS:
                more_activations = load_activations(x, token, step + WK * U + wk, batch, blocks, end, t, WK, U, NT, False)
            # without a fence the assembler moves the loads down to where they are used
            tl.inline_asm_elementwise(FENCE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        else:
            loaded, grouped, offsets = load_tiles(
                words, scales, zeros, tile, step + wk, row_tiles, blocks, end, lane, KIND, SCALE, TILES_A_GROUP, ZEROS, WK, R, U, EVEN
            )
            if not SLOTS:
                activations = load_activations(x, token, step + wk, batch, blocks, end, t, WK, U, NT, EVEN)
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
                if SLOTS:
                    at = shelf + (step - start) // WK % SLOTS * (WK * NT * 1024) + wk * (NT * 1024) + n * 1024 + lane * 16
                    low, high = tl.inline_asm_elementwise(
                        READ, READ_REGISTERS, [at[:, None], loaded[0]], dtype=(tl.int32, tl.int32), is_pure=False, pack=4
                    )
                else:
                    low = activations[2 * (u * NT + n)]
                    high = activations[2 * (u * NT + n) + 1]
                for r in tl.static_range(R):
                    if KIND == BYTES:
                        total = tl.inline_asm_elementwise(
                            MULTIPLY,
                            MULTIPLY_REGISTERS,
                            [expanded[4 * r], expanded[4 * r + 1], expanded[4 * r + 2], expanded[4 * r + 3], low, high, sums[n * R + r]],
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
            if not SLOTS:
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


product = weight_only_product  # the longer name is what profiles show


# Assembly -----------------------------------------------------------------------------------------------------------------------------
# With pack=4 an operand that is a (threads, 4) tensor is four registers, in order: outputs first.


@lru_cache
def expand_assembly(kind: int, bfloat16: bool) -> tuple[str, str]:
    """From one 16-byte load to the first operands of four products (of two for 8 bits)."""
    if kind == PERMUTE.value:
        return _braced(".reg .b32 n, s, m, ha, hb, la, lb, h, l;", *(_permute(word) for word in range(4))), _registers(16, 4 + 8 * 4)
    if kind == PAIRS.value:
        return _braced(".reg .b32 o;", *(_pairs(word) for word in range(4))), _registers(16, 4 + 4)
    if kind == AFFINE.value:
        return _braced(".reg .b32 s, m, minus;", _minus_one(bfloat16), *(_affine(word, bfloat16) for word in range(4))), _registers(16, 12)
    return _braced(".reg .b32 s, m, o, minus;", _minus_one(bfloat16), *(_bytes(word, bfloat16) for word in range(4))), _registers(8, 4)


def _permute(word: int) -> str:
    w = f"${16 + word}"
    entries = [f"${20 + 4 * i}" for i in range(8)]
    lines = [f"xor.b32 n, {w}, 0x88888888;"]
    for half in range(2):
        selector, negated = (w, "n") if half == 0 else ("s", "m")
        if half:
            lines.append(f"shr.u32 s, {w}, 16; shr.u32 m, n, 16;")
        for name, first in (("h", 0), ("l", 4)):
            lines.append(f"prmt.b32 {name}a, {entries[first]}, {entries[first + 1]}, {selector};")
            lines.append(f"prmt.b32 {name}b, {entries[first + 2]}, {entries[first + 3]}, {negated};")
            lines.append(f"xor.b32 {name}, {name}a, {name}b;")
        lines.append(f"prmt.b32 ${4 * word + half}, l, h, 0x5140; prmt.b32 ${4 * word + 2 + half}, l, h, 0x7362;")
    return "\n".join(lines)


def _pairs(word: int) -> str:
    lines = []
    for byte, register in enumerate((0, 2, 1, 3)):
        lines.append(f"bfe.u32 o, ${16 + word}, {8 * byte}, 8; mad.lo.u32 o, o, 128, $20; ld.shared.b32 ${4 * word + register}, [o];")
    return "\n".join(lines)


def _affine(word: int, bfloat16: bool) -> str:
    magic = magic_bits(bfloat16)
    lines = []
    for register in range(4):
        source = f"${16 + word}"
        if register:
            lines.append(f"shr.u32 s, {source}, {4 * register};")
            source = "s"
        zero = "$20" if register % 2 == 0 else "$24"
        lines.append(f"and.b32 m, {source}, 0x000F000F; or.b32 m, m, {magic:#x};")
        lines.append(f"{_fma(bfloat16)} ${4 * word + register}, {zero}, minus, m;")
    return "\n".join(lines)


def _bytes(word: int, bfloat16: bool) -> str:
    magic = magic_bits(bfloat16)
    lines = []
    for pair in range(2):
        source = f"${8 + word}"
        if pair:
            lines.append(f"shr.u32 s, {source}, 8;")
            source = "s"
        lines.append(f"and.b32 m, {source}, 0x007F007F; or.b32 m, m, {magic:#x};")
        lines.append(f"and.b32 o, {source}, 0x00800080; or.b32 o, o, {magic:#x};")
        lines.append(f"{_fma(bfloat16)} ${4 * (word // 2) + word % 2 + 2 * pair}, o, minus, m;")
    return "\n".join(lines)


@lru_cache
def multiply_assembly(bfloat16: bool, adds: bool) -> tuple[str, str]:
    """Four products of 16 columns each. Operands: four first operands, eight words of activations, and the sum where it ``adds``."""
    kind = "bf16" if bfloat16 else "f16"
    lines = [".reg .f32 zero; mov.f32 zero, 0f00000000;"]
    for step in range(4):
        first = ", ".join(f"${4 + 4 * step + i}" for i in range(4))
        second = f"${20 + 2 * step}, ${21 + 2 * step}"
        total = "$0, $1, $2, $3" if step else ("$28, $29, $30, $31" if adds else "zero, zero, zero, zero")
        lines.append(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{{first}}}, {{{second}}}, {{{total}}};")
    return _braced(*lines), ",".join(["=&f"] * 4 + ["r"] * 24 + ["f"] * (4 if adds else 0))


FENCE = "bar.warp.sync 0xffffffff; mov.u32 $0, 0;"
FILL = "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, $1;"
COPY = "cp.async.cg.shared.global [$1], [$2], 16, $3; mov.u32 $0, 0;"
READ = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$8]; ld.shared.v4.b32 {$4, $5, $6, $7}, [$8 + 512];"
READ_REGISTERS = ",".join(["=&r"] * 8 + ["r"] * 8)  # weights are passed along for their layout alone


def wait_assembly(slots: int) -> str:
    """Until the oldest of the copies under way has arrived."""
    return f"cp.async.wait_group {max(slots - 2, 0)}; mov.u32 $0, 0;"


def magic_bits(bfloat16: bool) -> int:
    """128 in bfloat16 or 1024 in float16, twice: small integers can be put into their lowest bits."""
    return 0x43004300 if bfloat16 else 0x64006400


def _minus_one(bfloat16: bool) -> str:
    return f"mov.b32 minus, {0xBF80BF80 if bfloat16 else 0xBC00BC00:#x};"


def _fma(bfloat16: bool) -> str:
    return "fma.rn.bf16x2" if bfloat16 else "fma.rn.f16x2"


def _braced(*lines: str) -> str:
    return "{\n" + "\n".join(lines) + "\n}"


def _registers(outputs: int, inputs: int) -> str:
    return ",".join(["=&r"] * outputs + ["r"] * inputs)
