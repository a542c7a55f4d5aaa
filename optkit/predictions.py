"""What an engine says of each sample: the raw material of every metric, kept as JSON so that another metric recomputes nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from optkit.samples import Sample

if TYPE_CHECKING:
    import torch

    from optkit.session import Session

#: Samples, positions and entries of the baseline's distributions that are kept for the divergence.
DIVERGENCE_SAMPLES, DIVERGENCE_POSITIONS, DIVERGENCE_TOP = 64, 32, 16


def predict(session: Session, samples: list[Sample], reference: dict[str, Any] | None, task: str) -> list[dict[str, Any]]:
    """One row a sample: ``text`` and ``tokens`` (task generate), ``nll`` in nats over ``nll_tokens``, ``kl`` against the baseline.

    In the baseline (``reference`` None) rows hold ``path`` and ``top`` instead of ``kl``: the token ids of the first positions and the
    baseline's largest log probabilities there.
    """
    rows: list[dict[str, Any]] = [{"id": sample.id, "digest": sample.digest} for sample in samples]
    prompts = [index for index, sample in enumerate(samples) if sample.text is None]
    if task == "generate" and prompts:
        _generate(session, samples, prompts, rows)
    if session.engine.cannot_score is None:
        _score(session, samples, rows)
        for index in prompts_for_divergence(samples):
            _diverge(session, samples[index], rows[index], reference)
    return rows


def prompts_for_divergence(samples: list[Sample]) -> range:
    return range(min(len(samples), DIVERGENCE_SAMPLES))


def _generate(session: Session, samples: list[Sample], chosen: list[int], rows: list[dict[str, Any]]) -> None:
    limit = int(session.plan.settings["generate.max_new_tokens"])
    subset = [samples[index] for index in chosen]
    done = 0
    for batch in session.batches(subset, by_length=True):
        outputs = session.engine.generate([subset[index].prompt_ids for index in batch], new_tokens=limit)
        for index, output in zip(batch, outputs, strict=True):
            rows[chosen[index]] |= {
                "text": session.tokenizer.decode(output, skip_special_tokens=True),
                "tokens": len(output),
                "ids": output[:DIVERGENCE_POSITIONS],
            }
        done += len(batch)
        session.core.report(f"generated {done} of {len(subset)}")


def _score(session: Session, samples: list[Sample], rows: list[dict[str, Any]]) -> None:
    chosen = [index for index, sample in enumerate(samples) if sample.answer_ids]
    subset = [samples[index] for index in chosen]
    for batch in session.batches(subset, by_length=True) if subset else []:
        members = [subset[index] for index in batch]
        scores = session.engine.score([sample.prompt_ids + sample.answer_ids for sample in members], [sample.start for sample in members])
        for index, score in zip(batch, scores, strict=True):
            rows[chosen[index]] |= {"nll": -float(score.double().sum()), "nll_tokens": len(score)}


def _diverge(session: Session, sample: Sample, row: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """Divergence along a path of tokens: the answer where there is one, else what the baseline generated."""
    import torch

    if reference is None:
        path = sample.answer_ids[:DIVERGENCE_POSITIONS] or row.get("ids") or []
    else:
        path = reference.get(sample.digest, {}).get("path") or []
    if not path:
        return
    with torch.inference_mode():
        rows = next(iter(session.engine.log_probs([sample.prompt_ids + path], [len(sample.prompt_ids)])))
    if reference is None:
        top = rows.topk(min(DIVERGENCE_TOP, rows.shape[1]))
        row["path"] = path
        row["top"] = [
            [ids, [float(f"{value:.9g}") for value in values]]  # all that float32 holds: rounded more, equal models would seem to differ
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
    else:
        row["kl"] = divergence(reference[sample.digest]["top"], rows)


def divergence(top: list[Any], rows: torch.Tensor) -> float:
    """Mean Kullback–Leibler divergence in nats a position, of the baseline from these rows.

    Taken over the baseline's largest entries and the rest as one: by the data-processing inequality a lower bound of the whole.
    """
    total = 0.0
    for (ids, logs), row in zip(top, rows, strict=True):
        others = row[ids].double().tolist()
        kept = sum(math.exp(value) for value in logs)
        mine = sum(math.exp(value) for value in others)
        total += sum(math.exp(p) * (p - q) for p, q in zip(logs, others, strict=True))
        rest, rest_mine = max(1 - kept, 0.0), max(1 - mine, 1e-12)
        if rest > 1e-6:
            total += rest * (math.log(rest) - math.log(rest_mine))
    return max(total / max(len(top), 1), 0.0)
