"""A decode step over rows of unequal length, each with a column of its own: a row that is done takes another prompt while others go on.

Rows begin at column 0 and have no padding. New prompts are read packed, one after another in a single row, so that nothing is computed on
padding; their keys and values are then scattered to the rows. Orca (Yu et al. 2022): iteration-level scheduling.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from optkit_plugins.kernels.decode.loop import Sampler, fixed, mask_windows
from optkit_plugins.kernels.ragged.attention import packed_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit_plugins.kernels.ragged.schedule import Admission


@dataclass(frozen=True)
class Places:
    """A place in the cache for each token: its row and its column, both (tokens,)."""

    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int, int]], device: torch.device) -> Places:
        """:param runs: (row, first column, one past the last column)."""
        rows = [row for row, begin, end in runs for _ in range(begin, end)]
        columns = [column for _, begin, end in runs for column in range(begin, end)]
        return cls(*on(device, [rows, columns]))


def on(device: torch.device, numbers: Sequence[Any]) -> torch.Tensor:
    """Whole numbers on ``device``, without waiting for what it is doing."""
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, columns, head size), allocated once.

    :ivar reading: where the tokens of packed prompts go, or ``None`` while decoding. :ivar seen: the places of everything that they
        attend to, where that is more than themselves.
    """

    is_compileable = True
    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, columns: int, decoding: Places):
        super().__init__()
        self.columns, self.decoding = columns, decoding
        self.reading: Places | None = None
        self.seen: Places | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def allocate(states: torch.Tensor) -> torch.Tensor:
            return fixed(states.new_zeros(len(self.decoding.rows), states.shape[1], self.columns, states.shape[3]))

        self.keys, self.values = allocate(key_states), allocate(value_states)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.reading is None:
            self.keys[self.decoding.rows, :, self.decoding.columns] = key_states[:, :, 0]
            self.values[self.decoding.rows, :, self.decoding.columns] = value_states[:, :, 0]
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[self.reading.rows, :, self.reading.columns] = key_states[0].transpose(0, 1)
        self.values[self.reading.rows, :, self.reading.columns] = value_states[0].transpose(0, 1)
        if self.seen is None:
            return key_states, value_states
        keys, values = (states[self.seen.rows, :, self.seen.columns] for states in (self.keys, self.values))  # (tokens, heads, size)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def copy(self, source: torch.Tensor, places: Places) -> None:
        """Copy from the rows ``source``, at the same columns. Everything is read before anything is written."""
        self.keys[places.rows, :, places.columns] = self.keys[source, :, places.columns]
        self.values[places.rows, :, places.columns] = self.values[source, :, places.columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given

    def get_max_length(self) -> int:
        return self.columns


class RaggedSlot:
    """The buffers of ``rows`` sequences of at most ``columns`` tokens, and the step over them.

    :ivar texts: (rows, columns) new tokens, each at its own column. :ivar column: (rows,) the column of each row's newest token.
    :ivar last: (rows,) the column of the last token that a row may have. :ivar done: (rows,) whether the row's text has ended.
    :ivar spans: attention takes each row's first and last column instead of a mask, and reads nothing for rows that are done.
    """

    def __init__(self, model: PreTrainedModel, rows: int, columns: int, sampler: Sampler, eos: Collection[int], *, spans: bool = False):
        config = model.config.get_text_config(decoder=True)
        vocabulary, device = model.get_output_embeddings().weight.shape[0], model.device
        self.model, self.sampler, self.rows, self.columns = model, sampler, rows, columns
        self.texts = fixed(torch.zeros(rows, columns, dtype=torch.int64, device=device))
        self.column = fixed(torch.zeros(rows, dtype=torch.int64, device=device))
        self.last = fixed(torch.zeros(rows, dtype=torch.int64, device=device))
        self.done = fixed(torch.ones(rows, dtype=torch.bool, device=device))
        self.forbidden = fixed(torch.zeros(vocabulary, dtype=torch.bool, device=device))
        self.used = fixed(torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)) if sampler.penalty != 1.0 else None
        self.eos = fixed(torch.tensor(sorted(eos), dtype=torch.int64, device=device)) if eos else None
        self.all_columns = fixed(torch.arange(columns, device=device))
        self.spans = spans
        self.windows = mask_windows(model)
        decoding = Places(fixed(torch.arange(rows, device=device)), self.column)
        self.layers = [RaggedLayer(columns, decoding) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))

    def begin(self, *, forbid_eos: bool) -> None:
        """Before the first prompts of a call: no row has a text."""
        self.done.fill_(True)
        self.forbidden.zero_()
        if forbid_eos and self.eos is not None:
            self.forbidden[self.eos] = True

    # ------------------------------------------------------------ reading prompts

    def read(self, wave: Sequence[Admission], prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        """Read the prompts of ``wave``, packed in one row, and write the first new token of each."""
        device = self.texts.device
        lengths = [len(prompts[one.index]) for one in wave]
        new = [tokens - one.shared for one, tokens in zip(wave, lengths, strict=True)]
        flat = on(device, [[token for one in wave for token in prompts[one.index][one.shared :]]])
        reading = Places.of([(one.row, one.shared, tokens) for one, tokens in zip(wave, lengths, strict=True)], device)
        seen = Places.of([(one.row, 0, tokens) for one, tokens in zip(wave, lengths, strict=True)], device) if new != lengths else None
        self._copy_prefixes(wave)
        masks = {kind: packed_mask(new, lengths, window) for kind, window in self.windows.items()}
        ends = on(device, [end - 1 for end in accumulate(new)])
        for layer in self.layers:
            layer.reading, layer.seen = reading, seen
        try:
            logits = self.model(
                input_ids=flat,
                attention_mask=masks.get("", masks),
                position_ids=reading.columns[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=ends,
            ).logits[0]
        finally:
            for layer in self.layers:
                layer.reading = layer.seen = None
        self._begin_texts(wave, prompts, limits, logits)

    def _copy_prefixes(self, wave: Sequence[Admission]) -> None:
        copies = [one for one in wave if one.shared and one.source != one.row]
        if not copies:
            return
        device = self.texts.device
        places = Places.of([(one.row, 0, one.shared) for one in copies], device)
        source = Places.of([(one.source, 0, one.shared) for one in copies], device).rows
        for layer in self.layers:
            layer.copy(source, places)

    def _begin_texts(
        self, wave: Sequence[Admission], prompts: Sequence[Sequence[int]], limits: Sequence[int], logits: torch.Tensor
    ) -> None:
        """:param logits: (prompts of the wave, vocabulary)."""
        numbers = [[one.row, len(prompts[one.index]), len(prompts[one.index]) + limits[one.index] - 1] for one in wave]
        rows, column, last = on(logits.device, numbers).unbind(1)
        used = None
        if self.used is not None:
            used = torch.zeros(len(wave), self.used.shape[1], dtype=torch.bool, device=logits.device)
            place, token = on(logits.device, [(place, token) for place, one in enumerate(wave) for token in prompts[one.index]]).unbind(1)
            used[place, token] = True
        tokens = self.sampler.pick(logits, used, self.forbidden)
        if self.used is not None and used is not None:
            self.used[rows] = used.scatter_(1, tokens[:, None], True)
        self.texts[rows, column] = tokens
        self.column[rows], self.last[rows] = column, last
        ended = column >= last
        self.done[rows] = ended if self.eos is None else ended | torch.isin(tokens, self.eos)

    # ------------------------------------------------------------ decoding

    def step(self) -> None:
        """One token for each row that is not done. This is what is compiled."""
        newest = self.texts.gather(1, self.column[:, None])
        logits = self.model(
            input_ids=newest,
            attention_mask=self._masks(),
            position_ids=self.column[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        tokens = torch.where(self.done, newest[:, 0], self.sampler.pick(logits, self.used, self.forbidden))
        if self.used is not None:
            self.used.scatter_(1, tokens[:, None], True)
        self.column.add_(~self.done)
        self.texts.scatter_(1, self.column[:, None], tokens[:, None])
        self.done.logical_or_(self.column >= self.last)
        if self.eos is not None:
            self.done.logical_or_(torch.isin(tokens, self.eos))

    def _masks(self) -> Any:
        """Masks of shape (rows, 1, 1, columns), or spans of shape (2, rows, 1, 1), by layer type where the model asks for it."""
        make = self._span if self.spans else self._mask
        masks = {kind: make(window) for kind, window in self.windows.items()}
        return masks.get("", masks)

    def _mask(self, window: int | None) -> torch.Tensor:
        newest = self.column[:, None]
        mask = self.all_columns <= newest
        if window is not None:
            mask = mask & (self.all_columns > newest - window)
        return mask[:, None, None, :]

    def _span(self, window: int | None) -> torch.Tensor:
        first = torch.zeros_like(self.column) if window is None else (self.column - window + 1).clamp(min=0)
        return torch.stack((first, self.column.masked_fill(self.done, -1)))[..., None, None]

    def collect(self, rows: Sequence[int], begins: Sequence[int], width: int) -> torch.Tensor:
        """(rows, width): the new tokens of these rows, whose prompts have ``begins`` tokens; what follows a text's end is arbitrary."""
        device = self.texts.device
        row, begin = on(device, [list(rows), list(begins)])
        columns = (begin[:, None] + torch.arange(width, device=device)).clamp_(max=self.columns - 1)
        return self.texts[row[:, None], columns]
