"""Many trials, a third of them faulty in a real way: what each is said to be, how long that took, and what is left of it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults import Figure
from optkit.trial import TrialFailed, TrialProcess, TrialServer

TARGET = "tests.trial_targets:Target"
TIMEOUT, ALLOWED = 0.5, 5.0
"""Seconds that a call may take, and seconds more until a hanging one must be gone."""
MEMORY_LIMIT = 256 * 2**20
AT_ONCE = 4
SHARE = 0.3

#: fault -> the call that makes it, its arguments, and the state that it must be given.
FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "an exception": ("raise_error", {}, "failed"),
    "a segfault": ("segfault", {}, "crashed"),
    "exit 0 without a result": ("leave", {"status": 0}, "failed"),
    "a hang that ignores SIGTERM": ("hang_deaf", {}, "timeout"),
    "a detached grandchild and a hang": ("detach", {"then": "hang_deaf"}, "timeout"),
    "a detached grandchild and a segfault": ("detach", {"then": "segfault"}, "crashed"),
    "more memory than the limit": ("allocate", {"size": 2 * MEMORY_LIMIT}, "oom"),
}


@dataclass
class Running:
    trial: TrialProcess
    fault: str | None
    number: int
    started: float = 0.0
    pids: list[int] = field(default_factory=list)

    def note(self, progress: dict[str, Any]) -> None:
        self.pids += [progress[name] for name in ("pid", "grandchild") if name in progress]


def sweep(folder: Path, count: int, seed: int = 0) -> list[Figure]:
    """``count`` trials of one server, a few at once, in random order."""
    names = list(FAULTS)
    faulty = [names[number % len(names)] for number in range(round(SHARE * count))]
    order: list[str | None] = [*faulty, *[None] * (count - len(faulty))]
    random.Random(seed).shuffle(order)
    wrong, late, pids, slowest = 0, 0, [], 0.0
    with TrialServer(imports=(), log_folder=folder / "logs") as server:
        for first in range(0, count, AT_ONCE):
            batch = [begun(server, fault, first + index) for index, fault in enumerate(order[first : first + AT_ONCE])]
            for running in batch:
                verdict = finished(running)
                pids += running.pids
                if verdict:
                    wrong += 1
                    print(f"  trial {running.number} ({running.fault}): {verdict}")
                if running.fault and FAULTS[running.fault][2] == "timeout":
                    over = time.monotonic() - running.started - TIMEOUT
                    slowest = max(slowest, over)
                    late += over > ALLOWED
        alive = [pid for pid in pids if is_alive(pid)]
        marked = descendants(server.pid)
    left = len(set(alive) | set(marked))
    n, hangs = len(faulty), sum(FAULTS[fault][2] == "timeout" for fault in faulty)
    return [
        Figure.none_of("trials", f"wrongly classified of {count} trials with {n} faults", wrong, count),
        Figure.none_of("trials", "processes left behind", left, len(pids)),
        Figure("trials", "longest time over the time-out", f"{slowest:.1f} s", f"≤ {ALLOWED:.0f} s", late == 0, hangs),
    ]


def begun(server: TrialServer, fault: str | None, number: int) -> Running:
    limit = MEMORY_LIMIT if fault == "more memory than the limit" else None
    running = Running(server.spawn(TARGET, {"start": number}, name=f"trial {number}", memory_limit_bytes=limit), fault, number)
    if fault is None:
        running.trial.start("add", number=1, timeout=60.0)
    else:
        method, arguments, state = FAULTS[fault]
        running.trial.call("add", number=1, timeout=60.0)  # it lives before it fails
        running.started = time.monotonic()
        running.trial.start(method, timeout=TIMEOUT if state == "timeout" else 60.0, on_progress=running.note, **arguments)
    return running


def finished(running: Running) -> str:
    """What is wrong with the verdict on a trial, or nothing."""
    expected = FAULTS[running.fault][2] if running.fault else "ok"
    try:
        value = running.trial.wait()
        state, reason = "ok", ""
        if running.fault is None and value != running.number + 1:
            return f"it answered {value}"
    except TrialFailed as failure:
        state, reason = failure.state, failure.reason
    if running.trial.pid is not None:
        running.pids.append(running.trial.pid)
    running.trial.end()
    return "" if state == expected else f"{state} ({reason}), and {expected} is right"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(server: int | None) -> list[int]:
    """What the server still has below it, itself aside."""
    import psutil

    return [child.pid for child in psutil.Process(server).children(recursive=True)] if server else []
