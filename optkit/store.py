"""Records on disk: one line each in ``records.jsonl``, never rewritten. A line is the SHA-256 of its JSON, a space, and the JSON.

A record that :meth:`RecordStore.append` returned for is on the disk. A row that was damaged or cut short is reported and left out; the
others are not touched by it. A row of a newer schema is refused and left as it is.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from optkit import folders
from optkit.canonical import NotCanonical, canonical_json, parse, sha256_hex
from optkit.errors import OptkitError

SCHEMA = 1
FILE_NAME = "records.jsonl"
_OWN = ("schema", "id", "time")
_ROW_START = re.compile(rb"(?=[0-9a-f]{64} \{)")
_BLOCK = 64 * 1024


class Records(NamedTuple):
    """All good rows, oldest first, and one line for each row that is not good."""

    rows: list[dict[str, Any]]
    problems: list[str]


class RecordStore:
    """The records in ``folder``, which is made, private (0700), with the first record.

    :param warn: called with one line for each bad row that :meth:`latest` passes; :meth:`read` returns them.
    """

    def __init__(self, folder: Path, *, warn: Callable[[str], None] | None = None):
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME
        self._warn = warn

    def append(self, record: dict[str, Any]) -> str:
        """Add a record and return its new id. ``schema``, ``id`` and ``time`` (unix seconds) are added to what it holds.

        ``OptkitError`` if it could not be kept; the file is then as before.
        """
        if taken := [name for name in _OWN if name in record]:
            raise ValueError(f"a record's {', '.join(taken)} is given by the store")
        name = os.urandom(6).hex()
        try:
            body = canonical_json({**record, "schema": SCHEMA, "id": name, "time": time.time()}).encode("ascii")
        except NotCanonical as fault:
            raise OptkitError(f"record not kept: {fault}") from None
        try:
            folders.make_private_folder(self.folder)
            _append_line(self.path, sha256_hex(body).encode("ascii") + b" " + body + b"\n")
        except OSError as error:
            raise OptkitError(
                f"record not kept: {self.path}: {error.strerror or error}; OPTKIT_RECORDS_DIR names another folder"
            ) from None
        return name

    def read(self) -> Records:
        """Every row of the file. A missing file has none."""
        rows: list[dict[str, Any]] = []
        problems: list[str] = []
        with self._opened() as (handle, size):
            lines = b"".join(_blocks(handle, size)).split(b"\n")
        torn = lines.pop()
        for number, line in enumerate(lines, start=1):
            found, reasons = _rows(line)
            rows += found
            problems += [f"{self.path}, line {number}: {reason}" for reason in reasons]
        if torn:
            found, reasons = _rows(torn)
            rows += found
            problems += [f"{self.path}, last line: {reason} (a write was cut short)" for reason in reasons]
        return Records(rows, problems)

    def latest(self, match: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """The newest row for which ``match`` is true. Reads from the end, and no further than that row."""
        with self._opened() as (handle, size):
            for line in _lines_from_end(handle, size):
                found, reasons = _rows(line)
                for reason in reasons:
                    if self._warn is not None:
                        self._warn(f"{self.path}: {reason}")
                for row in reversed(found):
                    if match(row):
                        return row
        return None

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        """The file and the size that it has between two writes. Rows before it never change."""
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            handle = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise OptkitError(f"records not read: {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            size = os.fstat(handle).st_size
            fcntl.flock(handle, fcntl.LOCK_UN)
            yield handle, size
        finally:
            os.close(handle)
