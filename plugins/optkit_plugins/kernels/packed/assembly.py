"""PTX for packed weights: from words to pairs of 16-bit values, and the tensor cores' products.

``$0`` and up are an assembly's outputs, then its inputs, 32 bits each. What stands for one word of weights is written once and used by all
kernels: for four words at a time, as one 16-byte load gives them, or for a single one.
"""

from __future__ import annotations

import re
from functools import lru_cache

import triton.language as tl

#: What a word holds: 4-bit labels, looked up with byte permutes, in pairs, or in the pairs that ``SHARED_PAIRS`` made room for; integers of
#: 4 bits; the same plus a power of two; from ``BYTES`` on 8 bits, integers and floats.
PERMUTE, PAIRS, NAMED, AFFINE, BIASED, BYTES, FLOATS = (tl.constexpr(i) for i in range(7))
BF16, FP16, FP32 = (tl.constexpr(i) for i in range(3))

#: ``lop3`` for a & b | c: written as two instructions, it stays two where b and c are constants.
AND_OR = "0xEA"
#: Two products of bfloat16, as a sum with minus zero, which sm_80 can do.
TIMES = "{ .reg .b32 nothing; mov.b32 nothing, 0x80008000; fma.rn.bf16x2 $0, $1, $2, nothing; }"
#: Without braces: what follows in the kernel may name it too.
SHARED_PAIRS = ".shared .align 1024 .b8 pairs[32768]; mov.u32 $0, pairs;"
FILL = "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, $1;"
#: Until the tensor cores have read all registers they were given.
WAIT = "wgmma.wait_group.sync.aligned 0; mov.u32 $0, $1;"


@lru_cache
def expand_assembly(kind: int, bfloat16: bool) -> tuple[str, str]:
    """From one 16-byte load to the first operands of four products (of two for 8 bits)."""
    return _expand(kind, bfloat16, range(4))


@lru_cache
def expand_word_assembly(kind: int, bfloat16: bool, scaled: bool = False) -> tuple[str, str]:
    """From one word to pairs of neighbouring columns: two rows of two pairs each, or two pairs of one row for 8 bits.

    :param scaled: times the two rows' scales, of the values' type and side by side in one more operand. Not for 8 bits.
    """
    text, registers = _expand(kind, bfloat16, range(1), (_scale(f"${20 + 4 * _more(kind)}", bfloat16),) if scaled else ())
    renamed = {2: 1, 8: 2} if kind >= BYTES.value else {16: 4} | {20 + 4 * i: 5 + i for i in range(_more(kind) + 1)}
    text = re.sub(r"\$(\d+)", lambda found: f"${renamed.get(int(found[1]), int(found[1]))}", text)
    return text, registers + ",r" * scaled


def _scale(scales: str, bfloat16: bool) -> str:
    """Registers 0 to 3 times their row's scale: Triton would swap the halves of each, multiply and swap them back."""
    lines = [".reg .b32 even, odd, nothing; mov.b32 nothing, 0x80008000;"]
    lines.append(f"prmt.b32 even, {scales}, {scales}, 0x1010; prmt.b32 odd, {scales}, {scales}, 0x3232;")
    lines += [f"{_fma(bfloat16)} ${register}, ${register}, {('even', 'odd')[register % 2]}, nothing;" for register in range(4)]
    return "\n".join(lines)


def _words(kind: int) -> int:
    """Number of the first register that holds words, where there are four."""
    return 8 if kind >= BYTES.value else 16


def _more(kind: int) -> int:
    """Operands beside the words."""
    return {PERMUTE.value: 8, PAIRS.value: 1, NAMED.value: 1, AFFINE.value: 2}.get(kind, 0)


def _expand(kind: int, bfloat16: bool, words: range, after: tuple[str, ...] = ()) -> tuple[str, str]:
    write = (_permute, _pairs, _named, _affine, _biased, _bytes, _floats)[kind]
    head = ".reg .b32 n, s, m, o, ha, hb, la, lb, h, l, minus, magic; "
    head += f"mov.b32 minus, {0xBF80BF80 if bfloat16 else 0xBC00BC00:#x}; mov.b32 magic, {magic_bits(bfloat16):#x};"
    if kind == FLOATS.value:
        head = ".reg .b32 s, m, o, power, nothing; "
        head += f"mov.b32 power, {0x7B807B80 if bfloat16 else 0x5C005C00:#x}; mov.b32 nothing, 0x80008000;"
    count = len(words)
    operands = count + (4 if count == 4 else 1) * _more(kind)
    registers = ["=&r"] * (_words(kind) * count // 4) + ["r"] * operands
    return braced(head, *(write(word, bfloat16) for word in words), *after), ",".join(registers)


def _permute(word: int, bfloat16: bool) -> str:
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


def _pairs(word: int, bfloat16: bool) -> str:
    lines = []
    for byte, register in enumerate((0, 2, 1, 3)):
        lines.append(f"bfe.u32 o, ${16 + word}, {8 * byte}, 8; mad.lo.u32 o, o, 128, $20; ld.shared.b32 ${4 * word + register}, [o];")
    return "\n".join(lines)


def _named(word: int, bfloat16: bool) -> str:
    """As ``_pairs``, with four times the lane instead of an address."""
    return "mov.u32 s, pairs;\n" + _pairs(word, bfloat16).replace("ld.shared", "add.u32 o, o, s; ld.shared")


def _affine(word: int, bfloat16: bool) -> str:
    lines = []
    for register in range(4):
        zero = "$20" if register % 2 == 0 else "$24"
        lines.append(_plus_magic(word, register, "m"))
        lines.append(f"{_fma(bfloat16)} ${4 * word + register}, {zero}, minus, m;")
    return "\n".join(lines)


def _biased(word: int, bfloat16: bool) -> str:
    return "\n".join(_plus_magic(word, register, f"${4 * word + register}") for register in range(4))


def _plus_magic(word: int, register: int, target: str) -> str:
    """Two integers of 4 bits, each plus 128 or 1024: that power's bits with the integer in the lowest."""
    source, shift = f"${16 + word}", ""
    if register:
        source, shift = "s", f"shr.u32 s, {source}, {4 * register}; "
    return f"{shift}lop3.b32 {target}, {source}, 0x000F000F, magic, {AND_OR};"


def _bytes(word: int, bfloat16: bool) -> str:
    lines = []
    for pair in range(2):
        source = f"${8 + word}"
        if pair:
            lines.append(f"shr.u32 s, {source}, 8;")
            source = "s"
        lines.append(f"lop3.b32 m, {source}, 0x007F007F, magic, {AND_OR}; lop3.b32 o, {source}, 0x00800080, magic, {AND_OR};")
        lines.append(f"{_fma(bfloat16)} ${4 * (word // 2) + word % 2 + 2 * pair}, o, minus, m;")
    return "\n".join(lines)


def _floats(word: int, bfloat16: bool) -> str:
    """Floats with 4 bits of exponent and 3 of mantissa: sign and the other 7 bits go to their places among 16, and the number that they are
    there is 2^(127 - 7) times too small in bfloat16, 2^(15 - 7) in float16. Exact, subnormal values included.
    """
    mask, right = (0x07F007F0, 4) if bfloat16 else (0x3F803F80, 1)
    lines = []
    for pair in range(2):
        source = f"${8 + word}"
        if pair:
            lines.append(f"shr.u32 m, {source}, {right};")
        else:
            lines.append(f"shl.b32 s, {source}, 8; shl.b32 m, {source}, {8 - right};")
        lines.append(f"and.b32 o, m, {mask:#x}; lop3.b32 m, {source if pair else 's'}, 0x80008000, o, {AND_OR};")
        lines.append(f"{_fma(bfloat16)} ${4 * (word // 2) + word % 2 + 2 * pair}, m, power, nothing;")
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
    return braced(*lines), ",".join(["=&f"] * 4 + ["r"] * 24 + ["f"] * (4 if adds else 0))


def magic_bits(bfloat16: bool) -> int:
    """128 in bfloat16 or 1024 in float16, twice: small integers can be put into their lowest bits."""
    return 0x43004300 if bfloat16 else 0x64006400


def magic(bfloat16: bool) -> int:
    return 128 if bfloat16 else 1024


def one_bits(bfloat16: bool) -> int:
    """1, twice."""
    return 0x3F803F80 if bfloat16 else 0x3C003C00


def _fma(bfloat16: bool) -> str:
    return "fma.rn.bf16x2" if bfloat16 else "fma.rn.f16x2"


def braced(*lines: str) -> str:
    return "{\n" + "\n".join(lines) + "\n}"
