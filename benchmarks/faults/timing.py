"""One true comparison on this machine: a technique that only waits 5 % longer must be found, and a second baseline must not differ.

Nothing else may use the processor meanwhile. (Many simulated comparisons are in ``tests/test_aa.py``.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.faults import Figure

SLOW_DOWN = 0.05
PLUGIN = f'''"""Waits 5 % longer than generating took: a slow-down of known size."""

import time

from optkit import Technique, hookimpl

technique = Technique(name="slower", stage="cache", summary="Waits 5 % longer: a slow-down of known size")


@hookimpl
def wrap_engine(engine, trial):
    generate = engine.generate

    def slower(prompts, **arguments):
        start = time.perf_counter()
        answer = generate(prompts, **arguments)
        now = time.perf_counter()
        until = now + {SLOW_DOWN} * (now - start)
        while time.perf_counter() < until:
            pass
        return answer

    engine.generate = slower
    return engine
'''


def compare(folder: Path, runs: int, protocol: tuple[str, ...] = ("--thorough",)) -> list[Figure]:
    plugin = folder / "slower.py"
    plugin.write_text(PLUGIN)
    own = {
        "OPTKIT_CACHE_DIR": str(folder / "cache"),
        "OPTKIT_RECORDS_DIR": str(folder / "records"),
        "OPTKIT_PLUGIN_FILE": str(plugin),
    }
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OPTKIT_")}
    command = [sys.executable, "-m", "optkit.cli", "run", "--profile", "cpu", "--plugins", "slower", "--limit", "8", "--fresh", *protocol]
    found = false = 0
    lines = []
    for number in range(runs):
        arguments = [*command, "--seed", str(number), "--format", "json"]
        done = subprocess.run(arguments, env=plain | own, stdout=subprocess.PIPE, text=True, check=True)
        record = json.loads(done.stdout)
        slower, again = record["arms"][1]["speed_up"], record["baseline_again"]
        found += slower["differs"] and slower["ratio"] < 1
        false += again["differs"]
        lines.append(f"{slower['ratio']:.3f} [{slower['low']:.3f}, {slower['high']:.3f}], A/A {again['ratio']:.3f}")
        print(f"  n = {slower['n']}: {lines[-1]}")
    expected = 1 / (1 + SLOW_DOWN)
    return [
        Figure(
            "timing",
            f"runs that find a planted {expected:.3f} × ({lines[-1]})",
            str(found),
            f"≥ {0.9 * runs:.1f}",
            found >= 0.9 * runs,
            runs,
        ),
        Figure("timing", "second baselines that differ", str(false), f"≤ {0.05 * runs:.1f}", false <= 0.05 * runs, runs),
    ]
