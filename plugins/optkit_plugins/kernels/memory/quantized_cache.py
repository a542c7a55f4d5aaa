"""A KV cache in 8, 4 or 2 bits, in plain torch: keys grouped along tokens (by channel), values along channels (by token).

KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (Liu et al. 2024). Keys have a few channels that are large in every
token, so a group must not mix channels; values have none. Tokens are quantized once, in blocks, when they leave the window of recent
tokens that stays exact, so errors do not pile up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens that are quantized together; a key's group.
BLOCK = 32
#: Recent tokens that stay as they are.
RECENT = 32


@dataclass
class Packed:
    """Asymmetric codes of a tensor, several in one byte along its last dimension, with a scale and a zero a group."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int

    @classmethod
    def of(cls, tensor: torch.Tensor, bits: int, dim: int) -> Packed:
        """Quantize, each line along ``dim`` being one group. The last dimension must hold whole bytes."""
        low, high = tensor.amin(dim, keepdim=True), tensor.amax(dim, keepdim=True)
        scale = ((high - low).float() / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        codes = ((tensor.float() - low.float()) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        each = 8 // bits
        packed = codes[..., ::each].clone()
        for part in range(1, each):
            packed |= codes[..., part::each] << (bits * part)
        return cls(packed, scale.to(tensor.dtype), low, bits)

    def unpack(self) -> torch.Tensor:
        """The tensor of rounded values, in the dtype that it had."""
        parts = [(self.codes >> (self.bits * part)) & (2**self.bits - 1) for part in range(8 // self.bits)]
        codes = torch.stack(parts, -1).flatten(-2)
        return codes.to(self.scale.dtype) * self.scale + self.zero

    def append(self, other: Packed, dim: int) -> Packed:
        codes, scale, zero = (torch.cat(pair, dim) for pair in zip(self.tensors(), other.tensors(), strict=True))
        return Packed(codes, scale, zero, self.bits)

    def select(self, rows: torch.Tensor) -> Packed:
        codes, scale, zero = (tensor[rows] for tensor in self.tensors())
        return Packed(codes, scale, zero, self.bits)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.codes, self.scale, self.zero


class QuantizedBlockLayer(DynamicLayer):
    """Keys and values of one layer, (rows, heads, tokens, size): older tokens packed in blocks, recent ones as they are."""

    is_croppable = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        self.packed: tuple[Packed, Packed] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """:return: all keys and values; a prompt attends to its own exact ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        keys = torch.cat([self.keys, key_states], -2)
        values = torch.cat([self.values, value_states], -2)
        everything = (keys, values) if self.packed is None else self._unpacked(keys, values)
        whole = max(0, (keys.shape[-2] - RECENT) // BLOCK) * BLOCK
        if whole:
            self._pack(keys[:, :, :whole], values[:, :, :whole])
        # clones: a view would keep the exact tokens in memory
        self.keys, self.values = keys[:, :, whole:].clone(), values[:, :, whole:].clone()
        return everything

    def _pack(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        blocks = keys.unflatten(2, (-1, BLOCK))  # (rows, heads, blocks, tokens, size)
        new = (Packed.of(blocks, self.bits, dim=3), Packed.of(values.unflatten(3, (-1, value_group(values.shape[-1]))), self.bits, dim=4))
        old = self.packed
        self.packed = new if old is None else (old[0].append(new[0], 2), old[1].append(new[1], 2))

    def _unpacked(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.packed is not None
        older = self.packed[0].unpack().flatten(2, 3), self.packed[1].unpack().flatten(3, 4)
        return torch.cat([older[0], keys], -2), torch.cat([older[1], values], -2)

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        return self.keys.shape[-2] + (0 if self.packed is None else self.packed[1].codes.shape[2])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = self.keys[indices], self.values[indices]
        if self.packed is not None:
            self.packed = (self.packed[0].select(indices), self.packed[1].select(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats))

    def reset(self) -> None:
        self.is_initialized, self.packed = False, None

    def tensors(self) -> list[torch.Tensor]:
        """What the layer stores."""
        return [self.keys, self.values, *(tensor for part in self.packed or () for tensor in part.tensors())]


class QuantizedBlockCache(Cache):
    """One ``QuantizedBlockLayer`` a layer of ``model``."""

    def __init__(self, model: PreTrainedModel, bits: int):
        config = model.config.get_text_config(decoder=True)
        super().__init__(layers=[QuantizedBlockLayer(bits) for _ in range(config.num_hidden_layers)])


def value_group(size: int) -> int:
    """Channels of a value that share a scale: the largest power of two up to 64 that divides the head size."""
    return min(64, size & -size)
