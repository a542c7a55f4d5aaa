"""Scoring without logits beyond what is asked: the head sees only the positions that are scored, a chunk of them at a time.

A plain forward pass makes (tokens × vocabulary) logits: 4.2 GB in bf16 for 16,384 tokens of a vocabulary of 128,256, and as much again
for each float32 copy on the way to a loss. Here hidden states are gathered first, then head, log-sum-exp and target are taken together.

Cut Your Losses in Large-Vocabulary Language Models (Wijmans et al. 2024) names the problem; the chunks are its plain remedy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Positions that go through the head together: enough to keep the device busy, few enough to be forgotten.
CHUNK = {"cpu": 256, "cuda": 4096}
#: Rounding that the model's own logits and those of body and head apart may differ by: other shapes take other kernels.
AGREEMENT = 1e-2


class Given(torch.nn.Module):
    """Stands for a model's body: its hidden states are the embeddings that it is given, its answer is of the body's own type."""

    def __init__(self, answer: type):
        super().__init__()
        self.answer = answer

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> Any:
        return self.answer(last_hidden_state=inputs_embeds)


class BodyAndHead:
    """A causal language model in two: hidden states of tokens, and logits of hidden states.

    The head is the model's own ``forward`` around a body that only hands on what it is given, so that soft caps, scales and biases
    are those of the model. :raises ValueError: for a model that does not fall into two this way.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        path = body_path(model)
        self.body = model.get_submodule(path)
        ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
        with torch.inference_mode():
            answer = self.body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            self.tail = with_part(model, path.split("."), Given(type(answer)))
            self._check(ids, answer.last_hidden_state)

    def hidden(self, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """(rows, columns, width) of ids (rows, columns)."""
        return self.body(input_ids=ids, use_cache=False, **arguments).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(positions, vocabulary) of hidden states (positions, width)."""
        return self.tail(inputs_embeds=hidden[None], use_cache=False).logits[0]

    def scores(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Natural log probabilities, float32 (float64 of a float64 model), of ``targets`` (positions,) after ``hidden`` (positions, width)."""
        logits = self.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    def log_probs(
        self, hidden: torch.Tensor, sequences: Sequence[Sequence[int]], starts: Sequence[int], row_width: int | None
    ) -> Iterator[torch.Tensor]:
        """As ``Engine.log_probs``, of the hidden states (all positions, width) of a batch; ``row_width`` as in ``asked_positions``."""
        places = asked_positions(sequences, starts, row_width, hidden.device)
        for chosen in split(places, sequences, starts):
            with torch.inference_mode():
                rows = self.logits(hidden.index_select(0, chosen)).float().log_softmax(-1)
            yield rows

    def _check(self, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        whole = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
        apart = self.logits(hidden[0]).float()
        if whole.shape != apart.shape or not torch.allclose(whole, apart, rtol=AGREEMENT, atol=AGREEMENT * float(whole.abs().max())):
            raise ValueError(f"{type(self.model).__name__} is more than a body and a head")


def body_path(model: PreTrainedModel) -> str:
    """Name of the module that gives hidden states to the head. :raises ValueError: where none is found."""
    body = model.get_decoder()
    for name, module in model.named_modules():
        if name and module is body:
            return name
    raise ValueError(f"{type(model).__name__} has no body beside its head")


def with_part(module: torch.nn.Module, path: Sequence[str], part: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module that shares everything but the part at ``path``."""
    own = copy.copy(module)
    own._modules = dict(module._modules)
    own._modules[path[0]] = part if len(path) == 1 else with_part(module.get_submodule(path[0]), path[1:], part)
    return own


def asked_positions(sequences: Sequence[Sequence[int]], starts: Sequence[int], row_width: int | None, device: Any) -> torch.Tensor:
    """Where the hidden states that are asked for lie in a flat batch; the token that each should predict is the next one there.

    :param row_width: columns of a padded row, or ``None`` where sequences follow each other without padding.
    """
    places, begin = [], 0
    for sequence, start in zip(sequences, starts, strict=True):
        places.append(torch.arange(begin + start - 1, begin + len(sequence) - 1))
        begin += row_width if row_width is not None else len(sequence)
    return torch.cat(places).to(device)


def right_padded(sequences: Sequence[Sequence[int]], width: int, pad: int, device: Any) -> torch.Tensor:
    """Ids (rows, ``width``). Made of one tensor a row: lists of lists would keep a GPU waiting for milliseconds."""
    ids = torch.full((len(sequences), width), pad)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids.to(device)


def in_chunks(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    places: torch.Tensor,
    targets: torch.Tensor,
    chunk: int | None = None,
) -> torch.Tensor:
    """``score`` of the hidden states (all positions, width) at ``places``, at most ``chunk`` of them at a time (``CHUNK`` by default)."""
    size = chunk or CHUNK.get(hidden.device.type, CHUNK["cpu"])
    parts = [score(hidden.index_select(0, chosen), wanted) for chosen, wanted in zip(places.split(size), targets.split(size), strict=True)]
    return torch.cat(parts)


def split(flat: torch.Tensor, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
    """One value a position that is asked for, as one tensor a sequence."""
    return list(flat.split([len(sequence) - start for sequence, start in zip(sequences, starts, strict=True)]))
