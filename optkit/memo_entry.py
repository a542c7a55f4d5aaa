"""One entry of the memo: its name, its bytes, and what makes it fit. One file holds one result::

    <SHA-256 of the next line>
    {"key":{"name":...,"spec":...},"schema":1,"seconds":...,"time":...,"value":...}
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, Literal, NamedTuple

from optkit.canonical import canonical_json, digest, parse, sha256_hex

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
    :ivar stem: the entry's path without its ending; the digest in it covers the schema too.
    """

    spec: str
    text: str
    stem: str

    @classmethod
    def of(cls, folder: Path, name: str, spec: dict[str, Any]) -> Key:
        """``NotCanonical`` if the spec is no JSON."""
        if not LEVEL.fullmatch(name):
            raise ValueError(f"a memo level is lower-case letters, digits and dashes, at most 40, not {name!r}")
        key = {"name": name, "spec": spec}
        text = canonical_json(key)
        return cls(canonical_json(spec), text, f"{folder}/{name}-{digest({'key': key, 'schema': SCHEMA})}")


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


def load(path: str, key: Key, size_limit_bytes: int) -> tuple[dict[str, Any], int]:
    """The entry at ``path`` and the descriptor that it was read from, which the caller closes. ``Unfit`` or ``OSError`` if not.

    Follows no link and does not wait for a pipe.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise Unfit("it is no plain file")
        if status.st_size > size_limit_bytes:
            raise Unfit(f"its {status.st_size} bytes are more than the cache's limit of {size_limit_bytes}")
        with open(handle, "rb", buffering=0, closefd=False) as file:
            return unpack(file.readall(), key), handle
    except BaseException:
        os.close(handle)
        raise
