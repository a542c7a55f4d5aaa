"""One entry of the memo: its name, its bytes, and what makes it fit.

One file holds one result, in two lines::

    <SHA-256 of the next line>
    {"key":{"name":...,"spec":...},"schema":1,"seconds":...,"time":...,"value":...}

The second line is canonical JSON and has no end of line.
"""

from __future__ import annotations

import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from optkit.canonical import canonical_json, parse, sha256_hex

SCHEMA = 1
LEVEL = re.compile(r"[a-z][a-z0-9-]{0,39}")


class Hit(NamedTuple):
    """A result that was found. ``time`` is when it was computed (unix seconds), ``seconds`` how long that took."""

    value: Any
    time: float
    path: Path
    seconds: float


class Origin(NamedTuple):
    """Where a result comes from. ``seconds`` is what computing it took: spent now, or saved; ``time`` is when (unix seconds)."""

    source: Literal["memo", "computed"]
    seconds: float
    time: float


class Key(NamedTuple):
    """What an entry is found by.

    :ivar spec: canonical JSON of the spec.
    :ivar text: canonical JSON of name and spec, as the entry holds it.
    :ivar path: where the entry lies; the digest in its name covers the schema too.
    :ivar lock: the file that whoever computes it holds.
    """

    spec: str
    text: str
    path: str
    lock: str

    @classmethod
    def of(cls, folder: Path, name: str, spec: dict[str, Any]) -> Key:
        """``NotCanonical`` if the spec is no JSON."""
        if not LEVEL.fullmatch(name):
            raise ValueError(f"a memo level is lower-case letters, digits and dashes, at most 40, not {name!r}")
        spec_text = canonical_json(spec)
        text = f'{{"name":"{name}","spec":{spec_text}}}'
        stem = f"{folder}/{name}-{sha256_hex(f'{SCHEMA} {text}'.encode('ascii'))}"
        return cls(spec_text, text, f"{stem}.json", f"{stem}.lock")


class Unfit(ValueError):
    """What lies at an entry's path is not that entry. The message is the reason."""


class ForeignSchema(Unfit):
    """An entry of another schema: a miss here, but good for the optkit that wrote it, and therefore kept."""


def pack(key: Key, value: str, origin: Origin) -> bytes:
    """The bytes of an entry. ``value`` is canonical JSON, and so is the whole: its names are in order."""
    seconds, when = canonical_json(origin.seconds), canonical_json(origin.time)
    body = f'{{"key":{key.text},"schema":{SCHEMA},"seconds":{seconds},"time":{when},"value":{value}}}'.encode("ascii")
    return sha256_hex(body).encode("ascii") + b"\n" + body


def unpack(data: bytes, key: Key) -> dict[str, Any]:
    """The entry in ``data`` if it is whole and belongs to ``key``, else ``Unfit``."""
    body = data[65:]
    if data[:65] != sha256_hex(body).encode("ascii") + b"\n":
        raise Unfit("it is damaged or cut short (its digest does not fit)")
    try:
        entry = parse(body)
    except ValueError as error:
        raise Unfit(f"it is no JSON ({error})") from None
    if not isinstance(entry, dict) or type(entry.get("schema")) is not int:
        raise Unfit("it is no entry of a memo")
    if entry["schema"] != SCHEMA:
        raise ForeignSchema(f"its schema is {entry['schema']}, this optkit reads {SCHEMA}")
    # Bytes are compared, not values: to Python, 1, 1.0 and True are equal.
    if not body.startswith(f'{{"key":{key.text},"schema":{SCHEMA},'.encode("ascii")):
        raise Unfit("it belongs to another key")
    if "value" not in entry or type(entry.get("time")) is not float or type(entry.get("seconds")) is not float:
        raise Unfit("it lacks its value, its time or its seconds")
    return entry


def load(key: Key, size_limit_bytes: int) -> Hit:
    """The entry of ``key``, marked as used; ``Unfit`` or ``OSError`` if it is not there. Follows no link, waits for no pipe."""
    handle = os.open(key.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb", buffering=0) as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise Unfit("it is no plain file")
        if status.st_size > size_limit_bytes:
            raise Unfit(f"its {status.st_size} bytes are more than the cache's limit of {size_limit_bytes}")
        entry = unpack(file.readall(), key)
        if entry["time"] > time.time():
            raise Unfit("its time lies in the future")
        with suppress(OSError):  # a read-only cache; access time says when it was used last, change time when it was computed
            os.utime(handle, ns=(time.time_ns(), status.st_mtime_ns))
    return Hit(entry["value"], entry["time"], Path(key.path), entry["seconds"])
