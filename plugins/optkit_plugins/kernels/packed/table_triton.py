"""What the kernels of one and of a few activations share: where they look 4-bit values up, in registers of every lane or in shared memory,
and how words become operands."""

# Triton reads the kernels' own annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from optkit_plugins.kernels.packed.assembly import BYTES


@triton.jit
def load_permuted(table, lane):
    """The words of byte permutes.

    Every lane has its own copy: what is equal in all lanes is kept in uniform registers and fetched anew for each use.
    """
    words = ()
    for word in tl.static_range(8):
        words = words + (tl.load(table + word * 32 + lane)[:, None],)
    return words


@triton.jit
def load_pairs(table, thread, THREADS: tl.constexpr):
    """The pairs that each thread is to put into shared memory: 256 in all."""
    pairs = ()
    for round in tl.static_range(256 // THREADS if THREADS < 256 else 1):
        pairs = pairs + (tl.load(table + (thread + round * THREADS) % 256),)
    return pairs


@triton.jit
def fill_pairs(pairs, thread, number, THREADS: tl.constexpr, FILL: tl.constexpr):
    """256 pairs, each in all 32 banks: a thread reads its own bank's copy and never meets another. Returns where that begins.

    :param number: any that the compiler does not know.
    """
    base = tl.inline_asm_elementwise(
        "{ .shared .align 128 .b8 pairs[32768]; mov.u32 $0, pairs; }", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
    )
    for round in tl.static_range(256 // THREADS if THREADS < 256 else 1):
        entry = (thread + round * THREADS) % 256
        for chunk in tl.static_range(8):
            where = base + entry * 128 + (entry + chunk) % 8 * 16
            tl.inline_asm_elementwise(FILL, "=r,r,r", [where, pairs[round]], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    base = tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [base + thread % 32 * 4], dtype=tl.int32, is_pure=False, pack=1)
    return base[:, None]


@triton.jit
def expand(loaded, at: tl.constexpr, more, KIND: tl.constexpr, EXPAND: tl.constexpr, EXPAND_REGISTERS: tl.constexpr):
    """The first operands of a tile's four products: that of the words ``at``, which 8 bits have twice as many of."""
    if KIND == BYTES:
        expanded = ()
        for half in tl.static_range(2):
            expanded = expanded + tl.inline_asm_elementwise(
                EXPAND, EXPAND_REGISTERS, [loaded[2 * at + half]], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
            )
    else:
        expanded = tl.inline_asm_elementwise(
            EXPAND,
            EXPAND_REGISTERS,
            (loaded[at],) + more,
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=4,
        )
    return expanded
