"""A decode loop whose step is one compiled graph without inputs.

Everything that a step reads or writes lives in buffers of fixed shape and address: the KV cache, the tokens, the column that is
written next, and what sampling needs. So the step compiles once a bucket (rows × columns), can be recorded as a CUDA graph, and the
host has nothing to do between two steps but to start the next one.

Columns are absolute: prompts are padded on the left to ``prompt`` columns, and a row's first real token is at column ``start[row]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Steps between two looks at whether all texts have ended. A look costs a CPU a few microseconds, a GPU nothing: it is read later.
STEPS_PER_LOOK = 4


class FixedLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, columns, head size), allocated once; the write position is the caller's.

    Prefill writes the first columns and attends to its own keys only; decoding writes one column and attends to all, under a mask.
    Every layer is kept at full length: a sliding window is the mask's business, so that the shape never depends on the position.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, rows: int, columns: int, column: torch.Tensor):
        super().__init__()
        self.rows, self.columns, self.column = rows, columns, column
        self.prefill_columns: int | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def allocate(states: torch.Tensor) -> torch.Tensor:
            buffer = states.new_zeros(self.rows, states.shape[1], self.columns, states.shape[3])
            torch._dynamo.mark_static_address(buffer)
            return buffer

        self.keys, self.values = allocate(key_states), allocate(value_states)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.prefill_columns is None:
            self.keys.index_copy_(2, self.column, key_states)
            self.values.index_copy_(2, self.column, value_states)
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns = key_states.shape[0], key_states.shape[2]
        self.keys[:rows, :, :columns].copy_(key_states)
        self.values[:rows, :, :columns].copy_(value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.columns if self.prefill_columns is None else self.prefill_columns), 0

    def get_seq_length(self) -> Any:
        return self.column if self.prefill_columns is None else 0

    def get_max_length(self) -> int:
        return self.columns


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from logits (rows, vocabulary), on the device and without the host.

    :ivar penalty: repetition penalty (Keskar et al. 2019), 1.0 for none.
    :ivar warpers: transformers' stateless processors (temperature, top-k, top-p …), called as ``warper(None, scores)``.
    :ivar draw: sample; else the most probable token.
    """

    penalty: float = 1.0
    warpers: tuple[Callable[[Any, torch.Tensor], torch.Tensor], ...] = ()
    draw: bool = False

    def pick(self, logits: torch.Tensor, used: torch.Tensor | None, forbidden: torch.Tensor) -> torch.Tensor:
        """Ids of shape (rows,). ``used`` (rows, vocabulary) marks tokens of the row, ``forbidden`` (vocabulary,) those never to take."""
        scores = logits.float()
        if used is not None:
            scores = torch.where(used, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)
        scores = scores.masked_fill(forbidden, float("-inf"))
        if not self.draw:
            return scores.argmax(-1)
        for warper in self.warpers:
            scores = warper(None, scores)
        # argmax of p/Exp(1) is a draw from p: no host, no search, and allowed in a CUDA graph (unlike multinomial).
        return (scores.softmax(-1) / torch.empty_like(scores).exponential_()).argmax(-1)


class Slot:
    """Buffers of one bucket, and the compiled step over them."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int, sampler: Sampler, eos: Sequence[int]):
        config = model.config.get_text_config(decoder=True)
        device = model.device

        def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            made = torch.zeros(shape, dtype=dtype, device=device)
            torch._dynamo.mark_static_address(made)
            return made

        self.model, self.sampler = model, sampler
        self.rows, self.columns = rows, columns
        self.texts = buffer(rows, columns)
        self.column = buffer(1)
        self.start = buffer(rows, 1)
        self.done = buffer(rows, dtype=torch.bool)
        self.forbidden = buffer(config.vocab_size, dtype=torch.bool)
        self.used = buffer(rows, config.vocab_size, dtype=torch.bool) if sampler.penalty != 1.0 else None
        self.eos = torch.tensor(sorted(eos), dtype=torch.int64, device=device) if eos else None
        self.all_columns = torch.arange(columns, device=device)
        self.layers = [FixedLayer(rows, columns, self.column) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        self.windows = mask_windows(model)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, *, exact: bool, forbid_eos: bool) -> None:
        """Read left-padded prompts (real rows, prompt columns), and write the first new token."""
        rows, columns = ids.shape
        self.done.fill_(exact)
        self.done[rows:] = True
        self.forbidden.zero_()
        if forbid_eos and self.eos is not None:
            self.forbidden[self.eos] = True
        self.start.zero_()
        self.start[:rows, 0] = columns - mask.sum(1)
        self.texts[:rows, :columns] = ids
        if self.used is not None:
            self.used.zero_()
            self.used[:rows].scatter_(1, ids.where(mask.bool(), ids[:, -1:]), True)
        self.column.fill_(columns - 1)
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        for layer in self.layers:
            layer.prefill_columns = columns
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        for layer in self.layers:
            layer.prefill_columns = None
        self._write(logits.new_zeros(self.rows, logits.shape[-1]).index_copy_(0, torch.arange(rows, device=ids.device), logits))

    def step(self) -> torch.Tensor:
        """One token a row. This is what is compiled."""
        positions = (self.column - self.start).clamp(min=0)
        logits = self.model(
            input_ids=self.texts.index_select(1, self.column),
            attention_mask=self._masks(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        return self._write(logits)

    def _masks(self) -> Any:
        """Boolean masks (rows, 1, 1, columns), by layer type where the model asks for it."""
        seen = (self.all_columns <= self.column) & (self.all_columns >= self.start)
        masks = {
            kind: (seen if window is None else seen & (self.all_columns > self.column - window))[:, None, None, :]
            for kind, window in self.windows.items()
        }
        return masks.get("", masks)

    def _write(self, logits: torch.Tensor) -> torch.Tensor:
        tokens = self.sampler.pick(logits, self.used, self.forbidden)
        if self.used is not None:
            self.used.scatter_(1, tokens[:, None], True)
        if self.eos is not None:
            self.done.logical_or_(torch.isin(tokens, self.eos))
        self.column.add_(1)
        self.texts.index_copy_(1, self.column, tokens[:, None])
        return tokens


def mask_windows(model: PreTrainedModel) -> dict[str, int | None]:
    """Layer type -> width of its attention window (``None``: everything before). The key is "" where all layers take one mask."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
