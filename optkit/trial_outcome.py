"""What can become of a trial: its states, the failure that tells one, what it used, and the log it leaves."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from optkit.errors import OptkitError
from optkit.processes import signal_name

State = Literal["ok", "failed", "oom", "crashed", "timeout", "killed", "unavailable", "skipped"]
STATES: tuple[State, ...] = get_args(State)

_REASON_CHARACTERS = 300
_LOG_TAIL_BYTES, _LOG_TAIL_LINES = 16384, 60


class TrialFailed(OptkitError):
    """What was asked of a trial has no result.

    :ivar state: what happened, never ``ok``.
    :ivar reason: one line, for the table: ``ValueError: message``, ``SIGSEGV``, ``no answer to 'once' within 30 s``.
    :ivar log_tail: the last lines that the trial printed.
    :ivar traceback: the trial's own, where it ended in an exception.
    """

    def __init__(self, state: State, reason: str, log_tail: str = "", traceback: str = "", name: str = "") -> None:
        self.state, self.reason, self.log_tail, self.traceback, self.name = state, reason, log_tail, traceback, name
        super().__init__(f"trial '{name}': {state}: {reason}" if name else f"{state}: {reason}")


@dataclass(frozen=True)
class ResourceUse:
    """What the kernel counted for a trial's process and for the children it waited for. None where the count was lost.

    :ivar max_rss_bytes: the largest resident set of one process, modules shared with the server included.
    :ivar exit_status: minus the number of the signal, if one ended it.
    """

    max_rss_bytes: int | None = None
    cpu_seconds: float | None = None
    exit_status: int | None = None


def classify(exited: dict[str, Any], log_tail: str) -> tuple[State, str]:
    """State and reason of an ending that optkit did not ask for and that came without an answer.

    :param exited: the server's message (`optkit.forkserver`).
    """
    status, memory = exited["status"], f"{exited['max_rss_bytes'] / 2**30:.1f} GiB resident at most"
    if status >= 0:
        return ("failed" if status == 0 else "crashed"), f"it ended with exit status {status} and without an answer"
    number = -status
    if number == signal.SIGKILL and exited["oom_kills"] > 0:
        return "oom", f"killed by the kernel, which had run out of memory ({memory})"
    if number == signal.SIGABRT and "std::bad_alloc" in log_tail:
        return "oom", f"SIGABRT: std::bad_alloc ({memory})"
    if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return "killed", f"{signal_name(number)}, which optkit did not send ({memory})"
    return "crashed", signal_name(number)


def one_line(message: str) -> str:
    """A message as a table can show it: CUDA's is a paragraph of advice. The traceback has all of it."""
    words = " ".join(message.split())
    return words if len(words) <= _REASON_CHARACTERS else words[: _REASON_CHARACTERS - 1] + "…"


def new_log(folder: Path, name: str) -> tuple[Path, int]:
    """Path and descriptor of a new file, for this user alone, named after the trial as far as a file can be."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:80] or "trial"
    number = 1
    while True:
        path = folder / (f"{stem}.log" if number == 1 else f"{stem}-{number}.log")
        try:
            return path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            number += 1


def tail_of(log: Path) -> str:
    """The last lines of a log, however large it is; empty if it is gone."""
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES))
        return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:])
    return ""
