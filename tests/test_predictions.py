"""Divergence of a plan's distributions from the baseline's, beside float64."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from optkit.predictions import DIVERGENCE_TOP, _diverge

torch = pytest.importorskip("torch")

SAMPLE: Any = SimpleNamespace(digest="one", prompt_ids=[1, 2], answer_ids=[3, 4, 5, 6])


def distributions(sharpness: float, seed: int = 0) -> Any:
    """Log probabilities of four positions over 300 tokens, float32: the sharper, the nearer to certainty."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(seed)) * sharpness
    return logits.log_softmax(-1)


def told(baseline: Any, plan: Any) -> float:
    """The divergence that a run notes; what it keeps of the baseline goes through JSON, as between processes."""
    row: dict[str, Any] = {}
    session: Any = SimpleNamespace(engine=SimpleNamespace(log_probs=lambda sequences, starts: iter([baseline])))
    _diverge(session, SAMPLE, row, None)
    reference = {"one": json.loads(json.dumps(row))}
    session.engine.log_probs = lambda sequences, starts: iter([plan])
    answer: dict[str, Any] = {}
    _diverge(session, SAMPLE, answer, reference)
    return float(answer["kl"])


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0, 30.0])
def test_equal_distributions_do_not_diverge(sharpness: float) -> None:
    same = distributions(sharpness)
    assert told(same, same.clone()) <= 1e-12


@pytest.mark.parametrize("sharpness", [1.0, 5.0])
def test_it_is_the_divergence_of_the_largest_entries_and_the_rest_as_one(sharpness: float) -> None:
    baseline, plan = distributions(sharpness), distributions(sharpness, seed=0) * 1.01
    plan = plan.log_softmax(-1)
    p, q = baseline.double().exp(), plan.double().exp()
    best = p.topk(DIVERGENCE_TOP).indices
    coarse_p, coarse_q = p.gather(1, best), q.gather(1, best)
    coarse_p, coarse_q = (torch.cat([part, 1 - part.sum(1, keepdim=True)], 1) for part in (coarse_p, coarse_q))
    expected = float((coarse_p * (coarse_p / coarse_q).log()).sum(1).mean())
    assert told(baseline, plan) == pytest.approx(expected, rel=1e-3)
    assert 0 < expected <= float((p * (p / q).log()).sum(1).mean())
