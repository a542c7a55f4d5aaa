"""Prompt lookup decoding: a draft is what followed the last place where the newest tokens stood, and one forward pass verifies all of it.

Everything lives in buffers of fixed shape, drafts and acceptance included, so that a step can be compiled and recorded as one graph.
Each row of a batch is at a column of its own.

Prompt Lookup Decoding (Saxena 2023); Fast Inference from Transformers via Speculative Decoding (Leviathan et al. 2023).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from optkit_plugins.kernels.decode.loop import FixedLayer, Sampler, Slot, fixed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RowLayer(FixedLayer):
    """A layer of fixed length whose rows are each written at a column of their own: ``column`` (rows, 1) and those that follow it."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.prefill_columns is not None:
            return super().update(key_states, value_states, *args, **kwargs)
        width, device = key_states.shape[2], key_states.device
        place = (torch.arange(self.rows, device=device)[:, None], slice(None), self.column + torch.arange(width, device=device))
        self.keys[place] = key_states.transpose(1, 2)
        self.values[place] = value_states.transpose(1, 2)
        return self.keys, self.values


class SpeculativeSlot(Slot):
    """The buffers of one batch whose steps verify ``drafts`` proposed tokens a row, so that a step makes 1 to ``drafts`` + 1 tokens.

    A text is the one that steps of one token make: a draft is kept up to the first token that the model would not have picked, and
    that pick takes its place. What was computed behind it is overwritten by the next step, and no token looks there before.

    :param columns: of prompt, new tokens and a whole draft with the token after it.
    :param ngram: tokens at the end of a text that are looked for, at most; a longer match is preferred, then a later one.
    :ivar column: (rows, 1) column of each row's newest token. :ivar stop: (rows, 1) column where it ends.
    :ivar accepted: (1,) drafted tokens that were kept since ``begin``, over all rows.
    """

    def __init__(
        self, model: PreTrainedModel, rows: int, columns: int, sampler: Sampler, eos: Collection[int], *,
        drafts: int, ngram: int, additive_mask: bool = False, spans: bool = False,
    ):  # fmt: skip
        super().__init__(model, rows, columns, sampler, eos, additive_mask=additive_mask, spans=spans)
        self.drafts, self.ngram = drafts, ngram
        device = self.texts.device
        self.column = fixed(torch.zeros(rows, 1, dtype=torch.int64, device=device))
        self.stop = fixed(torch.zeros(rows, 1, dtype=torch.int64, device=device))
        self.accepted = fixed(torch.zeros(1, dtype=torch.int64, device=device))
        self.layers = [RowLayer(rows, columns, self.column) for _ in self.layers]
        self.cache = Cache(layers=list(self.layers))

    def begin(self, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int, *, exact: bool) -> None:
        """Put left-padded prompts (real rows, prompt columns) into the buffers, and where each row ends. Then ``read``."""
        self.accepted.zero_()
        self.stop.fill_(ids.shape[1] + new_tokens - 1)
        self.put(ids, mask, exact=exact)

    def step(self) -> None:
        """One token a row, without a draft."""
        self.verify(self.texts[:, :0])

    def speculate(self) -> None:
        """Draft, verify, accept: 1 to ``drafts`` + 1 tokens a row."""
        self.verify(self.lookup()[0])

    def lookup(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft (rows, drafts) and whether anything matched (rows, 1).

        A match that reaches the end of the text goes on as the loop that it is; without any match the newest token is the draft.
        """
        run = torch.zeros_like(self.texts)
        alive = (self.all_columns < self.column) & (self.all_columns >= self.start)
        for back in range(self.ngram):
            newest = self.texts.gather(1, (self.column - back).clamp(min=0))
            alive = alive & (self.texts.roll(back, 1) == newest) & (self.all_columns - back >= self.start)
            run += alive
        rank = torch.where(self.all_columns < self.column, run * self.columns + self.all_columns, -1)
        best = rank.argmax(1, keepdim=True)
        ahead = torch.arange(self.drafts, device=best.device)
        source = best + 1 + ahead % (self.column - best).clamp(min=1)
        return self.texts.gather(1, source.clamp(max=self.columns - 1)), run.gather(1, best) > 0

    def verify(self, draft: torch.Tensor) -> None:
        """Verify ``draft`` (rows, any number) and take what the model agrees with, and its own next token."""
        tokens = torch.cat([self.texts.gather(1, self.column), draft], 1)
        columns = self.column + torch.arange(tokens.shape[1], device=tokens.device)
        logits = self.model(
            input_ids=tokens,
            attention_mask=self._row_masks(columns),
            position_ids=torch.minimum(columns, self.stop) - self.start,  # a draft may reach beyond the end, a model's positions not
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        picked = self._pick(logits, tokens)
        taken = 1 + (picked[:, :-1] == draft).long().cumprod(1).sum(1, keepdim=True)
        taken = torch.minimum(taken, 1 + (self.end.after(picked).long().cumsum(1) == 0).sum(1, keepdim=True))
        taken = torch.minimum(taken, self.stop - self.column).masked_fill(self.done[:, None], 0)
        self.accepted.add_((taken - 1).clamp(min=0).sum())
        self.texts.scatter_(1, columns + 1, picked)
        self.column.add_(taken)
        newest = self.texts.gather(1, self.column)
        if self.used is not None:
            kept = torch.arange(picked.shape[1], device=picked.device) < taken
            self.used.scatter_(1, torch.where(kept, picked, newest), True)
        self.done.logical_or_((self.column >= self.stop)[:, 0])
        self.done.logical_or_(self.end.after(newest)[:, 0])

    def _pick(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The model's own choice after each of ``tokens``, (rows, width)."""
        used = None
        if self.used is not None:  # a drafted token counts as used from its own place on
            own = torch.zeros_like(logits, dtype=torch.uint8).scatter_(2, tokens[:, :, None], 1)
            used = (self.used[:, None] | own.cummax(1).values.bool()).flatten(0, 1)
        return self.sampler.pick(logits.flatten(0, 1), used).view_as(tokens)

    def _row_masks(self, columns: torch.Tensor) -> Any:
        """Masks (rows, 1, width, all columns), or spans (2, rows, width, 1): each token of ``columns`` sees what stands before it."""

        def mask(window: int | None) -> torch.Tensor:
            return self._seen(self.all_columns, columns[:, :, None], self.start[:, :, None], window)[:, None]

        def span(window: int | None) -> torch.Tensor:
            first = self.start.expand_as(columns) if window is None else torch.maximum(self.start, columns - (window - 1))
            return torch.stack([first, columns])[..., None]

        return self._each_window(span if self.spans else mask)

    def _append(self, logits: torch.Tensor) -> None:
        """The first new token, of logits (rows, vocabulary)."""
        tokens = self.sampler.pick(logits, self.used)[:, None]
        if self.used is not None:
            self.used.scatter_(1, tokens, True)
        self.done.logical_or_(self.end.after(tokens)[:, 0])
        self.column.add_(1)
        self.done.logical_or_((self.column >= self.stop)[:, 0])
        self.texts.scatter_(1, self.column, tokens)
