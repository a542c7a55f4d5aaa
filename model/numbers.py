"""Numbers as people write them: 1,000 / 1.000 / mil / 3k / twenty-five / a dozen.

Rule that makes them unambiguous: three digits after a separator are thousands, one or two are decimals.
"""

# ruff: noqa: SIM905 - words in a row read better than a list literal
from __future__ import annotations

from random import Random

SPANISH_ONES = (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete "
    "dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete "
    "veintiocho veintinueve"
).split()
SPANISH_TENS = "_ _ _ treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()
SPANISH_HUNDREDS = ("_ ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos").split()
ENGLISH_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
ENGLISH_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def spell(value: int, language: str) -> str:
    """``value`` (1 to 999) in words."""
    return _spell_spanish(value) if language == "es" else _spell_english(value)


def _spell_spanish(value: int) -> str:
    if value == 100:
        return "cien"
    hundreds, rest = divmod(value, 100)
    words = [SPANISH_HUNDREDS[hundreds]] if hundreds else []
    if rest >= 30:
        tens, ones = divmod(rest, 10)
        words += [SPANISH_TENS[tens], *(("y", SPANISH_ONES[ones]) if ones else ())]
    elif rest:
        words.append(SPANISH_ONES[rest])
    return " ".join(words)


def _spell_english(value: int) -> str:
    hundreds, rest = divmod(value, 100)
    words = [ENGLISH_ONES[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        tens, ones = divmod(rest, 10)
        words.append(ENGLISH_TENS[tens] + ("-" + ENGLISH_ONES[ones] if ones else ""))
    elif rest:
        words.append(ENGLISH_ONES[rest])
    return " ".join(words)


def _whole(rng: Random) -> int:
    """A whole number whose number of digits is what varies most."""
    draw = rng.random()
    if draw < 0.3:
        return rng.randint(1, 9) * rng.choice((1, 10, 100))
    return rng.randint(1, 9) if draw < 0.35 else rng.randint(10, 99) if draw < 0.65 else rng.randint(100, 9999)


def _thousands(rng: Random) -> int:
    return rng.randint(1, 99) * 1000 if rng.random() < 0.4 else rng.randint(1000, 99999)


def _cents(rng: Random) -> int:
    return rng.choice((25, 50, 50, 75, 90, 95, 99, rng.randint(1, 99)))


def draw_number(rng: Random, style: str, language: str) -> tuple[str, int | float]:
    """A number written in ``style`` and its value. Styles: the keys of ``NUMBER_STYLES``."""
    if style == "plain":
        value = _whole(rng)
        return str(value), value
    if style in ("comma", "dot"):
        value = _thousands(rng)
        return f"{value:,}".replace(",", "," if style == "comma" else "."), value
    if style in ("k", "thousand"):
        count = rng.randint(1, 60)
        word = {"k": "k", "es": " mil", "en": " thousand"}[style if style == "k" else language]
        return f"{count}{word}", count * 1000
    if style in ("words", "hundreds"):
        value = rng.randint(2, 99) if style == "words" else rng.randint(1, 9) * 100 + rng.choice((0, 0, 10, 20, 50, 25))
        return spell(value, language), value
    if style in ("decimal-dot", "decimal-comma"):
        whole, cents = rng.randint(1, rng.choice((9, 99, 999))), _cents(rng)
        return f"{whole}{'.' if style == 'decimal-dot' else ','}{cents:02d}", float(f"{whole}.{cents:02d}")
    if style == "point-zero":
        value = rng.randint(1, rng.choice((9, 99, 999)))
        return f"{value}.00", value
    raise ValueError(f"unknown number style {style!r}")


QUANTITY_STYLES = ("plain",) * 8 + ("comma", "dot", "k", "thousand", "words", "words", "hundreds", "phrase", "phrase")
PRICE_STYLES = ("plain",) * 7 + (
    "comma", "dot", "thousand", "words", "words", "hundreds", "decimal-dot", "decimal-comma", "point-zero",
)  # fmt: skip
