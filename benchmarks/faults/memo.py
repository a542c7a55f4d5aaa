"""Faults in the files of the memo: each must be a miss with a warning; and how long a hit takes."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.faults import Figure
from optkit.memo import Memo
from optkit.memo_entry import Key

LEVEL = "metrics"
SPEC: dict[str, Any] = {
    "model": "0f3a" * 16,
    "seed": 0,
    "plan": {"steps": [{"name": "a", "options": {"bits": 4}}], "settings": {"batch.size": 8}},
}
VALUE: dict[str, Any] = {"perplexity": {"value": 4.69, "n": 200}, "agreement": {"value": 0.97, "n": 200}}
BLOCK = 64
"""Bytes that a fault of the disk takes at once. True ones are 512 or 4,096; the entry is smaller than that."""


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def sealed(body: bytes) -> bytes:
    """What an attacker or another version writes: anything, under a digest that fits."""
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def contents(good: bytes, other: bytes, trap: Trap, draw: random.Random, random_faults: int) -> Iterator[tuple[str, bytes]]:
    """Kind and bytes of each fault: every bit flipped, every length, and as many random ones as are asked for."""
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        yield "a flipped bit", bytes(data)
    for length in range(len(good)):
        yield "cut short", good[:length]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for payload in (pickle.dumps(trap, protocol), pickle.dumps({"value": trap}, protocol)):
            yield "a planted pickle", payload
            yield "a planted pickle", sealed(payload)
    body = json.loads(good[65:])
    for change in (
        *({"schema": schema} for schema in (0, 2, 3, 10**6, -1, 1.0, True, None, "1")),
        *({"time": moment} for moment in (time.time() + 3600, 9e18, None, "now", 1)),
        *({"seconds": seconds} for seconds in (None, "2", 1)),
        {"key": {"name": LEVEL, "spec": {}}},
    ):
        yield "another schema, time or key", sealed(json.dumps(body | change, sort_keys=True, separators=(",", ":")).encode())
    yield "the entry of another key", other
    for number in range(random_faults):
        yield random_fault(good, other, draw, number)


def random_fault(good: bytes, other: bytes, draw: random.Random, number: int) -> tuple[str, bytes]:
    data, at = bytearray(good), draw.randrange(len(good))
    kind = number % 6
    if kind == 0:
        data[at : at + BLOCK] = bytes(len(data[at : at + BLOCK]))
        return "a block of zeros", bytes(data)
    if kind == 1:
        data[at : at + BLOCK] = draw.randbytes(len(data[at : at + BLOCK]))
        return "a block of noise", bytes(data)
    if kind == 2:
        return "bytes lost within", bytes(data[:at] + data[at + draw.randrange(1, BLOCK) :])
    if kind == 3:
        return "bytes put in", bytes(data[:at] + draw.randbytes(draw.randrange(1, BLOCK)) + data[at:])
    if kind == 4:
        return "two entries mixed", good[:at] + other[at:]
    return "noise alone", draw.randbytes(draw.randrange(2 * len(good)))


def replacements(path: Path, elsewhere: Path) -> Iterator[str]:
    """What is no plain file stands in the entry's place while the caller looks."""
    for kind, make in (("a link", lambda: path.symlink_to(elsewhere)), ("a pipe", lambda: os.mkfifo(path)), ("a folder", path.mkdir)):
        path.unlink()
        make()
        yield kind
        (path.rmdir if path.is_dir() and not path.is_symlink() else path.unlink)()
        path.touch()


def inject(folder: Path, random_faults: int, seed: int = 0) -> list[Figure]:
    """All faults, one after the other; every one is looked up, and every tenth result is asked for as a run asks for it."""
    memo = Memo(folder / "memo", warn=lambda line: None)
    other_spec = SPEC | {"seed": 1}
    for spec in (SPEC, other_spec):
        memo.compute(LEVEL, lambda _: VALUE, spec)
    path, other = (Path(Key.of(memo.folder, LEVEL, spec).path) for spec in (SPEC, other_spec))
    good, sprung = path.read_bytes(), folder / "sprung"
    tally: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()

    def look(kind: str, number: int) -> None:
        kinds[kind] += 1
        said: list[str] = []
        fresh = Memo(memo.folder, warn=said.append)
        try:
            tally["wrong"] += fresh.lookup(LEVEL, SPEC) is not None
            tally["unwarned"] += len(said) != 1
            if number % 10 == 0:
                tally["wrong"] += fresh.compute(LEVEL, lambda _: "now", SPEC)[0] != "now"
        except BaseException as error:
            tally["crashes"] += 1
            print(f"{kind}: {type(error).__name__}: {error}")
        if sprung.exists():
            tally["executed"] += 1
            sprung.rmdir()

    for number, (kind, data) in enumerate(contents(good, other.read_bytes(), Trap(sprung), random.Random(seed), random_faults)):
        if data != good:
            path.write_bytes(data)
            look(kind, number)
    elsewhere = folder / "elsewhere"
    elsewhere.write_bytes(good)
    path.write_bytes(good)
    for number, kind in enumerate(replacements(path, elsewhere)):
        look(kind, number + 1)
    n = sum(kinds.values())
    print("  " + ", ".join(f"{count:,} × {kind}" for kind, count in kinds.items()))
    wanted = {"wrong": "wrong values", "crashes": "crashes", "executed": "executions", "unwarned": "faults without exactly one warning"}
    return [Figure.none_of("memo", name, tally[key], n) for key, name in wanted.items()]


def hit_time(folder: Path, n: int, *, judged: bool) -> Figure:
    """The median of single hits, each by a memo that has nothing in memory."""
    memo = Memo(folder / "timed", warn=print)
    memo.compute(LEVEL, lambda _: VALUE, SPEC)
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        hit = Memo(memo.folder, warn=print).lookup(LEVEL, SPEC)
        seconds.append(time.perf_counter() - start)
        assert hit is not None and hit.value == VALUE
    found = median(seconds) * 1000
    return Figure("memo", "median of a hit", f"{found:.3f} ms", "≤ 0.2 ms", found <= 0.2 if judged else None, n)
