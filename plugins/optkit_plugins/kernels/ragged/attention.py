"""Attention over several prompts that lie one after another in a single row, without padding and without a mask over all of them.

Where each prompt lies travels in place of a mask: transformers passes four-dimensional masks on as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: SDPA's backends but cuDNN's, which plans anew for every length and every stride: 40 ms a prompt on an H200, whose attention takes 0.01.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Attention = Callable[..., tuple[torch.Tensor, Any]]


def register_packed(own: str) -> str:
    """The name of the packed form of transformers' attention ``own`` (one that is built on SDPA)."""
    name = f"optkit_packed_{own}"
    AttentionInterface.register(name, packed(ALL_ATTENTION_FUNCTIONS[own]))  # type: ignore[arg-type]
    AttentionMaskInterface.register(name, sdpa_mask)  # type: ignore[arg-type]
    return name


def packed(attend: Attention) -> Attention:
    """``attend``, prompt by prompt. ``attention_mask`` is what ``packed_mask`` gives."""

    def attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        parts, begin, key_begin = [], 0, 0
        for queries, keys, window in attention_mask[0, 0].tolist():
            end, key_end = begin + queries, key_begin + keys
            ours, theirs = slice(begin, end), slice(key_begin, key_end)
            mask = causal_mask(queries, keys, window, query.device)
            parts.append(attend(module, query[:, :, ours], key[:, :, theirs], value[:, :, theirs], mask, **kwargs)[0])
            begin, key_begin = end, key_end
        return torch.cat(parts, 1), None

    return attention


def packed_mask(queries: list[int], keys: list[int], window: int | None) -> torch.Tensor:
    """(1, 1, prompts, 3): each prompt's queries, its keys (the same, or more where earlier ones are cached), and the window or 0."""
    return torch.tensor([[[[*pair, window or 0] for pair in zip(queries, keys, strict=True)]]])


def causal_mask(queries: int, keys: int, window: int, device: torch.device) -> Any:
    """The mask of one prompt's last ``queries`` tokens over its ``keys``; ``None`` where SDPA's own causal kernel does."""
    if window and keys > window:
        position = torch.arange(keys, device=device)
        mine = position[keys - queries :, None]
        return ((position <= mine) & (position > mine - window))[None, None]
    return None if queries == keys else causal_lower_right(queries, keys)
