"""What optkit itself costs in time and memory: commands, a memoized run, a memo hit, a fingerprint, a trial's process.

    python -m benchmarks.overhead [--repeats 20] [--output benchmarks/results/overhead.json]

One row a figure: median with its order-statistic interval, n, and the machine. CPU seconds are user + system of the whole process; its
memory is the peak resident size. A trial's own memory is what its process holds for itself alone, once it has been forked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from optkit.machine import detect
from optkit.stats import order_statistic_interval
from optkit.trial import TrialServer

COMMANDS = {
    "--help": ["--help"],
    "list-plugins": ["list-plugins"],
    "plan": ["plan", "--profile", "cpu"],
    "run, all remembered": ["run", "--profile", "cpu", "--plugins", "", "--repeats", "1", "--limit", "20"],
}


def process_cost(arguments: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident MB of one ``optkit …`` process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "optkit.cli", *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"optkit {' '.join(arguments)} ended with exit code {process.returncode}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def private_megabytes(pid: int) -> float:
    """MB of a process that no other process shares (Linux, ``smaps_rollup``)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))) * 1024 / 1e6


def row(name: str, unit: str, values: list[float]) -> dict[str, object]:
    interval = order_statistic_interval(values)
    print(f"{name:36s} {interval.value:10.4g} {unit}  [{interval.low:.4g}, {interval.high:.4g}]  n = {interval.n}", flush=True)
    return {"name": name, "unit": unit, "median": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}


def commands(repeats: int, environment: dict[str, str]) -> list[dict[str, object]]:
    rows = []
    for name, arguments in COMMANDS.items():
        process_cost(arguments, environment)
        costs = zip(*(process_cost(arguments, environment) for _ in range(repeats)), strict=True)
        rows += [row(name, unit, list(values)) for unit, values in zip(("s wall", "s CPU", "MB"), costs, strict=True)]
    return rows


def repeated(work: Callable[[], object], repeats: int, calls: int = 1) -> list[float]:
    """Seconds a call, ``repeats`` values."""
    values = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        values.append((time.perf_counter() - started) / calls)
    return values


def inside(repeats: int, folder: Path) -> list[dict[str, object]]:
    from optkit.memo import Memo
    from optkit.sources import bundled_folder, folder_digest

    memo = Memo(folder / "memo", warn=print)
    memo.compute("predictions", lambda spec: [{"text": "x" * 200}] * 20, {"a": 1})
    rows = [row("memo hit, 5 kB", "s", repeated(lambda: memo.lookup("predictions", {"a": 1}), repeats, 200))]
    folder_digest(bundled_folder())
    rows.append(row("fingerprint of the bundled model", "s", repeated(lambda: folder_digest(bundled_folder()), repeats, 20)))
    with TrialServer(log_folder=folder / "logs") as server:

        def trial() -> None:
            process = server.spawn("benchmarks.overhead:Nothing", {}, name="nothing")
            process.call("answer")
            process.end()

        trial()
        rows.append(row("a trial's process, start to end", "s", repeated(trial, repeats)))
        process = server.spawn("benchmarks.overhead:Nothing", {}, name="nothing")
        process.call("answer")
        rows.append(row("a call to a trial, there and back", "s", repeated(lambda: process.call("answer"), repeats, 20)))
        process.end()
        rows.append(row("a trial's own memory, no model", "MB", [trial_megabytes(server) for _ in range(repeats)]))
    return rows


def trial_megabytes(server: TrialServer) -> float:
    process = server.spawn("benchmarks.overhead:Nothing", {}, name="nothing")
    process.call("answer")
    assert process.pid is not None
    value = private_megabytes(process.pid)
    process.end()
    return value


class Nothing:
    """A trial that does nothing."""

    calls = ("answer",)

    def __init__(self, spec: dict[str, object]):
        pass

    def answer(self) -> int:
        return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "OPTKIT_CACHE_DIR": str(folder / "cache"), "OPTKIT_RECORDS_DIR": str(folder / "records")}
        # as installed: with bytecode, which some environments do not let Python write; the first call of each command, not counted, does
        environment |= {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["OPTKIT_CACHE_DIR"] = environment["OPTKIT_CACHE_DIR"]
        rows = commands(arguments.repeats, environment) + inside(arguments.repeats, folder)
    if arguments.output:
        machine = detect()
        arguments.output.write_text(json.dumps({"machine": machine.model_dump(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
