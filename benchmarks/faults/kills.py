"""A runner that is killed (SIGKILL) at random moments and started again: what it acknowledged is there, once, and nothing is left of it."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from benchmarks.faults import Figure
from optkit.memo import Memo
from optkit.store import RecordStore
from tests.faults import exit_status, fork

MARK = "OPTKIT_FAULTS_MARK"


def work(folder: Path, acknowledged: int) -> None:
    """What a run does for each cell, without a model: look it up, compute through the memo, append the record, say so."""
    memo = Memo(folder / "memo", warn=print)
    store = RecordStore(folder / "records", warn=lambda line: None)
    last = store.latest(lambda row: True)
    for cell in range(0 if last is None else int(last["cell"]) + 1, 10**9):
        text, _ = memo.compute("predictions", lambda spec: "x" * (spec["cell"] * 7919 % 60_000), {"cell": cell})
        os.write(acknowledged, f"{store.append({'cell': cell, 'text': text})} {cell}\n".encode())


def kill_runners(folder: Path, kills: int, seed: int = 0) -> list[Figure]:
    draw = random.Random(seed)
    told: list[tuple[str, int]] = []
    noise = 0
    for _ in range(kills):
        read, write = os.pipe()
        child = fork(lambda write=write: work(folder, write))  # type: ignore[misc]
        os.close(write)
        with open(read, "rb") as pipe:
            first = pipe.readline()  # it works
            time.sleep(draw.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            noise += exit_status(child) != -signal.SIGKILL
            lines = [first, *pipe.read().splitlines(keepends=True)]
        told += [(row, int(cell)) for row, cell in (line.decode().split() for line in lines if line.endswith(b"\n"))]
    found = RecordStore(folder / "records").read()
    kept = {row["id"]: int(row["cell"]) for row in found.rows}
    cells = collections.Counter(kept.values())
    lost = sum(kept.get(row) != cell for row, cell in told)
    doubled = sum(count > 1 for count in cells.values()) + len(found.rows) - len(kept)
    gaps = len(set(range(max(cells) + 1)) - cells.keys())
    memo = Memo(folder / "memo", warn=print)
    values = [memo.lookup("predictions", {"cell": cell}) for cell in cells]
    wrong = sum(hit is None or len(hit.value) != cell * 7919 % 60_000 for cell, hit in zip(cells, values, strict=True))
    print(f"  {len(told):,} records acknowledged, {len(found.rows):,} kept, {len(found.problems)} torn lines reported")
    return [
        Figure.none_of("kills", f"acknowledged records lost in {kills} kills", lost + noise, len(told)),
        Figure.none_of("kills", "records doubled, or cells left out", doubled + gaps, len(cells)),
        Figure.none_of("kills", "remembered values wrong or missing afterwards", wrong, len(cells)),
        Figure("kills", "torn lines, each reported", str(len(found.problems)), f"≤ {kills}", len(found.problems) <= kills, kills),
    ]


def kill_runs(folder: Path, kills: int, seed: int = 0) -> list[Figure]:
    """The same with whole commands: ``optkit run`` with its trials, killed at moments spread over its duration."""
    draw, mark = random.Random(seed), uuid.uuid4().hex
    arguments = ["run", "--profile", "cpu", "--plugins", "precision", "--repeats", "1", "--limit", "2", "--format", "json",
                 "--set", "generate.max_new_tokens=4", "--set", "batch.size=2"]  # fmt: skip
    own = {"OPTKIT_CACHE_DIR": str(folder / "cache"), "OPTKIT_RECORDS_DIR": str(folder / "records"), MARK: mark}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OPTKIT_")}
    command = [sys.executable, "-m", "optkit.cli", *arguments]

    def run(more: list[str], seconds: float | None, seed: str) -> Any:
        process = subprocess.Popen([*command, "--seed", seed, *more], env=plain | own, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=seconds)
            return json.loads(output) if process.returncode == 0 else None
        process.kill()
        process.communicate()
        return None

    started = time.monotonic()
    failed = int(run([], 240.0, "0") is None)
    whole = time.monotonic() - started
    left = 0
    for _ in range(kills):
        run([], draw.uniform(0, whole), "1")
        left += wait_for_end(mark)
    failed += run([], 240.0, "1") is None
    found = RecordStore(folder / "records").read()
    keys = collections.Counter(row["key"] for row in found.rows)
    doubled = sum(count > 1 for count in keys.values()) + abs(2 - len(keys))
    return [
        Figure.none_of("kills", f"runs that failed before or after {kills} kills of `optkit run`", failed, 2),
        Figure.none_of("kills", "their records doubled or missing, or lines damaged", doubled + len(found.problems), len(found.rows)),
        Figure.none_of("kills", "their processes still there 5 s later", left, kills),
    ]


def wait_for_end(mark: str, seconds: float = 5.0) -> int:
    """Processes that bear the mark and are there after ``seconds``; they are killed then."""
    import psutil

    until = time.monotonic() + seconds
    while True:
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                    left.append(process)
        if not left or time.monotonic() > until:
            break
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(left)
