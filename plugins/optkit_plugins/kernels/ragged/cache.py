"""Keys and values of rows of unequal length: each token has a place of its own, a row and a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from optkit_plugins.kernels.decode.loop import fixed


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


@dataclass(frozen=True)
class Packed:
    """Prompts of a wave, one after another in a single row.

    :ivar ids: (1, tokens). :ivar places: where their keys and values go. :ivar seen: the places of everything that they attend to, where
        that is more than themselves. :ivar masks: see ``packed_mask``. :ivar ends: (prompts,) the last token of each.
    """

    ids: torch.Tensor
    places: Places
    seen: Places | None
    masks: dict[str, torch.Tensor]
    ends: torch.Tensor

    @property
    def kind(self) -> str:
        """What compiled graphs for such prompts are called."""
        return "packed prompts" if self.seen is None else "packed prompts behind prefixes"


class PackedCache:
    """What one layer sees of its keys and values while it reads packed prompts: it writes theirs, and attends to them and their prefixes."""

    def __init__(self, layer: RaggedLayer, packed: Packed):
        self.keys, self.values = layer.keys.view_as(layer.keys), layer.values.view_as(layer.values)
        self.rows, self.columns = packed.places.rows, packed.places.columns
        self.seen_rows = packed.seen.rows if packed.seen else None
        self.seen_columns = packed.seen.columns if packed.seen else None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """:param keys: (1, heads, tokens, head size), as :param values:."""
        self.keys[self.rows, :, self.columns] = keys[0].transpose(0, 1)
        self.values[self.rows, :, self.columns] = values[0].transpose(0, 1)
        if self.seen_rows is None:
            return keys, values
        seen = (states[self.seen_rows, :, self.seen_columns] for states in (self.keys, self.values))  # (tokens, heads, head size)
        return tuple(states.transpose(0, 1)[None] for states in seen)  # type: ignore[return-value]


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, columns, head size), allocated once.

    :ivar packed: the prompts that are being read, or ``None`` while decoding.
    """

    is_compileable = True
    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, columns: int, decoding: Places):
        super().__init__()
        self.columns, self.decoding = columns, decoding
        self.packed: Packed | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def allocate(states: torch.Tensor) -> torch.Tensor:
            return fixed(states.new_zeros(len(self.decoding.rows), states.shape[1], self.columns, states.shape[3]))

        self.keys, self.values = allocate(key_states), allocate(value_states)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.packed is None:
            self.keys[self.decoding.rows, :, self.decoding.columns] = key_states[:, :, 0]
            self.values[self.decoding.rows, :, self.decoding.columns] = value_states[:, :, 0]
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return PackedCache(self, self.packed).update(key_states, value_states)

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
