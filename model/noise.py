"""What people do to text: case, lost accents, slips of the keys. Names and numbers (``shield``) stay as they are."""

from __future__ import annotations

import re
from random import Random

OPEN, CLOSE = "\x02", "\x03"
_SHIELDED = re.compile(f"({OPEN}[^{CLOSE}]*{CLOSE})")
_LONG_WORD = re.compile(r"[^\W\d_]{5,}")
_NO_ACCENTS = str.maketrans("áéíóúüñÁÉÍÓÚÜÑ", "aeiouunAEIOUUN")


def shield(text: str) -> str:
    """Mark ``text`` as something that noise must not touch."""
    return f"{OPEN}{text}{CLOSE}"


def _slip(rng: Random, word: str) -> str:
    """One slip inside a word: two letters swapped, one lost, or one doubled. The first letter stays."""
    i = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return word[:i] + word[i + 1 :] if kind == 1 else word[: i + 1] + word[i:]


def _slip_somewhere(rng: Random, text: str) -> str:
    words = list(_LONG_WORD.finditer(text))
    if not words:
        return text
    word = rng.choice(words)
    return text[: word.start()] + _slip(rng, word.group()) + text[word.end() :]


def _sentence_case(text: str) -> str:
    first = next((i for i, c in enumerate(text) if c.isalpha()), None)
    return text if first is None else text[:first] + text[first].upper() + text[first + 1 :]


def add_noise(rng: Random, text: str) -> str:
    """``text`` with shields -> text as typed, without shields."""
    parts = _SHIELDED.split(text)  # odd places are shielded
    case, plain = rng.random(), rng.random() < 0.3
    for i in range(0, len(parts), 2):
        if case < 0.25:
            parts[i] = parts[i].lower()
        elif case < 0.27:
            parts[i] = parts[i].upper()
        if plain:
            parts[i] = parts[i].translate(_NO_ACCENTS)
    if case >= 0.35:
        parts[0] = _sentence_case(parts[0])
    if rng.random() < 0.12:
        i = rng.randrange(0, len(parts), 2)
        parts[i] = _slip_somewhere(rng, parts[i])
    if rng.random() < 0.03:
        parts[-1] = parts[-1].replace(",", "").rstrip(".")
    typed = "".join(part[1:-1] if i % 2 else part for i, part in enumerate(parts))
    return typed.replace(" ", "  ", 1) if rng.random() < 0.02 else typed
