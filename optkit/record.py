"""Rows of the record: what one arm did, its limit, and values that JSON can hold."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from optkit import compare, measure
from optkit.plan import Plan


def finite(value: Any) -> Any:
    """The value with every NaN and infinity as ``None``, which JSON can hold and a table shows as missing."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def arm_row(arm: compare.Arm, plan: Plan, proof: dict[str, Any]) -> dict[str, Any]:
    """One arm as the record holds it."""
    return {
        "name": arm.name,
        "steps": [{"name": step.name, "options": step.options.model_dump(mode="json"), "version": step.version} for step in plan.steps],
        "settings": plan.settings.to_json(),
        "state": arm.state,
        "reason": arm.reason,
        "log": arm.log[-4000:],
        "seconds": arm.rounds,
        "tokens": arm.tokens,
        "cold_seconds": arm.colds[0] if arm.colds else None,
        "cold_again_seconds": median(arm.colds[1:]) if arm.colds[1:] else None,
        "loaded": arm.loaded,
        "peak_bytes": arm.peak_bytes,
        "joules_per_token": sum(arm.joules) / len(arm.joules) if arm.joules else None,
        "proof": proof,
    }


def limit_seconds(arm: compare.Arm, plan: Plan, peaks: dict[str, Any], tokens: int) -> float | None:
    """The least time that the hardware allows this arm's own weights, batches and devices for the timed unit."""
    if not peaks or not arm.loaded.get("work"):
        return None
    work = measure.Work(**arm.loaded["work"])
    measured = measure.Peaks(peaks["read_bandwidth"], peaks["flops"], peaks["dtype"])

    def least(lengths: list[list[int]]) -> float:
        if plan.task == "generate":
            return measure.generate_limit_seconds(work, measured, lengths, tokens)
        return measure.score_limit_seconds(work, measured, lengths)

    return measure.limit_over_devices(least, arm.loaded["lengths"] if plan.devices else peaks["lengths"], plan.devices)
