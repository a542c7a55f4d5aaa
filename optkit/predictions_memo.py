"""Predictions kept in shards: what was computed together lies together, and ten new samples compute ten.

A shard is one memo entry: the plan's identity and the digests of its samples -> their rows. A small entry a plan lists its shards; a
lost list costs time, never a wrong value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optkit.memo import Memo
from optkit.samples import Sample

Rows = list[dict[str, Any]]


def known_predictions(memo: Memo, spec: dict[str, Any], samples: list[Sample]) -> tuple[Rows, float] | None:
    """The rows of all samples and the seconds that computing them took, or ``None`` where one is missing."""
    rows, seconds = _gather(memo, spec, samples)
    return None if any(row is None for row in rows) else ([row for row in rows if row is not None], seconds)


def remember_predictions(
    memo: Memo,
    spec: dict[str, Any],
    samples: list[Sample],
    compute: Callable[[list[Sample]], Rows],
    *,
    force: bool = False,
    keep: bool = True,
) -> Rows:
    """The rows of all samples: those that are known, and the others computed in one shard and kept.

    :param keep: without it nothing is written: the rows hold texts.
    """
    if not keep:
        return compute(samples)
    rows: list[dict[str, Any] | None] = [None] * len(samples) if force else _gather(memo, spec, samples)[0]
    missing = [sample for sample, row in zip(samples, rows, strict=True) if row is None]
    if not missing:
        return [row for row in rows if row is not None]
    digests = [sample.digest for sample in missing]
    fresh, _ = memo.compute("predictions", lambda _: compute(missing), {**spec, "samples": digests}, force=force)
    shards = [shard for shard in _shards(memo, spec) if shard != digests]
    memo.compute("shards", lambda _: [*shards, digests], spec, force=True)
    found = iter(fresh)
    return [{**(next(found) if row is None else row), "id": sample.id} for sample, row in zip(samples, rows, strict=True)]


def _gather(memo: Memo, spec: dict[str, Any], samples: list[Sample]) -> tuple[list[dict[str, Any] | None], float]:
    wanted = {sample.digest for sample in samples}
    known: dict[str, dict[str, Any]] = {}
    seconds = 0.0
    for digests in _shards(memo, spec):
        if wanted & set(digests) - known.keys():
            hit = memo.lookup("predictions", {**spec, "samples": digests})
            if hit is not None:
                known |= {row["digest"]: row for row in hit.value}
                seconds += hit.seconds
    rows = [known.get(sample.digest) for sample in samples]
    return [row and {**row, "id": sample.id} for sample, row in zip(samples, rows, strict=True)], seconds


def _shards(memo: Memo, spec: dict[str, Any]) -> list[list[str]]:
    hit = memo.lookup("shards", spec)
    return hit.value if hit is not None else []
