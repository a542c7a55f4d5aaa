"""Canonical JSON: one text for one value, so that the text's SHA-256 can name the value and vouch for it.

Keys are sorted, there are no spaces, all is ASCII, and nothing is written that JSON does not know: no NaN, no infinity, no key that is
no string. ``1``, ``1.0`` and ``true`` are three texts; a tuple is written as a list. Floats are Python's shortest exact form, so that a
number that is read back is the number that was written.
"""

from __future__ import annotations

import hashlib
import json
from math import isfinite
from typing import Any

MAX_DEPTH = 100
"""Levels of nesting, far below the interpreter's recursion limit, so that what was written can always be read."""


class NotCanonical(ValueError):
    """A value that canonical JSON cannot hold. The message names the place: ``metrics.perplexity is nan``."""


def canonical_json(value: Any) -> str:
    """The one JSON text of ``value``; ``NotCanonical`` where it has none."""
    fault = _fault(value, 0)
    if fault is not None:
        reason, *place = fault
        raise NotCanonical(f"{''.join(reversed(place)).lstrip('.') or 'the value'} {reason}")
    try:
        return _ENCODER.encode(value)
    except ValueError as error:  # an integer of more digits than Python is willing to print
        raise NotCanonical(f"the value cannot be written: {error}") from None


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, as 64 hexadecimal digits."""
    return sha256_hex(canonical_json(value).encode("ascii"))


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parse(text: str | bytes) -> Any:
    """What canonical JSON says; ``ValueError`` for whatever is none (NaN and too deep nesting are none)."""
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode("ascii"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_foreign(text: str, *, finite: bool = True) -> Any:
    """JSON that somebody else wrote; ``ValueError``, in one line, for what readers understand differently or cannot bear.

    That is NaN, a key twice, numbers of thousands of digits, nesting beyond ``MAX_DEPTH``, and half a surrogate pair.

    :param finite: without it the words NaN and Infinity are ``None``: some model configurations hold them.
    """
    try:
        value = (_FOREIGN if finite else _CONFIGURATION).decode(text)
        if (fault := _fault(value, 0)) is not None:
            raise ValueError(fault[0])
        if "\\u" in text:  # the only way to half a pair: text itself was decoded
            _ENCODER_OF_TEXT.encode(value).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a surrogate pair (\\u{ord(error.object[error.start]):04x})") from None
    except ValueError as error:
        words = " ".join(str(error).split())
        raise ValueError(words.partition(";")[0][:160]) from None  # Python's advice on digits is not for users
    return value


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"has the key {twin[:60]!r} twice")
    return value


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_ENCODER_OF_TEXT = json.JSONEncoder(ensure_ascii=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_FOREIGN = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_without_twins)
_CONFIGURATION = json.JSONDecoder(parse_constant=lambda word: None, object_pairs_hook=_without_twins)


def _fault(value: Any, depth: int) -> list[str] | None:
    """Why ``value`` has no canonical text: the reason, then the steps to its place from the innermost to the outermost."""
    if value is None or isinstance(value, (str, int)):
        return None
    if isinstance(value, float):
        return None if isfinite(value) else [f"is {float(value)}"]
    if not isinstance(value, (dict, list, tuple)):
        return [f"is of type {type(value).__name__}, which JSON does not have"]
    if depth == MAX_DEPTH:
        return [f"is nested deeper than {MAX_DEPTH} levels"]
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                return [f"has the key {key!r}, which is no string"]
            if (fault := _fault(inner, depth + 1)) is not None:
                return [*fault, f".{key}"]
        return None
    for index, inner in enumerate(value):
        if (fault := _fault(inner, depth + 1)) is not None:
            return [*fault, f"[{index}]"]
    return None
