"""Metrics over an experiment's predictions: ours remembered, those of plugins and of the user computed each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from optkit import metrics
from optkit.canonical import digest
from optkit.context import TrialContext
from optkit.errors import OptkitError
from optkit.folders import cache_folder
from optkit.memo import Memo
from optkit.plan import Plan
from optkit.request import Setup
from optkit.samples import Sample

Rows = list[dict[str, Any]]


def add(result: dict[str, Any], setup: Setup, memo: Memo, predictions: dict[str, Rows], code: str, own: Callable[..., Any] | None) -> None:
    """Give every arm of ``result`` that has predictions its ``quality``.

    :param predictions: by plan. :param code: what decides our metrics besides their inputs. :param own: the user's metric.
    """
    samples = setup.samples.samples
    for row, plan in zip(result["arms"], setup.all_plans, strict=True):
        rows = predictions.get(row["name"])
        if rows is None:
            continue
        baseline = None if plan is setup.baseline else predictions.get("baseline")
        spec = {"rows": digest(rows), "baseline": digest(baseline), "samples": setup.samples.digest, "code": code}
        hit = memo.lookup("metrics", spec)  # without joblib, which a hit does not need
        if hit is None:
            quality, _ = memo.compute("metrics", partial(measured, rows, samples, baseline), spec)
        row["quality"] = dict(hit.value if hit else quality)
        if own is not None:
            row["quality"] |= metrics.own(own, rows, samples)
        add_of_plugins(row["quality"], setup, plan, rows)


def measured(rows: Rows, samples: list[Sample], baseline: Rows | None, spec: dict[str, Any]) -> dict[str, Any]:
    """Our metrics of one arm, in the form that the memo calls."""
    return metrics.quality(rows, samples, baseline)


def add_of_plugins(quality: dict[str, Any], setup: Setup, plan: Plan, rows: Rows) -> None:
    """Answers to the hook ``evaluate``. :raises OptkitError: for a name that is given twice."""
    for step in plan.steps:
        hook = setup.registry.hook(step.name, "evaluate")
        if hook is None:
            continue
        trial = TrialContext(
            step.name, step.options, plan.settings, setup.task, setup.machine.device, setup.request.seed, setup.machine, setup.source,
            cache_folder(setup.request.cache_dir),
        )  # fmt: skip
        for name, value in (hook(outputs=rows, samples=setup.samples.samples, trial=trial) or {}).items():
            if name in quality:
                raise OptkitError(f"the metric '{name}' is given twice, the second time by {step.name}; leave out one of them")
            quality[name] = {"value": float(value), "n": len(rows)}
