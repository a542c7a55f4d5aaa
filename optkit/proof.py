"""The verdict on a technique: was it at work, or did it do nothing?"""

from __future__ import annotations

from typing import Any

ACTIVE, NO_EFFECT, UNPROVEN = "active", "no effect", "not proven"


def verdict(facts: dict[str, Any], changes: dict[str, Any], baseline: dict[str, Any] | None) -> dict[str, Any]:
    """``active`` where the model changed or the facts differ from the untouched model's, else ``no effect``.

    :param facts: what ``prove_effect`` said of the optimized run. :param changes: what the model's snapshots showed.
    :param baseline: what ``prove_effect`` said of the untouched run; ``None`` when there was none to compare with.
    """
    said = {name: value for name, value in facts.items() if name != "summary"}
    other = {name: value for name, value in (baseline or {}).items() if name != "summary"}
    if changes or (baseline is not None and "error" not in facts and said and said != other):
        state = ACTIVE
    elif baseline is None or "error" in facts:
        state = UNPROVEN
    else:
        state = NO_EFFECT
    return {
        "verdict": state,
        "summary": facts.get("summary") or describe(changes) or facts.get("error", ""),
        "facts": facts,
        "changes": changes,
    }


def describe(changes: dict[str, Any]) -> str:
    """One line about what the snapshots showed."""
    parts = [f"{count} × {change}" for change, count in changes.get("modules_replaced", {}).items()]
    if "bytes" in changes:
        before, after = changes["bytes"]
        parts.append(f"{before / 1e6:.1f} → {after / 1e6:.1f} MB")
    if "parameters_changed" in changes and not parts:
        parts.append(f"{changes['parameters_changed']} parameters changed shape or dtype")
    if "values_changed" in changes and not parts:
        parts.append("weight values changed")
    return ", ".join(parts)
