"""The fused kernel's assembly, run on a CPU: the few PTX instructions it uses, on numpy arrays of one value a thread."""

from __future__ import annotations

import re

import numpy as np

U32 = np.uint32


def run(assembly: tuple[str, str], inputs: list[np.ndarray], shared: np.ndarray | None = None) -> list[np.ndarray]:
    """Outputs of ``(text, registers)`` for inputs of shape (threads,), 32 bits each."""
    text, registers = assembly
    outputs = sum("=" in register for register in registers.split(","))
    values: dict[str, np.ndarray] = {f"${outputs + i}": value.astype(U32) for i, value in enumerate(inputs)}

    def read(name: str) -> np.ndarray:
        if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", name):
            return np.full_like(values[f"${outputs}"], int(name, 0))
        return values[name]

    for statement in (part.strip() for part in text.strip("{}\n ").split(";")):
        if not statement or statement.startswith(".reg"):
            continue
        name, rest = statement.split(None, 1)
        target, *sources = (operand.strip().strip("[]") for operand in rest.split(","))
        values[target] = INSTRUCTIONS[name](*(read(source) for source in sources), **({"shared": shared} if "shared" in name else {}))
    return [values[f"${i}"] for i in range(outputs)]


def prmt(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    pool = np.stack([word >> U32(8 * i) & U32(255) for word in (low, high) for i in range(4)])
    result = np.zeros_like(low)
    for i in range(4):
        nibble = selector >> U32(4 * i) & U32(15)
        byte = np.take_along_axis(pool, (nibble & U32(7)).astype(np.int64)[None], 0)[0]
        byte = np.where(nibble >= 8, np.where(byte >= 128, U32(255), U32(0)), byte)
        result |= byte.astype(U32) << U32(8 * i)
    return result


def halves(word: np.ndarray, bfloat16: bool) -> tuple[np.ndarray, np.ndarray]:
    """A register as two numbers, the low half first, in float64."""
    low, high = (word & U32(0xFFFF)).astype(U32), word >> U32(16)
    if bfloat16:
        return (low << U32(16)).view(np.float32).astype(np.float64), (high << U32(16)).view(np.float32).astype(np.float64)
    return low.astype(np.uint16).view(np.float16).astype(np.float64), high.astype(np.uint16).view(np.float16).astype(np.float64)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray, bfloat16: bool) -> np.ndarray:
    """``a * b + c`` on pairs; the kernel's results are small integers, exact in 16 bits."""
    words = []
    for x, y, z in zip(halves(a, bfloat16), halves(b, bfloat16), halves(c, bfloat16), strict=True):
        if bfloat16:
            word = (x * y + z).astype(np.float32).view(U32)
            assert not (word & U32(0xFFFF)).any()
            words.append(word >> U32(16))
        else:
            words.append((x * y + z).astype(np.float16).view(np.uint16).astype(U32))
    return words[0] | words[1] << U32(16)


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "lop3.b32": lambda a, b, c, table: (a & b) | c,  # the one table in use, 0xEA
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "bfe.u32": lambda a, first, length: a >> first & ((U32(1) << length) - U32(1)),
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": prmt,
    "ld.shared.b32": lambda address, shared: shared[address // 4],
    "fma.rn.bf16x2": lambda a, b, c: fused(a, b, c, True),
    "fma.rn.f16x2": lambda a, b, c: fused(a, b, c, False),
}


def mma(first: list[np.ndarray], second: list[np.ndarray], bfloat16: bool) -> np.ndarray:
    """``mma.m16n8k16``: (16, 8) from four and two registers of 32 threads, by the PTX manual's fragment layout, in float64."""
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i, word in enumerate(first):
            for half, value in enumerate(halves(word[lane : lane + 1], bfloat16)):
                a[group + 8 * (i % 2), 2 * member + half + 8 * (i // 2)] = value[0]
        for i, word in enumerate(second):
            for half, value in enumerate(halves(word[lane : lane + 1], bfloat16)):
                b[2 * member + half + 8 * i, group] = value[0]
    return a @ b
