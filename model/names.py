"""Random product names, in families; one part of letter space is kept for the test of new names.

Ordered letter pairs are split once and for all: about one in six (``held_out_pair``) never occurs in a training name,
in either case. Every letter group of a held-out name has such pairs, so no held-out name, and no letter group of
one, can be a training name. Held-out names also use two shapes that training never shows (CamelCase, joined words).
"""

# ruff: noqa: SIM905 - words in a row read better than a list literal
from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from random import Random

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ONSETS = "b c d f g h j k l m n p r s t v w x y z br cr dr tr fl gl pl sk st ch sh th qu".split()
NUCLEI = "a e i o u a e i o u ai ea ia io oa ue".split()
CODAS = ["", "", "", "", "", "b", "d", "k", "l", "m", "n", "r", "s", "t", "x", "z", "nd", "rt", "lk"]
DIGITS = "0123456789"


@cache
def held_out_pair(pair: str) -> bool:
    """True for a letter pair (any case) that no training name may contain."""
    return zlib.crc32(b"pair:" + pair.lower().encode()) % 6 == 0


def held_out_pairs(name: str) -> list[str]:
    """The held-out letter pairs inside ``name``."""
    pairs = [name[i : i + 2] for i in range(len(name) - 1)]
    return [pair for pair in pairs if pair.isalpha() and held_out_pair(pair)]


def letter_groups(name: str) -> list[str]:
    """Maximal runs of letters: ``"Kavo-20x"`` gives ``["Kavo", "x"]``."""
    return "".join(c if c.isalpha() else " " for c in name).split()


def _syllables(rng: Random) -> str:
    parts: list[str] = []
    for _ in range(rng.choice((2, 2, 2, 3, 3, 4))):
        parts += (rng.choice(ONSETS), rng.choice(NUCLEI))
    return "".join(parts) + rng.choice(CODAS)


def _letters(rng: Random, low: int, high: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(low, high)))


def _digits(rng: Random, low: int, high: int) -> str:
    return "".join(rng.choice(DIGITS) for _ in range(rng.randint(low, high)))


def _cased(rng: Random, word: str) -> str:
    draw = rng.random()
    return word.capitalize() if draw < 0.5 else word if draw < 0.82 else word.upper()


def _allowed(rng: Random, make: Callable[[Random], str], held_out: bool, wanted: int = 1) -> str:
    """Draw letter groups until one is on the asked side of the split."""
    while True:
        word = make(rng)
        found = len(held_out_pairs(word))
        if (found >= wanted) if held_out else (found == 0):
            return word


def _word(rng: Random, held_out: bool) -> str:
    return _cased(rng, _allowed(rng, _syllables, held_out, wanted=2))


def _scramble(rng: Random, held_out: bool) -> str:
    """Letters without syllables, as in ``xqvbn``."""
    return _cased(rng, _allowed(rng, lambda r: _letters(r, 3, 6), held_out))


def _code(rng: Random, held_out: bool) -> str:
    group = _allowed(rng, lambda r: _letters(r, 2, 3), held_out).upper()
    number = _digits(rng, 1, 4)
    shape = rng.choice(("{g}-{n}", "{g}{n}", "{n}{g}", "{n}-{g}", "{g}_{n}", "{g}/{n}", "{g}-{n}{g2}"))
    return shape.format(g=group, n=number, g2=group[0])


def _word_and_mark(rng: Random, held_out: bool) -> str:
    shape = rng.choice(("{w}-{n}", "{w} {n}", "{w}{n}", "{w} {l}", "{w}-{l}", "{w} {l}{n}", "{n}-{w}"))
    return shape.format(w=_word(rng, held_out), n=_digits(rng, 1, 3), l=rng.choice(LETTERS).upper())


def _two_words(rng: Random, held_out: bool) -> str:
    return _word(rng, held_out) + " " + _word(rng, held_out)


def _mixture(rng: Random, held_out: bool) -> str:
    """Letters and digits by turns, as in ``k4w9``; a held-out one starts with a held-out letter pair."""
    head = _allowed(rng, lambda r: _letters(r, 2, 2), True) if held_out else rng.choice(LETTERS)
    tail = "".join(rng.choice(DIGITS) + rng.choice(LETTERS) for _ in range(rng.randint(1, 3)))
    name = head + tail
    return name.upper() if rng.random() < 0.4 else name


def _camel(rng: Random, held_out: bool) -> str:
    return "".join(_allowed(rng, _syllables, held_out)[:5].capitalize() for _ in range(2))


def _joined(rng: Random, held_out: bool) -> str:
    return _word(rng, held_out) + "-" + _word(rng, held_out)


TRAINING_FAMILIES = (_word, _word, _word, _scramble, _code, _code, _word_and_mark, _two_words, _mixture)
HELD_OUT_FAMILIES = (*TRAINING_FAMILIES, _camel, _joined)


def product_name(rng: Random, held_out: bool = False) -> str:
    """A name of 3 to 16 characters; it starts and ends with a letter or digit and has at least one letter."""
    while True:
        name = rng.choice(HELD_OUT_FAMILIES if held_out else TRAINING_FAMILIES)(rng, held_out)
        groups = [group for group in letter_groups(name) if len(group) > 1]
        if len(name) <= 16 and (not held_out or (groups and all(held_out_pairs(group) for group in groups))):
            return name


def single_letter(rng: Random) -> str:
    """The name of "product A"; only used after a noun that announces it."""
    return rng.choice(LETTERS).upper()


def person(rng: Random) -> str:
    """A given name to be ignored: greetings and signatures hold names that are no products."""
    return _allowed(rng, _syllables, False)[:8].capitalize()
