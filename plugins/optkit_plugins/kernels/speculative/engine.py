"""transformers' model in a loop of our own that verifies drafts, a batch of any size at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from optkit import TransformersEngine
from optkit.engine import pad_left, trim
from optkit_plugins.kernels.attention.interface import EngineAttention
from optkit_plugins.kernels.decode.engine import check_supported, sampler_of
from optkit_plugins.kernels.speculative.lookup import SpeculativeSlot
from optkit_plugins.kernels.speculative.payoff import Payoff

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext


class SpeculativeEngine(TransformersEngine):
    """The default engine with prompt lookup: the same greedy texts, in fewer forward passes where texts repeat what came before."""

    name = "speculative"

    def __init__(self, model: PreTrainedModel, trial: TrialContext, *, adaptive: bool = True):
        super().__init__(model, trial)
        self.attention = EngineAttention(model)
        check_supported(model, self.attention, "speculate")
        self.payoff = Payoff(adaptive)

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        if not prompts or new_tokens < 1:
            return [[] for _ in prompts]
        with torch.inference_mode():
            ids, mask = pad_left(prompts, self.pad, self.model.device)
            slot = self._slot(ids.shape[0], ids.shape[1], new_tokens)
            slot.begin(ids, mask, new_tokens, exact=exact)
            slot.read(ids.shape[0], ids.shape[1], ragged=not bool(mask.all()))
            self._decode(slot)
            width = ids.shape[1]
            ends = (slot.column + 1)[:, 0].tolist()
            texts = [row[width:end] for row, end in zip(slot.texts.tolist(), ends, strict=True)]
        self.payoff.plain_passes += max(map(len, texts)) - 1
        self.payoff.accepted += int(slot.accepted)
        return [trim(row, self.eos, exact) for row in texts]

    def _slot(self, rows: int, width: int, new_tokens: int) -> SpeculativeSlot:
        """Buffers for this batch; sampling as ``generate`` would do it."""
        sampler = sampler_of(self, width, "speculate")
        drafts, ngram = self.trial.settings["generate.prompt_lookup_tokens"], self.trial.settings["generate.prompt_lookup_ngram"]
        columns = width + new_tokens + drafts + 1
        additive = self.attention.additive_mask
        return SpeculativeSlot(self.model, rows, columns, sampler, self.eos, drafts=drafts, ngram=ngram, additive_mask=additive)

    def _decode(self, slot: SpeculativeSlot) -> None:
        """Steps until every row is at its end. A row without a match takes a plain step where all do."""
        live = slot.rows - int(slot.done.sum())
        while live:
            started, before = time.perf_counter(), int(slot.accepted)
            lookup = slot.lookup() if self.payoff.wants_draft() else None
            if lookup and bool((lookup[1] & ~slot.done[:, None]).any()):
                slot.verify(lookup[0])
                accepted = int(slot.accepted) - before
                self.payoff.drafted += live * slot.drafts
                self.payoff.draft(1 + accepted / live, time.perf_counter() - started)
                live = slot.rows - int(slot.done.sum())
            else:
                slot.step()
                live = slot.rows - int(slot.done.sum())
                self.payoff.plain(time.perf_counter() - started)
