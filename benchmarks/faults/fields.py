"""Every field of a real spec decides: changed in the smallest way, each leads to another key, and so to a miss."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults import Figure
from optkit.memo import Memo
from optkit.memo_entry import Key


def real_specs() -> dict[str, dict[str, Any]]:
    """The specs of ``optkit run`` on the bundled model, each with the samples of a shard: what is looked up in the memo."""
    from optkit.experiment import Experiment
    from optkit.request import Request, prepare

    request = Request(
        plugins=["precision", "int8"], profile="cpu", limit=4, set={"precision.dtype": "bfloat16", "generate.temperature": 0.5}
    )
    setup = prepare(request)
    digests = [sample.digest for sample in setup.samples.samples]
    return {name: {**spec, "samples": digests} for name, spec in Experiment(setup).specs.items()}


def mutations(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Place and value of the whole with one thing changed: each leaf, each key left out, each list shortened or turned round."""
    if isinstance(value, dict):
        for key, inner in value.items():
            for place, changed in mutations(inner, f"{path}.{key}"):
                yield place, value | {key: changed}
            yield f"{path}.{key} left out", {name: item for name, item in value.items() if name != key}
        yield f"{path} with a key more", value | {"one more": None}
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            for place, changed in mutations(inner, f"{path}[{index}]"):
                yield place, [*value[:index], changed, *value[index + 1 :]]
            yield f"{path}[{index}] left out", value[:index] + value[index + 1 :]
        if value != value[::-1]:
            yield f"{path} turned round", value[::-1]
        yield f"{path} with an item more", [*value, None]
    else:
        yield path, changed_leaf(value)
        yield f"{path} as text", f"{value} as text"


def changed_leaf(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return math.nextafter(value, math.inf)
    if isinstance(value, str):
        return value[:-1] + chr(ord(value[-1]) ^ 1) if value else " "
    return 0


def said(name: str, spec: dict[str, Any]) -> list[str]:
    return [name]


def prove(folder: Path) -> list[Figure]:
    memo = Memo(folder / "fields", warn=print)
    missed = wrong = 0
    for name, spec in real_specs().items():
        before = copy.deepcopy(spec)
        memo.compute("predictions", partial(said, name), spec)
        known = {Key.of(memo.folder, "predictions", spec).text}
        for place, changed in mutations(spec):
            missed += 1
            text = Key.of(memo.folder, "predictions", changed).text
            if text in known or memo.lookup("predictions", changed) is not None:
                wrong += 1
                print(f"{name}: {place} does not matter")
            known.add(text)
        assert spec == before
        hit = memo.lookup("predictions", spec)
        if hit is None or hit.value != [name]:
            wrong += 1
            print(f"{name}: the unchanged spec is no hit")
    return [Figure.none_of("memo", "changed fields of a run's spec that still hit", wrong, missed)]
