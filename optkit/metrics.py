"""Metrics over predictions, in plain Python: another metric recomputes nothing but itself, and no torch is imported."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from optkit.errors import UsageError, quoted
from optkit.samples import Sample
from optkit.stats import BOOTSTRAP_SAMPLES, mcnemar, paired_bootstrap, wilson

Rows = list[dict[str, Any]]


def quality(rows: Rows, samples: list[Sample], baseline: Rows | None) -> dict[str, dict[str, Any]]:
    """Name -> value, n, and, against the baseline's predictions, difference and whether it may be claimed.

    ``perplexity`` exp(Σ nll / Σ tokens); ``exact_match`` share of texts equal to the answer; ``agreement`` share of texts equal to
    the baseline's; ``kl`` mean divergence from the baseline in nats a position (a lower bound).
    """
    found: dict[str, dict[str, Any]] = {}
    scored = [row for row in rows if "nll" in row]
    if scored:
        found["perplexity"] = _perplexity(scored, baseline)
    answered = [(row, sample) for row, sample in zip(rows, samples, strict=True) if "text" in row and sample.answer is not None]
    if answered:
        found["exact_match"] = _exact_match(answered, baseline)
    if baseline is not None:
        texts = [(row["text"], other["text"]) for row, other in zip(rows, baseline, strict=True) if "text" in row and "text" in other]
        if texts:
            same = sum(a == b for a, b in texts)
            low, high = wilson(same, len(texts))
            found["agreement"] = {"value": same / len(texts), "n": len(texts), "low": low, "high": high}
        diverging = [row["kl"] for row in rows if "kl" in row]
        if diverging:
            found["kl"] = {"value": sum(diverging) / len(diverging), "n": len(diverging)}
    return found


def _perplexity(rows: Rows, baseline: Rows | None) -> dict[str, Any]:
    nll, tokens = sum(row["nll"] for row in rows), sum(row["nll_tokens"] for row in rows)
    value = math.exp(min(nll / tokens, 700.0))
    answer: dict[str, Any] = {"value": value, "n": len(rows), "tokens": tokens}
    if baseline is not None:
        others = [row for row in baseline if "nll" in row]
        before = sum(row["nll"] for row in others) / sum(row["nll_tokens"] for row in others)
        answer["difference"] = value - math.exp(before)
        if len(rows) == len(others) >= BOOTSTRAP_SAMPLES // 2:
            pairs = [(b["nll"], b["nll_tokens"], a["nll"], a["nll_tokens"]) for a, b in zip(rows, others, strict=True)]
            low, high = paired_bootstrap(pairs)
            answer |= {"low": math.exp(before + low) - math.exp(before), "high": math.exp(before + high) - math.exp(before)}
            answer["differs"] = not low <= 0 <= high
    return answer


def _exact_match(answered: list[tuple[dict[str, Any], Sample]], baseline: Rows | None) -> dict[str, Any]:
    right = [row["text"].strip() == (sample.answer or "").strip() for row, sample in answered]
    low, high = wilson(sum(right), len(right))
    answer: dict[str, Any] = {"value": sum(right) / len(right), "n": len(right), "low": low, "high": high}
    if baseline is not None:
        texts = {row["digest"]: row.get("text", "") for row in baseline}
        before = [texts[row["digest"]].strip() == (sample.answer or "").strip() for row, sample in answered]
        answer |= {"difference": (sum(right) - sum(before)) / len(right), "p": mcnemar(before, right)}
        answer["differs"] = answer["p"] < 0.05
    return answer


def own(function: Callable[..., Any], rows: Rows, samples: list[Sample]) -> dict[str, dict[str, Any]]:
    """What a user's function of (predictions, samples) gives: one number, or numbers by name. Its failure is shown as its value."""
    name = getattr(function, "__name__", "metric")
    try:
        answer = function(rows, samples)
        values = answer if isinstance(answer, dict) else {name: answer}
        return {str(key): {"value": float(value), "n": len(rows)} for key, value in values.items()}
    except Exception as error:  # somebody else's code: its failure is a shown failure, not ours
        return {name: {"error": f"{type(error).__name__}: {error}"}}


def load_metric(text: str) -> Callable[..., Any]:
    """``module:function`` as a function of (predictions, samples). :raises UsageError: when there is none."""
    module, _, name = text.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise UsageError(
            f"--metric {quoted(text)[1:-1]}: {type(error).__name__}: {str(error)[:200]}; give MODULE:FUNCTION of an importable module"
        ) from None
    if not callable(function):
        raise UsageError(f"--metric {text}: not a function")
    return function
