"""A decode step over rows of unequal length, each with a column of its own: a row that is done takes another prompt while others go on.

Rows begin at column 0 and have no padding. New prompts are read packed, one after another in a single row, so that nothing is computed on
padding; their keys and values are then scattered to the rows. Orca (Yu et al. 2022): iteration-level scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from optkit_plugins.kernels.decode.loop import End, Sampler, fixed, mask_windows
from optkit_plugins.kernels.ragged.attention import packed_mask
from optkit_plugins.kernels.ragged.cache import Packed, PackedCache, Places, RaggedLayer, on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit_plugins.kernels.ragged.schedule import Admission


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
        self.used = fixed(torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)) if sampler.penalty != 1.0 else None
        self.end = End(eos, device)
        self.all_columns = fixed(torch.arange(columns, device=device))
        self.spans = spans
        self.windows = mask_windows(model)
        decoding = Places(fixed(torch.arange(rows, device=device)), self.column)
        self.layers = [RaggedLayer(columns, decoding) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))

    def begin(self, *, exact: bool) -> None:
        """Before the first prompts of a call: no row has a text. :param exact: no token ends one."""
        self.done.fill_(True)
        self.end.put(exact)

    # ------------------------------------------------------------ reading prompts

    def read(
        self,
        wave: Sequence[Admission],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        by_layers: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        """Read the prompts of ``wave``, packed in one row, and write the first new token of each.

        :param by_layers: ``by_layers(work, kind, caches)`` calls ``work`` with the model's layers compiled.
        """
        packed = self._packed(wave, prompts)
        self._copy_prefixes(wave)
        if by_layers is None or packed.ids.shape[1] == 1:  # a size of one would be a graph of its own
            logits = self._logits(packed)
        else:
            self._allocate()
            kind = packed.kind if self.rows > 1 else f"{packed.kind}, one row"
            logits = by_layers(partial(self._logits, packed), kind, [PackedCache(layer, packed) for layer in self.layers])
        self._begin_texts(wave, prompts, limits, logits)

    def _packed(self, wave: Sequence[Admission], prompts: Sequence[Sequence[int]]) -> Packed:
        device = self.texts.device
        lengths = [len(prompts[one.index]) for one in wave]
        new = [tokens - one.shared for one, tokens in zip(wave, lengths, strict=True)]
        whole = [(one.row, 0, tokens) for one, tokens in zip(wave, lengths, strict=True)]
        return Packed(
            ids=on(device, [[token for one in wave for token in prompts[one.index][one.shared :]]]),
            places=Places.of([(one.row, one.shared, tokens) for one, tokens in zip(wave, lengths, strict=True)], device),
            seen=Places.of(whole, device) if new != lengths else None,
            masks={kind: packed_mask(new, lengths, window) for kind, window in self.windows.items()},
            ends=on(device, [end - 1 for end in accumulate(new)]),
        )

    def _logits(self, packed: Packed) -> torch.Tensor:
        """(prompts, vocabulary): those of each prompt's last token."""
        for layer in self.layers:
            layer.packed = packed
        try:
            return self.model(
                input_ids=packed.ids,
                attention_mask=packed.masks.get("", packed.masks),
                position_ids=packed.places.columns[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=packed.ends,
            ).logits[0]
        finally:
            for layer in self.layers:
                layer.packed = None

    def _allocate(self) -> None:
        """Give the layers their keys and values, by a token at a column that no row ever looks at: its last."""
        if all(layer.is_initialized for layer in self.layers):
            return
        device = self.texts.device
        masks = {kind: packed_mask([1], [1], window) for kind, window in self.windows.items()}
        place = Places.of([(0, self.columns - 1, self.columns)], device)
        self._logits(Packed(on(device, [[0]]), place, None, masks, on(device, [0])))

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
        tokens = self.sampler.pick(logits, used)
        if self.used is not None and used is not None:
            self.used[rows] = used.scatter_(1, tokens[:, None], True)
        self.texts[rows, column] = tokens
        self.column[rows], self.last[rows] = column, last
        ended = column >= last
        self.done[rows] = ended | self.end.after(tokens)

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
        tokens = torch.where(self.done, newest[:, 0], self.sampler.pick(logits, self.used))
        if self.used is not None:
            self.used.scatter_(1, tokens[:, None], True)
        self.column.add_(~self.done)
        self.texts.scatter_(1, self.column[:, None], tokens[:, None])
        self.done.logical_or_(self.column >= self.last)
        self.done.logical_or_(self.end.after(tokens))

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
