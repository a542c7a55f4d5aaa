"""Values of the 4-bit formats that are tables (NF4, FP4), and labels by which byte permutes look them up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch

#: Values of the 16 codes, as bitsandbytes has them (QLoRA, arXiv:2305.14314, appendix E; FP4 is sign, 2 bits of exponent, 1 of mantissa).
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4, 0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4),
}


@dataclass(frozen=True)
class Lookup:
    """What the kernel needs to look labels up with byte permutes.

    ``prmt`` takes 4 selectors of 4 bits: the low three choose one of eight bytes, the fourth replaces the byte by its sign bit, repeated.
    So a byte of the 16-entry table is ``a[label] ^ b[label ^ 8]``, where each term is either an entry or a known 00 or FF, provided that
    entries eight labels apart have equal top bits, in the high and in the low byte of the 16-bit value: that is what labels are for.

    :ivar words: ``a`` and ``b`` for the high bytes, then for the low bytes, two words each.
    :ivar pairs: 16-bit values of label ``i & 15`` (low half) and ``i >> 4`` (high half), for i of 256.
    :ivar factor: the values are stored times this. It makes the top bits agree and keeps the rounding to 16 bits small.
    """

    words: tuple[int, ...]
    pairs: tuple[int, ...]
    factor: float


#: Factors to try, and how far a value may be off in 16 bits: half of what rounding to bfloat16 may cost.
FACTORS = 1024
BOUND = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


@lru_cache
def labels(format: str) -> tuple[int, ...]:
    """Label -> code, such that codes eight labels apart have equal top bits in both 16-bit types."""
    return _tables(format)[0]


@lru_cache
def lookup_table(format: str, dtype: torch.dtype) -> Lookup:
    """:param dtype: bfloat16 or float16, the activations' dtype."""
    order, chosen = _tables(format)
    factor, by_code = chosen[dtype]
    bits = [by_code[code] for code in order]
    words: list[int] = []
    for shift in (8, 0):
        plane = [value >> shift & 0xFF for value in bits]
        # where the top bits are set, the term for a label of 8 and more meets an FF: its entries are stored inverted
        for entries in (plane[:8], [byte ^ 0xFF if byte & 0x80 else byte for byte in plane[8:]]):
            words += [sum(entries[first + i] << 8 * i for i in range(4)) for first in (0, 4)]
    pairs = tuple(bits[i & 15] | bits[i >> 4] << 16 for i in range(256))
    return Lookup(tuple(words), pairs, factor)


@lru_cache
def _tables(format: str) -> tuple[tuple[int, ...], dict[torch.dtype, tuple[float, list[int]]]]:
    """Labels, and by dtype the factor and the values' bits by code.

    The best factor for bfloat16 that allows labels at all, and of its labels those with the best factor for float16.
    """
    half = _candidates(format, torch.float16)
    for error, factor, bits in _candidates(format, torch.bfloat16):
        best: tuple[Any, ...] = ()
        for pairs in _all_pairs(bits):
            fits = next((c for c in half if all(_top_bits(c[2][a]) == _top_bits(c[2][b]) for a, b in pairs)), None)
            if fits is not None and (not best or fits[0] < best[0]):
                best = (fits[0], fits[1], fits[2], pairs)
        if best and best[0] <= BOUND[torch.float16] and error <= BOUND[torch.bfloat16]:
            order = tuple(a for a, _ in best[3]) + tuple(b for _, b in best[3])
            return order, {torch.bfloat16: (factor, bits), torch.float16: (best[1], best[2])}
    raise AssertionError(f"{format}: no labels suit the byte permutes")


def _candidates(format: str, dtype: torch.dtype) -> list[tuple[float, float, list[int]]]:
    """(largest relative error, factor, bits by code) for all factors and both signs of the first zero, the most exact first."""
    exact = torch.tensor(TABLES[format], dtype=torch.float64) * (1 + torch.arange(FACTORS, dtype=torch.float64) / FACTORS)[:, None]
    rounded = exact.to(dtype)
    errors = ((rounded.double() - exact) / exact).nan_to_num().abs().amax(1).tolist()
    bits = (rounded.view(torch.int16).int() & 0xFFFF).tolist()
    zero = TABLES[format].index(0.0)
    found = []
    for step, error in enumerate(errors):
        for sign in (0, 0x8000):
            signed = list(bits[step])
            signed[zero] = sign
            found.append((error, 1 + step / FACTORS, signed))
    return sorted(found, key=lambda candidate: candidate[0])


def _top_bits(bits: int) -> tuple[int, int]:
    return bits >> 15, bits >> 7 & 1


def _all_pairs(bits: list[int]) -> Iterator[list[tuple[int, int]]]:
    """All ways to pair the 16 codes by equal top bits; none where a class has an odd number."""
    classes: dict[tuple[int, int], list[int]] = {}
    for code, value in enumerate(bits):
        classes.setdefault(_top_bits(value), []).append(code)
    if any(len(codes) % 2 for codes in classes.values()):
        return
    for chosen in product(*(list(_pair_up(codes))[:15] for codes in classes.values())):
        yield [pair for pairs in chosen for pair in pairs]


def _pair_up(codes: list[int]) -> Iterator[list[tuple[int, int]]]:
    if not codes:
        yield []
        return
    for partner in codes[1:]:
        for others in _pair_up([code for code in codes[1:] if code != partner]):
            yield [(codes[0], partner), *others]
