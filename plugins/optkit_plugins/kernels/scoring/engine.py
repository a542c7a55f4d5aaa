"""transformers' model, scored without logits beyond what is asked. Generation is the default engine's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from optkit import TransformersEngine, UnavailableError
from optkit.engine import pad_right
from optkit_plugins.kernels.scoring.positions import BodyAndHead, asked_positions, in_chunks, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext


class ChunkedEngine(TransformersEngine):
    """The default engine, scoring with the head over chunks of the positions that are asked for.

    :ivar computed: positions that the model has computed while scoring. :ivar through_head: those of them that the head has seen.
    :ivar largest: the most of them at a time.
    """

    name = "chunked"

    def __init__(self, model: PreTrainedModel, trial: TrialContext, chunk: int | None = None):
        super().__init__(model, trial)
        self.chunk = chunk
        self.computed = self.through_head = self.largest = 0
        try:
            self.parts = BodyAndHead(model)
        except ValueError as error:
            raise UnavailableError(f"{error}, so its head cannot be taken apart; leave out chunked-loss") from None

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        with torch.inference_mode():
            ids, mask = pad_right(sequences, self.pad, self.model.device)
            places = asked_positions(sequences, starts, ids.shape[1], ids.device)
            return split(in_chunks(self._head, self._hidden(ids, mask), places, ids.flatten()[places + 1], self.chunk), sequences, starts)

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        with torch.inference_mode():
            ids, mask = pad_right(sequences, self.pad, self.model.device)
            hidden = self._hidden(ids, mask)
        yield from self.parts.log_probs(hidden, sequences, starts, ids.shape[1])

    def _hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states of all columns, (rows × columns, hidden size)."""
        self.computed += ids.numel()
        return self.parts.hidden(ids, attention_mask=mask).flatten(0, 1)

    def _head(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.through_head += len(targets)
        self.largest = max(self.largest, len(targets))
        return self.parts.scores(hidden, targets)
