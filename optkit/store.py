"""Records on disk: one line each in ``records.jsonl``, never rewritten. A line is the SHA-256 of its JSON, a space, and the JSON.

A record for which :meth:`RecordStore.append` returned is on the disk. A row that was damaged or cut short is reported and left out;
it costs no other row. A row of a newer schema is refused and left as it is.
"""

from __future__ import annotations

import errno
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
_FIRST_BLOCK, _LARGEST_BLOCK = 2**16, 2**22
LONGEST_ROW = 2**24
"""Bytes. A longer line is damage: it is reported, and never in memory as a whole."""
_TOO_LONG = b"?"


class Records(NamedTuple):
    """All good rows, oldest first, and one line for each row that is not good."""

    rows: list[dict[str, Any]]
    problems: list[str]


class RecordStore:
    """The records in ``folder``, which is made, private (0700), with the first record.

    :param warn: called with one line for each bad row that :meth:`latest` passes. (:meth:`read` returns them.)
    """

    def __init__(self, folder: Path, *, warn: Callable[[str], None] | None = None):
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME
        self._warn = warn or (lambda message: None)

    def append(self, record: dict[str, Any]) -> str:
        """Add a record and return its new id. The row is the record with ``schema``, ``id`` and ``time`` (unix seconds) beside it.

        ``OptkitError`` if it could not be kept; no row was lost or changed then.
        """
        if taken := [name for name in _OWN if name in record]:
            raise ValueError(f"the store itself gives a record its {', '.join(taken)}")
        row_id = os.urandom(6).hex()
        try:
            body = canonical_json({**record, "schema": SCHEMA, "id": row_id, "time": time.time()}).encode("ascii")
        except NotCanonical as fault:
            raise OptkitError(f"record not kept: {fault}") from None
        if len(body) > LONGEST_ROW - 100:
            raise OptkitError(f"record not kept: it has {len(body):,} bytes, and {LONGEST_ROW:,} is the limit")
        try:
            folders.make_private_folder(self.folder)
            _append_line(self.path, sha256_hex(body).encode("ascii") + b" " + body + b"\n")
        except OSError as error:
            raise OptkitError(f"record not kept: {self.path}: {error.strerror or error}; OPTKIT_RECORDS_DIR names another folder") from None
        return row_id

    def read(self) -> Records:
        """Every row. A missing file has none."""
        rows: list[dict[str, Any]] = []
        problems: list[str] = []
        with self._opened() as (handle, size):
            for number, line in enumerate(_lines(handle, size), start=1):
                found, reasons = _rows(line)
                rows += found
                problems += [f"{self.path}:{number}: {reason}" for reason in reasons]
        return Records(rows, problems)

    def latest(self, match: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """The newest row for which ``match`` is true. Reads from the end, and no further than that row."""
        with self._opened() as (handle, size):
            for line in _lines_from_end(handle, size):
                found, reasons = _rows(line)
                for reason in reasons:
                    self._warn(f"{self.path}: {reason}")
                for row in reversed(found):
                    if match(row):
                        return row
        return None

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        """A descriptor, and the size between two writes: what lies before it does not change any more."""
        try:
            handle = _open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            yield -1, 0
            return
        except OSError as error:
            raise OptkitError(f"records not read: {self.path}: {error.strerror}; OPTKIT_RECORDS_DIR names another folder") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            size = os.fstat(handle).st_size
            fcntl.flock(handle, fcntl.LOCK_UN)
            yield handle, size
        finally:
            os.close(handle)


def _open(path: Path, flags: int) -> int:
    """Open a plain file. Follows no link and does not wait for a pipe."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no plain file")
    return handle


def _append_line(path: Path, line: bytes) -> None:
    """Add ``line`` with one write, durably, or leave the file as it was."""
    handle = _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line  # a write was cut short here: its rest stays a line of its own, which read() reports
        try:
            if os.write(handle, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
            if not size:
                folders.sync_folder(path.parent)
        except BaseException:
            os.ftruncate(handle, size)
            raise
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough where another thread forked meanwhile
        os.close(handle)


def _lines(handle: int, size: int) -> Iterator[bytes]:
    """The lines of the file's first ``size`` bytes."""
    rest: list[bytes] = []
    for start in range(0, size, _LARGEST_BLOCK):
        rest.append(os.pread(handle, min(_LARGEST_BLOCK, size - start), start))
        if b"\n" in rest[-1]:
            *lines, last = b"".join(rest).split(b"\n")
            yield from lines
            rest = [last]
        elif sum(map(len, rest)) > LONGEST_ROW:
            rest = [_TOO_LONG]
    yield b"".join(rest)


def _blocks_from_end(handle: int, size: int) -> Iterator[bytes]:
    """The file's first ``size`` bytes in growing blocks, the last block first."""
    length = _FIRST_BLOCK
    while size > 0:
        start = max(0, size - length)
        yield os.pread(handle, size - start, start)
        size, length = start, min(length * 2, _LARGEST_BLOCK)


def _lines_from_end(handle: int, size: int) -> Iterator[bytes]:
    tail: list[bytes] = []  # the last piece first
    for block in _blocks_from_end(handle, size):
        tail.append(block)
        if b"\n" in block:
            first, *lines = b"".join(reversed(tail)).split(b"\n")
            yield from reversed(lines)
            tail = [first]
        elif sum(map(len, tail)) > LONGEST_ROW:
            tail = [_TOO_LONG]
    yield b"".join(reversed(tail))


def _rows(line: bytes) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a line, and what is wrong with it. More than one row only where the end of line between them was damaged."""
    if not line:
        return [], []
    try:
        return [_row(line)], []
    except ValueError as fault:
        pieces = [piece for piece in _ROW_START.split(line) if piece]
        if len(pieces) == 1:
            return [], [str(fault)]
    rows, reasons = [], []
    for piece in pieces:
        try:
            rows.append(_row(piece))
        except ValueError as fault:
            reasons.append(str(fault))
    return rows, reasons


def _row(line: bytes) -> dict[str, Any]:
    """The row of a line, or ``ValueError`` with the reason. A damaged end of line may follow it."""
    for body in (line[65:], line[65:-1]):
        if line[:65] == sha256_hex(body).encode("ascii") + b" ":
            break
    else:
        raise ValueError("row left out: it is damaged or was cut short (its digest does not fit)")
    row = parse(body)
    if not isinstance(row, dict) or type(row.get("schema")) is not int:
        raise ValueError("row left out: it is no record")
    if row["schema"] > SCHEMA:
        raise ValueError(f"row left out: its schema is {row['schema']}, this optkit reads up to {SCHEMA}; a newer optkit reads it")
    if row["schema"] < 1 or not isinstance(row.get("id"), str) or not isinstance(row.get("time"), float):
        raise ValueError("row left out: it is no record")
    return row
