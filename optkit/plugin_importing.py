"""Importing foreign code so that it cannot harm the command that imports it."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optkit.plugin_loading import Point

#: Seconds after which an import counts as hanging.
IMPORT_TIMEOUT = 30.0


def imported(point: Point) -> Any:
    """The point's object. Whatever its import raises comes through, except that a plugin cannot pretend to be the user's Ctrl-C.

    :raises ImportError: where the import ends or blocks the process: tried in a forked copy first, if it is safe to fork here.
    """
    if not point.foreign:
        return point.load()
    if _can_fork():
        death = _death_in_a_copy(point)
        if death:
            raise ImportError(death)
    try:
        with stdout_kept(point.name or point.module):
            return point.load()
    except KeyboardInterrupt as error:
        if _raised_by_code(error):
            raise ImportError("it raises KeyboardInterrupt") from None
        raise


@contextlib.contextmanager
def stdout_kept(name: str) -> Iterator[None]:
    """Standard output belongs to the command's result: what a plugin prints goes to stderr. Module path and folder are put back."""
    path, printed = list(sys.path), io.StringIO()
    folder = os.open(".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        sys.path[:] = path
        os.fchdir(folder)
        os.close(folder)
        if not printed.closed and printed.getvalue().strip():
            from optkit.report.text import clean

            print(f"plugin {name} prints: {clean(printed.getvalue().strip(), 300)}", file=sys.stderr)


def _can_fork() -> bool:
    """A copy of a process with threads may hang, and one with torch has threads; such a process is a trial's or the user's own."""
    try:
        return "torch" not in sys.modules and len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _death_in_a_copy(point: Point) -> str:
    """Import in a forked copy: how it ended the process or blocked it, or nothing when it came to an end, good or bad."""
    import resource
    import signal

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            with contextlib.suppress(BaseException):
                point.load()
            os.write(writer, b"end")
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], IMPORT_TIMEOUT)
        ended = bool(ready) and os.read(reader, 3) == b"end"
        if not ready:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    if not ready:
        return f"it takes more than {IMPORT_TIMEOUT:.0f} s"
    if os.WIFSIGNALED(status) and not ended:
        return f"it kills the process ({signal.Signals(os.WTERMSIG(status)).name})"
    return "" if ended else f"it ends the process with status {os.waitstatus_to_exitcode(status)}"


def _raised_by_code(error: BaseException) -> bool:
    """Whether a ``raise`` statement made this exception: one that Ctrl-C made stands at some other instruction."""
    import dis

    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
