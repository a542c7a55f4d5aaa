"""Scoring with compiled code: the layers of a batch, and the head over a chunk of the positions that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from optkit_plugins.kernels.decode.recorded import without_recording
from optkit_plugins.kernels.scoring.positions import BodyAndHead, asked_positions, in_chunks, right_padded, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit_plugins.kernels.attention.interface import EngineAttention
    from optkit_plugins.kernels.decode.layers import CompiledLayers

#: Scored rows, and positions of a chunk, are padded to a multiple of this, which keeps kernels aligned.
SCORE_MULTIPLE = 16

#: How an engine runs a compiled function of tensors: the bound method, a name for its graph, the arguments of ``torch.compile``.
Run = Callable[..., torch.Tensor]


class CompiledScorer:
    """Scores right-padded rows. Rows, lengths and positions are symbols: one graph serves all, and another single rows.

    :param run: ``run(method, name, arguments, *tensors)`` compiles the method once under that name, and calls it.
    :param by_layers: ``by_layers(work, kind)`` calls ``work`` with the layers compiled; where they cannot be, the body is one graph.
    :raises ValueError: for a model that does not fall into body and head.
    """

    def __init__(
        self, model: PreTrainedModel, attention: EngineAttention, pad: int, arguments: dict[str, Any], run: Run,
        layers: CompiledLayers | None = None, by_layers: Run | None = None,
    ):  # fmt: skip
        self.model, self.attention, self.pad, self.run = model, attention, pad, run
        self.layers, self.by_layers = layers, by_layers
        self.parts = BodyAndHead(model)
        self.arguments, _ = without_recording(arguments)  # a graph of each shape would be recorded anew

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        """As ``Engine.score``."""
        with torch.inference_mode():
            ids = self._ids(sequences)
            places = asked_positions(sequences, starts, ids.shape[1], ids.device)  # before the device is busy: copying would wait for it
            return split(in_chunks(self._chunk, self._hidden(ids), places, ids.flatten()[places + 1]), sequences, starts)

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        """As ``Engine.log_probs``: the head is not compiled for these."""
        with torch.inference_mode():
            ids = self._ids(sequences)
            hidden = self._hidden(ids)
        yield from self.parts.log_probs(hidden, sequences, starts, ids.shape[1])

    def _ids(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(len(sequence) for sequence in sequences)
        width = -(-max(longest, 2) // SCORE_MULTIPLE) * SCORE_MULTIPLE
        return right_padded(sequences, width, self.pad, self.model.device)

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of all columns, (rows × columns, hidden size)."""
        name = "hidden states of one row" if len(ids) == 1 else "hidden states"
        with self.attention.use("score"):
            if self.by_layers and self.layers and not self.layers.problem:
                return self.by_layers(lambda: self._body(ids), name).flatten(0, 1)
            torch._dynamo.maybe_mark_dynamic(ids, 1)
            if len(ids) > 1:
                torch._dynamo.maybe_mark_dynamic(ids, 0)
            return self.run(self._body, name, self.arguments, ids).flatten(0, 1)

    def _chunk(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        count = len(targets)
        fill = -count % SCORE_MULTIPLE
        hidden, targets = torch.nn.functional.pad(hidden, (0, 0, 0, fill)), torch.nn.functional.pad(targets, (0, fill))
        torch._dynamo.maybe_mark_dynamic(hidden, 0)
        torch._dynamo.maybe_mark_dynamic(targets, 0)
        return self.run(self.parts.scores, "scores", self.arguments, hidden, targets)[:count]

    def _body(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, columns, width). A mask of ones: padding is on the right, where no token looks."""
        return self.parts.hidden(ids, attention_mask=torch.ones_like(ids))
