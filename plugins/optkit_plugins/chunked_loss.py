"""chunked-loss: scoring with the head over a chunk of positions at a time, and over none that nobody asks for.

A plain forward pass makes logits of every token over the whole vocabulary, and float32 copies of them on the way to a loss: at a vocabulary
of 128,256 that is more memory than the rest of the pass. Here the head sees the answer's positions only, in chunks, and each chunk's
logits are forgotten before the next. The values are the same; larger batches fit. It gains little where vocabulary and batches are small.

Cut Your Losses in Large-Vocabulary Language Models (Wijmans et al. 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from optkit import Engine, Options, Technique, TrialContext, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ChunkedLossOptions(Options):
    chunk: int | None = Field(None, ge=1, description="positions that go through the head together; default 256 on a CPU, 4096 on a GPU")


technique = Technique(
    name="chunked-loss",
    stage="engine",
    summary="scoring without logits of the whole batch: the head sees the scored positions only, a chunk at a time; same values",
    roles=frozenset({"engine"}),
    honours=frozenset({"generate.*"}),
    refuses=frozenset({"positions-restart", "outside-torch"}),
    tasks=frozenset({"score"}),
    options=ChunkedLossOptions,
    paper="https://arxiv.org/abs/2411.09009",
    tested_on=("cpu", "NVIDIA H200"),
)


@hookimpl
def build_engine(model: PreTrainedModel, trial: TrialContext) -> Engine:
    from optkit_plugins.kernels.scoring.engine import ChunkedEngine

    options = trial.options
    assert isinstance(options, ChunkedLossOptions)
    trial.notes["engine"] = engine = ChunkedEngine(model, trial, options.chunk)
    return engine


@hookimpl
def prove_effect(trial: TrialContext) -> dict[str, Any]:
    """How many positions the head saw, and how many of them at a time."""
    engine = trial.notes.get("engine")
    if engine is None or not engine.computed:
        return {"head": "all positions at once", "summary": "the head sees all positions at once"}
    return {
        "head": "chunks",
        "positions_computed": engine.computed,
        "positions_through_head": engine.through_head,
        "positions_at_a_time": engine.largest,
        "summary": f"head over {engine.through_head} of {engine.computed} positions, at most {engine.largest} at a time",
    }
