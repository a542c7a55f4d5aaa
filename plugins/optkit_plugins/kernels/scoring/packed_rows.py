"""Scoring several samples in one row: positions start again with each, and none sees another."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from optkit import TransformersEngine, UnavailableError
from optkit_plugins.kernels.decode.loop import mask_windows
from optkit_plugins.kernels.scoring.positions import BodyAndHead, asked_positions, in_chunks, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext


class PackedEngine(TransformersEngine):
    """The default engine, scoring each batch as one row. Generation is the default engine's."""

    name = "packed"

    def __init__(self, model: PreTrainedModel, trial: TrialContext):
        super().__init__(model, trial)
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise UnavailableError(f"{type(model).__name__} takes no position_ids, so samples cannot share a row; set batching.kind=length")
        try:
            self.parts = BodyAndHead(model)
        except ValueError as error:
            raise UnavailableError(f"packed rows: {error}; set batching.kind=length") from None

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        with torch.inference_mode():
            ids = self._ids(sequences)
            places = asked_positions(sequences, starts, None, ids.device)
            return split(in_chunks(self.parts.scores, self._hidden(ids, sequences), places, ids[0, places + 1]), sequences, starts)

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        with torch.inference_mode():
            hidden = self._hidden(self._ids(sequences), sequences)
        yield from self.parts.log_probs(hidden, sequences, starts, None)

    def _ids(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """One row, (1, all tokens), of one sequence after another."""
        return torch.tensor([[token for sequence in sequences for token in sequence]], device=self.model.device)

    def _hidden(self, ids: torch.Tensor, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Hidden states (all tokens, width) of that row."""
        device = ids.device
        positions = torch.cat([torch.arange(len(sequence), device=device) for sequence in sequences])[None]
        sample = torch.repeat_interleave(torch.tensor([len(sequence) for sequence in sequences], device=device))
        return self.parts.hidden(ids, attention_mask=self._masks(sample), position_ids=positions)[0]

    def _masks(self, sample: torch.Tensor) -> Any:
        """Masks (1, 1, tokens, tokens), by layer type where the model asks for it: causal, and within one sample."""
        place = torch.arange(len(sample), device=sample.device)
        distance = place[:, None] - place[None, :]
        own = (sample[:, None] == sample[None, :]) & (distance >= 0)
        masks = {}
        for kind, window in mask_windows(self.model).items():
            mask = own if window is None else own & (distance < window)
            if self.model.config._attn_implementation == "eager":
                mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, torch.finfo(self.model.dtype).min)
            masks[kind] = mask[None, None]
        return masks.get("", masks)
