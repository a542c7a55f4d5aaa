"""True comparisons on this machine: an arm that only waits 5 % longer must be found, and one that waits no longer must not differ.

Nothing else may use the processor's cores meanwhile; several of these side by side need cores of their own (``taskset``). Many simulated
comparisons are in ``tests/test_aa.py``.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.faults import Figure

SLOW_DOWN = 0.05
EXPECTED = 1 / (1 + SLOW_DOWN)
#: Kind of comparison -> by how much its arm is slower, and the protocol that the target speaks of.
KINDS: dict[str, tuple[float, tuple[str, ...]]] = {
    "equal": (0.0, ("--repeats", "10")),
    "planted": (SLOW_DOWN, ("--thorough",)),
}
PLUGIN = '''"""Waits longer than generating took, by a known share: a slow-down of known size."""

import time

from pydantic import Field

from optkit import Options, Technique, hookimpl


class SlowerOptions(Options):
    share: float = Field(0.05, ge=0, description="of the time that generating took")


technique = Technique(name="slower", stage="cache", summary="waits a known share longer", options=SlowerOptions)


@hookimpl
def wrap_engine(engine, trial):
    generate = engine.generate

    def slower(prompts, **arguments):
        start = time.perf_counter()
        answer = generate(prompts, **arguments)
        now = time.perf_counter()
        until = now + trial.options.share * (now - start)
        while time.perf_counter() < until:
            pass
        return answer

    engine.generate = slower
    return engine
'''

Run = dict[str, Any]


def measure(
    folder: Path, counts: dict[str, int], seed: int, keep: Callable[[list[Run]], None], protocols: dict[str, tuple[str, ...]] | None = None
) -> list[Run]:
    """As many comparisons of each kind as ``counts`` says, the kinds in turn; ``keep`` is called with all so far after each of them.

    :param protocols: kind -> other options of ``optkit run`` than those of ``KINDS``.
    """
    (folder / "slower.py").write_text(PLUGIN)
    runs: list[Run] = []
    turns = itertools.zip_longest(*([kind] * counts.get(kind, 0) for kind in KINDS))
    for number, turn in enumerate(turns):
        for kind in filter(None, turn):
            share, protocol = KINDS[kind]
            started = time.monotonic()
            run = {"kind": kind, "seed": seed + number, **compared(folder, seed + number, share, (protocols or {}).get(kind, protocol))}
            runs.append(run | {"seconds": round(time.monotonic() - started)})
            keep(runs)
    return runs


def compared(folder: Path, seed: int, share: float, protocol: tuple[str, ...]) -> Run:
    """One ``optkit run`` of its own: what it says of the arm and of its second baseline, or why it failed."""
    own = {f"OPTKIT_{name.upper()}_DIR": str(folder / name) for name in ("cache", "records", "config")}
    own["OPTKIT_PLUGIN_FILE"] = str(folder / "slower.py")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OPTKIT_")}
    command = [sys.executable, "-m", "optkit.cli", "run", "--profile", "cpu", "--plugins", "slower", "--set", f"slower.share={share}"]
    command += ["--limit", "8", "--fresh", "--seed", str(seed), "--format", "json", *protocol]
    done = subprocess.run(command, env=plain | own, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    record = json.loads(done.stdout)
    arm, again = record["arms"][1]["speed_up"], record["baseline_again"]
    facts = ("ratio", "low", "high", "differs")
    return {
        "n": arm["n"],
        **{name: arm[name] for name in facts},
        "again": {name: again[name] for name in facts},
        "busy_cores": round(max(record["busy_cores"]), 2),
    }


def is_found(run: Run) -> bool:
    """Whether a slow-down is claimed; a claim of a gain finds nothing."""
    return bool(run["differs"] and run["ratio"] < 1)


def figures(runs: list[Run]) -> list[Figure]:
    """The targets are of the issue at hand: 9 of 10 planted ones found, and at most one equal one of 20 that differs."""
    whole = [run for run in runs if "failed" not in run]
    planted, equal = ([run for run in whole if run["kind"] == kind] for kind in ("planted", "equal"))
    found, false = sum(map(is_found, planted)), sum(run["differs"] for run in equal)
    again = sum(run["again"]["differs"] for run in whole)
    rows = [Figure.none_of("timing", "comparisons that failed", len(runs) - len(whole), len(runs))]
    if planted:
        least = math.ceil(0.9 * len(planted))
        rows.append(Figure("timing", f"planted {EXPECTED:.3f} × found", str(found), f"≥ {least}", found >= least, len(planted)))
    if equal:
        most = math.floor(0.05 * len(equal))
        rows.append(Figure("timing", "equal arms that differ", str(false), f"≤ {most}", false <= most, len(equal)))
    if whole:
        rows.append(Figure("timing", "second baselines that differ", str(again), "", None, len(whole)))
    return rows


def interval(run: Run) -> str:
    return f"{run['ratio']:.3f} [{run['low']:.3f}, {run['high']:.3f}]"


def line(run: Run) -> str:
    """One comparison for the screen."""
    head = f"  {run['kind']} {run['seed']}, {run['seconds']} s: "
    if "failed" in run:
        return head + run["failed"]
    verdict = "differs" if run["differs"] else "no difference"
    return head + f"n = {run['n']}: {interval(run)}, {verdict}; second baseline {run['again']['ratio']:.3f}"


def merged(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Summaries of processes on one machine as one. :raises ValueError: for other machines, or one comparison given twice."""
    runs = sorted((run for summary in summaries for run in summary["runs"]), key=lambda run: (run["kind"], run["seed"]))
    if len({summary["machine"] for summary in summaries}) != 1:
        raise ValueError("they are of different machines")
    if len({(run["kind"], run["seed"]) for run in runs}) != len(runs):
        raise ValueError("two hold a comparison of the same kind and seed; give each process a --seed of its own")
    ends = [(one["begun"], one["begun"] + one["seconds"]) for one in summaries]
    return {
        "command": "; ".join(summary["command"] for summary in summaries),
        "date": max(summary["date"] for summary in summaries),
        "machine": summaries[0]["machine"],
        "begun": min(begin for begin, _ in ends),
        "seconds": max(end for _, end in ends) - min(begin for begin, _ in ends),
        "at_a_time": max(sum(begin <= moment < end for begin, end in ends) for moment, _ in ends),
        "runs": runs,
    }


def sentence(summary: dict[str, Any]) -> str:
    """What ``docs/faults.md`` says of these comparisons."""
    whole = [run for run in summary["runs"] if "failed" not in run]
    planted, equal = ([run for run in whole if run["kind"] == kind] for kind in ("planted", "equal"))
    side = f", {summary['at_a_time']} at a time" if summary["at_a_time"] > 1 else ""
    said = []
    if planted:
        found = f"a planted {EXPECTED:.3f} × was found in {sum(map(is_found, planted))} of {_comparisons(planted)}"
        said.append(f"{found} ({_spread(planted)})")
    if equal:
        differing = sum(run["differs"] for run in equal)
        said.append(f"an arm that does nothing differed in {differing} of {_comparisons(equal)} ({_spread(equal)})")
    said.append(f"a second baseline differed in {sum(run['again']['differs'] for run in whole)} of {len(whole)}")
    if failed := len(summary["runs"]) - len(whole):
        said.append(f"{failed} failed")
    return f"{summary['date']}, {summary['machine']}{side}: {'; '.join(said)}."


def _comparisons(runs: list[Run]) -> str:
    pairs = sorted({run["n"] for run in runs})
    return (
        f"{len(runs)} comparison{'s' if len(runs) > 1 else ''} of {' to '.join(str(n) for n in dict.fromkeys((pairs[0], pairs[-1])))} pairs"
    )


def _spread(runs: list[Run]) -> str:
    if len(runs) == 1:
        return interval(runs[0])
    ratios = [run["ratio"] for run in runs]
    return f"median {median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
