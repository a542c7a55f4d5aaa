"""Text for people: numbers with units, and strings of foreign origin made harmless."""

from __future__ import annotations

import time
import unicodedata


def clean(text: object, limit: int = 2000) -> str:
    """Text without control, format and bidirectional characters: a model's output must not drive the terminal."""
    kept = ("\n" if char == "\n" else char for char in str(text)[: limit * 2] if char == "\n" or unicodedata.category(char)[0] != "C")
    joined = "".join(kept)
    return joined if len(joined) <= limit else joined[: limit - 1] + "…"


def markup_safe(text: object, limit: int = 2000) -> str:
    """``clean`` text whose brackets Rich does not read as markup."""
    from rich.markup import escape

    return escape(clean(text, limit))


def megabytes(size: float | None) -> str:
    if not size:
        return "–"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, thousands with separators."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}" if abs(value) >= 0.5 * 10**-digits else "±0"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def age(moment: float, now: float | None = None) -> str:
    """``"3 minutes"`` since a unix time."""
    seconds = max(0.0, (now or time.time()) - moment)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{seconds:.0f} s"
