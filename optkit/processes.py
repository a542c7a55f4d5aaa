"""What a trial's process needs from the operating system: who dies with whom, who is left, who was killed for memory.

Everything here works on Linux. Elsewhere functions without a counterpart do nothing, and their first line says so.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress

LINUX = sys.platform == "linux"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when `parent`, whose child it is, ends in whatever way (Linux; else nothing)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(70)


def outlive_parent() -> None:
    """Undo `die_with_parent`, whose signal also comes when the parent's *thread* that made this process ends (Linux; else nothing)."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def adopt_orphans() -> None:
    """Descendants whose own parent ends become children of this process, not of init (Linux; else nothing)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def be_first_out_of_memory() -> None:
    """When memory runs out, the kernel takes this process before the one that runs the sweep (Linux; else nothing)."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
        score = int(file.read())
        file.write(str(max(score, 500)))


def limit_memory(limit_bytes: int) -> None:
    """Allocations of this process beyond `limit_bytes` fail from now on.

    The limit is RLIMIT_DATA: private writable memory. RLIMIT_AS would also count mapped weights, and the address ranges
    that allocators and CUDA reserve without using them.
    """
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


def kernel_oom_kills() -> int:
    """How many processes the kernel has killed for memory so far: in this control group, or else on this machine.

    0 where the system does not tell. Only a difference between two calls in one process means something.
    """
    with suppress(OSError, StopIteration):
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            group = next(line.rstrip("\n")[3:] for line in file if line.startswith("0::"))
        return _counter(f"/sys/fs/cgroup{group}/memory.events", "oom_kill")
    with suppress(OSError):
        return _counter("/proc/vmstat", "oom_kill")
    return 0


def strays(keep: Iterable[int]) -> list[int]:
    """Descendants of this process, except those that descend from the children in `keep`, and except the dead."""
    import psutil

    kept = set(keep)
    found = []
    for child in psutil.Process().children():
        if child.pid not in kept:
            with suppress(psutil.NoSuchProcess):
                found += [child, *child.children(recursive=True)]
    return [process.pid for process in found if _lives(process)]


def kill_marked(variable: str, value: str, seconds: float = 2.0) -> None:
    """Kill every process that was started with `variable` = `value`, and what those fork, for at most `seconds`.

    This finds the descendants of a process that is no longer there to be asked for them.
    """
    import psutil

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        marked = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(variable) == value and _lives(process) and process.pid != os.getpid():
                    marked.append(process.pid)
        if not marked:
            return
        for pid in marked:
            kill(pid, signal.SIGKILL)


def kill(pid: int, number: int, *, group: bool = False) -> None:
    """Send a signal to a process or its group. One that has gone, or belongs to someone else, is left alone."""
    with suppress(ProcessLookupError, PermissionError):
        (os.killpg if group else os.kill)(pid, number)


def signal_name(number: int) -> str:
    """``SIGSEGV`` for 11; ``signal 40`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _lives(process: object) -> bool:
    import psutil

    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)  # type: ignore[attr-defined]
    except psutil.NoSuchProcess:
        return False


def _counter(path: str, name: str) -> int:
    with open(path, encoding="ascii") as file:
        found = re.search(rf"^{name} (\d+)$", file.read(), re.MULTILINE)
    if not found:
        raise FileNotFoundError(f"{path} has no counter {name}")
    return int(found[1])


def _prctl(option: int, value: int) -> None:
    if LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
