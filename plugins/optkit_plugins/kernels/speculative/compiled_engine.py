"""The compiled engine with prompt lookup: draft, verification and acceptance in one graph, beside the graph of a plain step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from optkit.engine import pad_left, trim
from optkit_plugins.kernels.decode.engine import Bucket, CompiledEngine
from optkit_plugins.kernels.speculative.lookup import SpeculativeSlot
from optkit_plugins.kernels.speculative.payoff import Payoff

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext
    from optkit_plugins.kernels.decode.loop import Sampler

#: Steps between two looks at the texts, once a graph is compiled and recorded.
STEPS_PER_LOOK = 4
#: Calls of a graph that are not typical of it: it compiles, and is recorded.
COLD_CALLS = 2


@dataclass
class DraftBucket(Bucket):
    """``step`` makes one token a row, ``draft`` verifies a draft."""

    draft: Callable[[], None] = lambda: None
    calls: int = 0
    draft_calls: int = 0


class DraftingEngine(CompiledEngine):
    """Compiled steps that verify drafts while that pays, and plain ones where it does not.

    :param drafts: tokens a draft. :param ngram: newest tokens, at most, that its place must share.
    """

    def __init__(self, model: PreTrainedModel, trial: TrialContext, arguments: dict[str, Any], *, score: bool, drafts: int, ngram: int):
        super().__init__(model, trial, arguments, score=score)
        self.drafts, self.ngram = drafts, ngram
        self.payoff = Payoff()

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        if not prompts or new_tokens < 1:
            return [[] for _ in prompts]
        with torch.inference_mode(), self.attention.use("decode"):
            ids, mask = pad_left(prompts, self.pad, self.model.device)
            rows, width = ids.shape
            bucket = self._bucket(rows, width + new_tokens + self.drafts + 1, self._sampler(width))
            slot = bucket.slot
            assert isinstance(bucket, DraftBucket) and isinstance(slot, SpeculativeSlot)
            slot.begin(ids, mask, new_tokens, exact=exact)
            self._read(bucket, rows, width, ragged=any(len(prompt) < width for prompt in prompts))
            self._speculate(bucket, slot, rows)
            ends = (slot.column + 1)[:rows, 0].tolist()
            texts = [row[width:end] for row, end in zip(slot.texts[:rows].tolist(), ends, strict=True)]
        self.payoff.plain_passes += max(map(len, texts)) - 1
        self.payoff.accepted += int(slot.accepted)
        return [trim(row, self.eos, exact) for row in texts]

    def _speculate(self, bucket: DraftBucket, slot: SpeculativeSlot, rows: int) -> None:
        """Steps until every row is at its end: a few of one kind between two looks, never more than the longest row needs."""
        live, left, made = look(slot, rows)
        while live:
            draft = self.payoff.wants_draft()
            calls = bucket.draft_calls if draft else bucket.calls
            steps = 1 if calls < COLD_CALLS else max(1, min(STEPS_PER_LOOK, left // (self.drafts + 1 if draft else 1)))
            started = time.perf_counter()
            self._steps(bucket, draft, steps, first=calls == 0)
            before, (still, left, made) = made, look(slot, rows)
            seconds = (time.perf_counter() - started) / steps
            if draft:
                self.payoff.drafted += live * steps * self.drafts
                self.payoff.draft((made - before) / live / steps, seconds, steps)
            else:
                self.payoff.plain(seconds, steps)
            live = still

    def _steps(self, bucket: DraftBucket, draft: bool, steps: int, *, first: bool) -> None:
        step, name = (bucket.draft, f"{bucket.name}, drafts") if draft else (bucket.step, bucket.name)
        if draft:
            bucket.draft_calls += steps
        else:
            bucket.calls += steps
        self.tally.count(step, name, first=first)
        for _ in range(steps - 1):
            step()

    def _new_bucket(self, rows: int, columns: int, sampler: Sampler) -> DraftBucket:
        name = f"{rows} x {columns}"
        slot = SpeculativeSlot(
            self.model, rows, columns, sampler, self.eos, drafts=self.drafts, ngram=self.ngram,
            additive_mask=self.attention.additive_mask, spans=self.attention.spans,
        )  # fmt: skip
        step = self.compiled_step(slot.step, f"step of {name}")
        return DraftBucket(name, slot, step, draft=self.compiled_step(slot.speculate, f"draft of {name}"))


def look(slot: SpeculativeSlot, rows: int) -> tuple[int, int, int]:
    """Rows that are not at their end, tokens that the longest of them lacks, and tokens of all rows together. Waits for the device."""
    lacking = (slot.stop - slot.column)[:rows, 0].masked_fill(slot.done[:rows], 0)
    live, left, made = torch.stack([(lacking > 0).sum(), lacking.max(), slot.column[:rows].sum()]).tolist()
    return live, left, made
