"""A decode loop whose step is one compiled graph without inputs.

Everything that a step reads or writes lives in buffers of fixed shape and address: the KV cache, the tokens, the column that is
written next, and what sampling needs. So the step compiles once a bucket (rows × columns), can be recorded as a CUDA graph, and the
host has nothing to do between two steps but to start the next one.

Columns are absolute: prompts are padded on the left, and a row's first real token is at column ``start[row]``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from optkit.engine import NEVER

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FixedLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, columns, head size), allocated once; the write position is the caller's.

    Prefill writes the first columns and attends to its own keys only; decoding writes one column and attends to all, under a mask.
    Every layer is kept at full length: a sliding window is the mask's business, so that the shape never depends on the position.
    """

    is_compileable = True
    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, rows: int, columns: int, column: torch.Tensor):
        super().__init__()
        self.rows, self.columns, self.column = rows, columns, column
        self.prefill_columns: int | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def allocate(states: torch.Tensor) -> torch.Tensor:
            return fixed(states.new_zeros(self.rows, states.shape[1], self.columns, states.shape[3]))

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


def fixed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, marked as one whose address never changes: CUDA graphs then write to it in place."""
    torch._dynamo.mark_static_address(tensor)
    return tensor


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

    def pick(self, logits: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
        """Ids of shape (rows,). ``used`` (rows, vocabulary) marks tokens of the row."""
        scores = logits.float()
        if used is not None:
            scores = torch.where(used, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)
        if not self.draw:
            return highest(scores)
        for warper in self.warpers:
            scores = warper(None, scores)
        # argmax of p / Exp(1) is a draw from p: no search, no host, and allowed in a CUDA graph (unlike multinomial).
        return highest(scores.softmax(-1) / torch.empty_like(scores).exponential_())


def highest(scores: torch.Tensor) -> torch.Tensor:
    """``scores.argmax(-1)`` of (rows, vocabulary). On a GPU in two stages, or one program would read a whole row."""
    if not scores.is_cuda:
        return scores.argmax(-1)
    return highest_of_parts(scores)


def highest_of_parts(scores: torch.Tensor, size: int = 512) -> torch.Tensor:
    """The first highest of each part of ``size``, then of these: the first of equal ones, as ``argmax`` finds."""
    missing = -scores.shape[-1] % size
    parts = torch.nn.functional.pad(scores, (0, missing), value=float("-inf")).view(scores.shape[0], -1, size)
    values, places = parts.max(-1)
    best = values.argmax(-1, keepdim=True)
    return (best * size + places.gather(-1, best)).squeeze(-1)


class End:
    """Which tokens end a text, on the device. :param eos: their ids; there may be none."""

    def __init__(self, eos: Collection[int], device: torch.device):
        self.eos = torch.tensor(sorted(eos) or [NEVER], dtype=torch.int64, device=device)
        self.ids = fixed(self.eos.clone())

    def put(self, exact: bool) -> None:
        """From now on these end a text; with ``exact`` none does."""
        self.ids.fill_(NEVER) if exact else self.ids.copy_(self.eos)

    def after(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether a text ends behind each of ``tokens``."""
        return torch.isin(tokens, self.ids)


class Slot:
    """The buffers of one bucket, and the step over them.

    :ivar texts: (rows, columns) tokens, prompts and continuations. :ivar column: (1,) the column of the newest token.
    :ivar start: (rows, 1) column of each row's first token. :ivar done: (rows,) whether the row's text has ended.

    :param additive_mask: attention adds its mask to the scores. :param spans: it takes each row's first and last column instead.
    """

    def __init__(
        self, model: PreTrainedModel, rows: int, columns: int, sampler: Sampler, eos: Collection[int], *,
        additive_mask: bool = False, spans: bool = False,
    ):  # fmt: skip
        config = model.config.get_text_config(decoder=True)
        vocabulary, device = model.get_output_embeddings().weight.shape[0], model.device
        self.model, self.sampler, self.rows, self.columns = model, sampler, rows, columns
        self.texts = fixed(torch.zeros(rows, columns, dtype=torch.int64, device=device))
        self.column = fixed(torch.zeros(1, dtype=torch.int64, device=device))
        self.start = fixed(torch.zeros(rows, 1, dtype=torch.int64, device=device))
        self.done = fixed(torch.zeros(rows, dtype=torch.bool, device=device))
        self.used = fixed(torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)) if sampler.penalty != 1.0 else None
        self.end = End(eos, device)
        self.all_columns = fixed(torch.arange(columns, device=device))
        self.windows, self.spans = mask_windows(model), spans
        self.mask_dtype = model.dtype if additive_mask else None
        self.layers = [FixedLayer(rows, columns, self.column) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))

    def read(self, rows: int, width: int, *, ragged: bool) -> None:
        """Read the prompts that were ``put``, and write their first new token. Without inputs, as a step is.

        :param width: columns to read; those behind the prompts are computed for nothing: no token sees them, and steps overwrite them.
        :param ragged: whether rows have padding on their left. Without, no mask is needed.
        """
        ids, newest = self.texts[:rows, :width], self.column.reshape(-1)[:1]
        for layer in self.layers:
            layer.prefill_columns = width
        try:
            logits = self.model(
                input_ids=ids,
                attention_mask=self._prompt_masks(rows, width) if ragged else torch.ones_like(ids),
                position_ids=(torch.minimum(self.all_columns[:width], newest) - self.start[:rows]).clamp(min=0),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=newest,
            ).logits[:, -1]
        finally:
            for layer in self.layers:
                layer.prefill_columns = None
        every_row = logits.new_zeros(self.rows, logits.shape[-1])
        every_row[:rows] = logits
        self._append(every_row)

    def put(self, ids: torch.Tensor, mask: torch.Tensor, *, exact: bool) -> None:
        """Put left-padded prompts, (real rows, prompt columns), into the buffers and begin anew. :param exact: no token ends a text."""
        rows, columns = ids.shape
        self.done.zero_()
        self.done[rows:] = True
        self.end.put(exact)
        self.start.zero_()
        self.start[:rows, 0] = columns - mask.sum(1)
        self.texts[:rows, :columns] = ids
        self.column.fill_(columns - 1)
        if self.used is not None:
            self.used.zero_()
            self.used[:rows].scatter_(1, ids.where(mask.bool(), ids[:, -1:]), True)  # padding counts as the last token, not as itself

    def step(self) -> None:
        """One token a row. This is what is compiled."""
        logits = self.model(
            input_ids=self.texts.index_select(1, self.column),
            attention_mask=self._masks(),
            position_ids=self.column - self.start,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self._append(logits)

    def _masks(self) -> Any:
        """Masks of shape (rows, 1, 1, columns), or spans of shape (2, rows, 1, 1), by layer type where the model asks for it."""
        if not self.spans:
            return self._each_window(lambda window: self._seen(self.all_columns, self.column, self.start, window)[:, None, None, :])

        def span(window: int | None) -> torch.Tensor:
            first = self.start if window is None else torch.maximum(self.start, self.column - (window - 1))
            return torch.stack([first, self.column.expand_as(first)])[..., None]

        return self._each_window(span)

    def _prompt_masks(self, rows: int, width: int) -> Any:
        """Masks of shape (rows, 1, width, width), by layer type where the model asks for it. Padding sees itself, or it would be NaN."""
        place = self.all_columns[:width]

        def mask(window: int | None) -> torch.Tensor:
            seen = self._seen(place, place[:, None], self.start[:rows, None], window) | (place == place[:, None])
            return seen[:, None]

        return self._each_window(mask)

    def _seen(self, place: torch.Tensor, query: torch.Tensor, start: torch.Tensor, window: int | None) -> torch.Tensor:
        seen = (place <= query) & (place >= start)
        return seen if window is None else seen & (place > query - window)

    def _each_window(self, mask_of: Callable[[int | None], torch.Tensor]) -> Any:
        """The mask, in the form that attention takes, by layer type where the model asks for it."""
        masks = {}
        for kind, window in self.windows.items():
            mask = mask_of(window)
            if self.mask_dtype is not None:
                mask = torch.zeros_like(mask, dtype=self.mask_dtype).masked_fill(~mask, torch.finfo(self.mask_dtype).min)
            masks[kind] = mask
        return masks.get("", masks)

    def _append(self, logits: torch.Tensor) -> None:
        tokens = self.sampler.pick(logits, self.used)
        if self.used is not None:
            self.used.scatter_(1, tokens[:, None], True)
        self.done.logical_or_(self.end.after(tokens))
        self.column.add_(1)
        self.texts.index_copy_(1, self.column, tokens[:, None])


def mask_windows(model: PreTrainedModel) -> dict[str, int | None]:
    """Layer type -> width of its attention window (``None``: everything before). The key is "" where all layers take one mask."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


class EndWatch:
    """Tells whether all texts have ended, one look late, so that a GPU never waits for the host.

    At most two looks are under way: the host cannot run further ahead of the device than that.
    """

    def __init__(self, done: torch.Tensor):
        self.done = done
        self.pending: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def ended(self) -> bool:
        if self.done.device.type != "cuda":
            return bool(self.done.all())
        earlier, answer = self.pending, torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(self.done.all(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending = (answer, event)
        if earlier is None:
            return False
        earlier[1].synchronize()
        return bool(earlier[0])
