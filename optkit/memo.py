"""The memo: results of evaluations, kept across runs. What it returns is what would be computed now, or it is a miss.

A result is found by its *spec*, one small JSON object that holds all that decides the value: model and sample digests, configuration,
versions, seed, ... What lies at an entry's path and is not that entry, whole (damaged, cut short, of another key, schema or time, a
link, a pipe, a pickle), is a miss with a warning, and is never executed. Nothing that goes wrong on the disk costs the caller the result.
The digest finds damage; it does not stop someone who can write the folder, which is therefore private (0700).

A hit reads the entry directly. A miss goes through ``joblib.Memory`` with the store of ``memo_backend``.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optkit import folders
from optkit.canonical import NotCanonical, canonical_json, parse
from optkit.errors import OptkitError
from optkit.memo_entry import LEVEL, ForeignSchema, Hit, Key, Origin, Unfit, load, pack

LEFTOVER_SECONDS = 3600
"""Age from which a temp file is taken to be a dead process's."""

_ENTRY = re.compile(rf"{LEVEL.pattern}-[0-9a-f]{{64}}\.json")
_LOCK = re.compile(rf"{LEVEL.pattern}-[0-9a-f]{{64}}\.lock")
_TEMP = re.compile(r"\..*\.tmp")
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


class Memo:
    """Results in ``folder``, which is made when the first one is kept.

    :param max_age_seconds: an older result is a miss.
    :param size_limit_bytes: the results used least recently are removed when all together exceed it.
    :param warn: called with one line, once for each thing that went wrong.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_age_seconds: float | None = None,
        size_limit_bytes: int = 2 * 1024**3,
        warn: Callable[[str], None],
    ):
        self.folder = Path(folder)
        self.max_age_seconds = max_age_seconds
        self.size_limit_bytes = size_limit_bytes
        self._warn = warn
        self._warned: set[str] = set()

    def lookup(self, name: str, spec: dict[str, Any]) -> Hit | None:
        """The result of ``spec`` at the level ``name``, or ``None``. Imports neither joblib nor numpy."""
        try:
            return self._read(Key.of(self.folder, name, spec))
        except NotCanonical:
            return None  # compute() says so

    def compute(
        self, name: str, function: Callable[[dict[str, Any]], Any], spec: dict[str, Any], *, force: bool = False
    ) -> tuple[Any, Origin]:
        """The result of ``spec``: from the memo, or ``function(spec)``, which is then kept.

        Callers of one spec, in other processes too, compute it once: the others wait. A value comes back in its JSON form (a tuple as
        a list) whether it was found or computed; one that JSON cannot hold comes back as it is, is not kept, and a warning names it.

        :param name: the level, ``predictions`` or ``metrics`` for example.
        :param force: compute although there is a result, and replace it.
        """
        try:
            key = Key.of(self.folder, name, spec)
        except NotCanonical as fault:
            self._say(f"{name} not cached: what decides them cannot be described: {fault}")
            return _timed(function, spec)
        hit = None if force else self._read(key)
        if hit is not None:
            return hit.value, Origin("memo", hit.seconds, hit.time)
        miss = Miss(self, name, key, function)
        with self._alone(name, key) as may_keep:
            if may_keep:
                from optkit import memo_backend

                memo_backend.call(miss, force=force)
            else:
                miss(key.spec)
        assert miss.origin is not None
        return miss.value, miss.origin

    def info(self) -> dict[str, Any]:
        """``entries``, ``bytes``, ``oldest`` and ``newest`` (unix seconds of computing, ``None`` if empty), and ``folder``."""
        found = []
        with suppress(OSError):  # no folder, no entries
            found = [status for _, status in _files(str(self.folder), _ENTRY)]
        times = [status.st_mtime for status in found]
        return {
            "entries": len(found),
            "bytes": sum(status.st_size for status in found),
            "oldest": min(times, default=None),
            "newest": max(times, default=None),
            "folder": str(self.folder),
        }

    def clear(self) -> int:
        """Remove every result and say how many there were; ``OptkitError`` unless the folder is a cache that optkit made.

        Only plain files named as the memo names them are removed, and nothing is reached through a link.
        """
        try:
            handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        except OSError as error:
            why = "it is a link or a file" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
            raise OptkitError(f"nothing cleared: {self.folder} is not a cache that optkit made ({why})") from None
        try:
            if folders.is_empty(handle):
                return 0
            if not folders.is_cache_folder(handle):
                raise OptkitError(
                    f"nothing cleared: {self.folder} is not a cache that optkit made (it lacks optkit's {folders.TAG_NAME}); "
                    "if its files are to go, delete them yourself"
                )
            _remove_leftovers(handle)
            return sum(folders.remove(name, dir_fd=handle) for name, _ in _files(handle, _ENTRY))
        finally:
            os.close(handle)

    def _read(self, key: Key) -> Hit | None:
        """The entry of ``key`` if it is there, whole, and not too old."""
        try:
            hit = load(key, self.size_limit_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Unfit as fault:
            self._say(f"cache entry {key.path} not used: {fault}")
            return None
        except OSError as error:
            self._say(f"cache entry {key.path} not used: {_reason(error)}")
            return None
        if self.max_age_seconds is not None and time.time() - hit.time > self.max_age_seconds:
            return None
        return hit

    @contextmanager
    def _alone(self, name: str, key: Key) -> Iterator[bool]:
        """Hold the lock of ``key``. Gives whether the result may be kept: not where the folder cannot be written."""
        lock, may_keep = None, True
        try:
            folders.make_cache_folder(self.folder)
            lock = folders.acquire(key.lock, lambda: self._say(f"waiting for another process that computes the same {name}"))
        except OptkitError as error:
            may_keep = False
            self._say(f"{name} not cached: {error}")
        except OSError as error:
            may_keep = error.errno in _NO_LOCKS_HERE
            if not may_keep:
                self._say_not_kept(name, error)
        try:
            yield may_keep
        finally:
            if lock is not None:
                folders.release(key.lock, lock)

    def _write(self, name: str, key: Key, value: str, origin: Origin) -> None:
        """Put an entry in its place, unless one of another schema is there, and make room for it."""
        data = pack(key, value, origin)
        if len(data) > self.size_limit_bytes:
            self._say(f"{name} not cached: {len(data)} bytes are more than the cache's limit of {self.size_limit_bytes}")
        elif self._is_foreign(key):
            self._say(f"{name} not cached: {key.path} is of another optkit's schema and is left as it is")
        else:
            try:
                folders.write_durably(key.path, data)
                self._make_room(os.path.basename(key.path))
            except OSError as error:
                self._say_not_kept(name, error)

    def _is_foreign(self, key: Key) -> bool:
        try:
            load(key, self.size_limit_bytes)
        except ForeignSchema:
            return True
        except (Unfit, OSError):
            pass
        return False

    def _make_room(self, newest: str) -> None:
        """Remove what was used least recently until all fits. The entry ``newest`` stays."""
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _remove_leftovers(handle)
            found = _files(handle, _ENTRY)
            excess = sum(status.st_size for _, status in found) - self.size_limit_bytes
            for name, status in sorted(found, key=lambda file: max(file[1].st_atime_ns, file[1].st_mtime_ns)):
                if excess <= 0:
                    break
                if name != newest and folders.remove(name, dir_fd=handle):
                    excess -= status.st_size
        finally:
            os.close(handle)

    def _say(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._warn(message)

    def _say_not_kept(self, name: str, error: OSError) -> None:
        self._say(f"{name} not cached: {self.folder}: {_reason(error)}; --cache-dir chooses another folder")


class Miss:
    """One result that was not found: the function that joblib memoizes, and the one entry that its store may read and write.

    It has slots because joblib copies the attributes of the function over its own.
    """

    __slots__ = ("_function", "_memo", "_name", "_text", "key", "origin", "value")

    def __init__(self, memo: Memo, name: str, key: Key, function: Callable[[dict[str, Any]], Any]):
        self._memo = memo
        self._name = name
        self._function = function
        self._text: str | None = None
        self.key = key
        self.value: Any = None
        self.origin: Origin | None = None

    def __repr__(self) -> str:
        return f"optkit memo {self._name}"

    @property
    def folder(self) -> Path:
        return self._memo.folder

    def __call__(self, spec: str) -> Any:
        """Compute, and bring the value into its JSON form."""
        self.value, self.origin = _timed(self._function, parse(spec))
        try:
            self._text = canonical_json(self.value)
            self.value = parse(self._text)
        except NotCanonical as fault:
            self._memo._say(f"{self._name} not cached: {fault}")
        return self.value

    def read(self) -> bool:
        """Whether the entry is there now: another process may have written it while this one waited."""
        hit = self._memo._read(self.key)
        if hit is not None:
            self.value, self.origin = hit.value, Origin("memo", hit.seconds, hit.time)
        return hit is not None

    def keep(self) -> None:
        if self._text is not None and self.origin is not None:
            self._memo._write(self._name, self.key, self._text, self.origin)


def _timed(function: Callable[[dict[str, Any]], Any], spec: dict[str, Any]) -> tuple[Any, Origin]:
    start = time.perf_counter()
    value = function(spec)
    return value, Origin("computed", time.perf_counter() - start, time.time())


def _files(folder: str | int, pattern: re.Pattern[str]) -> list[tuple[str, os.stat_result]]:
    """Name and status of the plain files in ``folder`` (a path or a descriptor) that are named like ``pattern``."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # another process was quicker
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found.append((entry.name, status))
    return found


def _remove_leftovers(folder: int) -> None:
    """Remove the lock and temp files of processes that were killed."""
    for name, _ in _files(folder, _LOCK):
        folders.remove_unheld(name, dir_fd=folder)
    for name, status in _files(folder, _TEMP):
        if time.time() - status.st_mtime > LEFTOVER_SECONDS:
            folders.remove(name, dir_fd=folder)


def _reason(error: OSError) -> str:
    return "it is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror or error)
