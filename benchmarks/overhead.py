"""What optkit itself costs: commands, a memoized run, a memo hit, a fingerprint, a trial's process.

    python -m benchmarks.overhead [--repeats 20] [--output benchmarks/results/overhead.json]

One row a figure: median with its order-statistic interval, n, and the machine. CPU seconds are user + system of the whole process.
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

COMMANDS = {
    "--help": ["--help"],
    "list-plugins": ["list-plugins"],
    "plan": ["plan", "--profile", "cpu"],
}


def process_seconds(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of one ``optkit …`` process."""
    before = os.times()
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "optkit.cli", *arguments], env=environment, check=True, capture_output=True)
    wall = time.perf_counter() - started
    after = os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def row(name: str, unit: str, values: list[float]) -> dict[str, object]:
    interval = order_statistic_interval(values)
    print(f"{name:36s} {interval.value:10.4g} {unit}  [{interval.low:.4g}, {interval.high:.4g}]  n = {interval.n}", flush=True)
    return {"name": name, "unit": unit, "median": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}


def commands(repeats: int, environment: dict[str, str]) -> list[dict[str, object]]:
    rows = []
    for name, arguments in COMMANDS.items():
        process_seconds(arguments, environment)
        measured = [process_seconds(arguments, environment) for _ in range(repeats)]
        rows += [row(name, "s wall", [wall for wall, _ in measured]), row(name, "s CPU", [cpu for _, cpu in measured])]
    arguments = ["run", "--profile", "cpu", "--plugins", "", "--repeats", "1", "--limit", "20"]
    process_seconds(arguments, environment)
    measured = [process_seconds(arguments, environment) for _ in range(repeats)]
    return [
        *rows,
        row("run, all remembered", "s wall", [wall for wall, _ in measured]),
        row("run, all remembered", "s CPU", [cpu for _, cpu in measured]),
    ]


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
    from optkit.trial import TrialServer

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
    return rows


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
        os.environ["OPTKIT_CACHE_DIR"] = environment["OPTKIT_CACHE_DIR"]
        rows = commands(arguments.repeats, environment) + inside(arguments.repeats, folder)
    if arguments.output:
        machine = detect()
        arguments.output.write_text(json.dumps({"machine": machine.model_dump(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
