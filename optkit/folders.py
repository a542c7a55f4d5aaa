"""Where things lie on disk, and the few file operations that must survive a kill: private folders, locks, durable names.

| what | first of |
|---|---|
| cache | the argument, ``OPTKIT_CACHE_DIR``, ``$XDG_CACHE_HOME/optkit``, ``~/.cache/optkit`` |
| records | the argument, ``OPTKIT_RECORDS_DIR``, ``$XDG_DATA_HOME/optkit/records``, ``~/.local/share/optkit/records`` |

Both hold prompts and answers, so what optkit makes here is 0700. A cache folder carries a CACHEDIR.TAG (bford.info/cachedir) with
optkit's own line: backup programs skip it, and only a folder that bears it is ever cleared.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from optkit.errors import OptkitError, quoted

LONGEST_NAME = 1000
LEAST_FREE_BYTES = 64 * 2**20
"""What a run's logs and compiled code may take."""
TAG_NAME = "CACHEDIR.TAG"
_TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This file is a cache directory tag created by optkit.\n"
    b"# All in this folder can be computed again; `optkit cache clear` empties it.\n"
)
_TAG_SIGNATURE = b"\n".join(_TAG.split(b"\n")[:2]) + b"\n"


def cache_folder(chosen: str | os.PathLike[str] | None = None) -> Path:
    """The folder of all that can be computed again. It is not made here."""
    return _place(chosen, "OPTKIT_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "optkit")


def records_folder(chosen: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the records. It is not made here."""
    return _place(chosen, "OPTKIT_RECORDS_DIR", "XDG_DATA_HOME", ".local/share", "optkit/records")


def _place(chosen: str | os.PathLike[str] | None, variable: str, xdg: str, home: str, own: str) -> Path:
    explicit = chosen or os.environ.get(variable)
    if explicit and ("\0" in os.fspath(explicit) or len(os.fspath(explicit)) > LONGEST_NAME):
        limits = f"has at most {LONGEST_NAME:,} characters and no NUL"
        raise OptkitError(f"a folder's name {limits}: {quoted(os.fspath(explicit))} ({variable}, or the option in its place)")
    try:
        if explicit:
            return Path(explicit).expanduser().absolute()
        base = os.environ.get(xdg, "")
        return (Path(base) if os.path.isabs(base) else Path.home() / home) / own  # XDG: a relative path is to be ignored
    except RuntimeError as error:
        raise OptkitError(f"no home folder was found ({error}): set {variable}") from None


def make_private_folder(folder: str | os.PathLike[str]) -> None:
    """Make ``folder`` and its missing parents, each 0700; ``OSError`` where that fails. One that exists is left as it is."""
    missing = []
    place = os.path.abspath(folder)
    while not os.path.isdir(place):
        missing.append(place)
        place = os.path.dirname(place)
    for place in reversed(missing):
        try:
            os.mkdir(place, 0o700)
        except FileExistsError:
            if not os.path.isdir(place):
                raise


def usable_folder(folder: Path, warn: Callable[[str], None]) -> Path:
    """``folder``, made private; or a temporary one until this process ends, with a warning, where a run's files have no room there."""
    import atexit
    import shutil
    import tempfile

    try:
        make_private_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
        if free >= LEAST_FREE_BYTES:
            return folder
        reason = f"{free / 1e6:.1f} MB are free, {LEAST_FREE_BYTES / 1e6:.0f} MB are needed"
    except OSError as error:
        reason = str(error.strerror or error)
    temporary = Path(tempfile.mkdtemp(prefix="optkit-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    warn(f"{folder} cannot take this run's files ({reason}): they go to {temporary} and are removed; --cache-dir chooses another folder")
    return temporary


def make_cache_folder(folder: str | os.PathLike[str]) -> None:
    """Make ``folder`` a cache folder of optkit's: private and tagged.

    A folder with other things in it is refused with ``OptkitError``: the tag would tell backup programs to skip them. ``OSError``
    where the folder cannot be made or written.
    """
    if is_cache_folder(folder):
        return
    make_private_folder(folder)
    if is_empty(folder):
        write_durably(os.path.join(folder, TAG_NAME), _TAG)
    elif not is_cache_folder(folder):  # asked again: another process may have made it one, and its tag came before all else
        raise OptkitError(f"{folder} is no cache folder of optkit's and holds other files: choose an empty or a new folder")


def is_cache_folder(folder: str | os.PathLike[str] | int) -> bool:
    """Whether ``folder`` (a path, or a descriptor of the folder) bears optkit's own tag, as a plain file."""
    try:
        handle = folder if isinstance(folder, int) else os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(TAG_NAME, "rb", opener=lambda name, _: os.open(name, flags, dir_fd=handle)) as tag:
            return tag.read(len(_TAG_SIGNATURE)) == _TAG_SIGNATURE
    except OSError:
        return False
    finally:
        if handle is not folder:
            os.close(handle)


def is_empty(folder: str | os.PathLike[str] | int) -> bool:
    """Whether nothing is in ``folder`` (a path or a descriptor), save temp files of a process that was killed."""
    return all(name.startswith(".") and name.endswith(".tmp") for name in os.listdir(folder))


def write_durably(path: str, data: bytes) -> None:
    """Put ``data`` at ``path``: after a crash at any point the old file or the whole new one is there.

    A kill leaves a ``.*.tmp`` in the folder at worst. ``OSError`` where it cannot be written; the old file is then untouched.
    """
    temp = os.path.join(os.path.dirname(path), f".{os.getpid()}-{os.urandom(8).hex()}.tmp")
    handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.rename(temp, path)
    except BaseException:
        remove(temp)
        raise
    sync_folder(os.path.dirname(path))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: str, *, dir_fd: int | None = None) -> bool:
    """Remove a file that another process may remove too; whether it was this call that did."""
    try:
        os.unlink(path, dir_fd=dir_fd)
    except OSError:
        return False
    return True


def acquire(path: str, waiting: Callable[[], None]) -> int:
    """Hold the lock file at ``path``, waiting for whoever holds it; ``OSError`` where there can be no lock.

    The holder's death releases it, however it dies. Calls ``waiting()`` once if it must wait. Give the result to :func:`release`.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder before removed the file while this call waited: what is locked is no longer at the path


def release(path: str, handle: int) -> None:
    """Let go of a lock that :func:`acquire` gave, and remove its file."""
    if _is_at(handle, path):
        remove(path)
    fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough where a forked child still has the descriptor
    os.close(handle)


def remove_unheld(path: str, *, dir_fd: int) -> None:
    """Remove a lock file that nobody holds: a killed process left it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(path, dir_fd=dir_fd)
    except OSError:
        pass  # held
    finally:
        os.close(handle)


def _is_at(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
