"""Attention for rows of unequal length: over prompts that lie one after another in a single row, and over each row's own columns.

What is seen travels where a mask would, in fewer numbers: transformers passes four-dimensional masks on as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from optkit_plugins.kernels.decode_attention import decode_attention

Attention = Callable[..., tuple[torch.Tensor, Any]]


def register_packed(own: str) -> str:
    """The name of the packed form of transformers' attention ``own`` (one that is built on SDPA)."""
    name = f"optkit_packed_{own}"
    AttentionInterface.register(name, packed(ALL_ATTENTION_FUNCTIONS[own]))  # type: ignore[arg-type]
    AttentionMaskInterface.register(name, sdpa_mask)  # type: ignore[arg-type]
    return name


def register_by_columns() -> str:
    """The name of the decode attention that reads each row's own columns only."""
    AttentionInterface.register("optkit_by_columns", by_columns)  # type: ignore[arg-type]
    AttentionMaskInterface.register("optkit_by_columns", sdpa_mask)  # type: ignore[arg-type]
    return "optkit_by_columns"


def by_columns(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """One query a row. :param attention_mask: (1, 1, 2, rows): the first and the last column of each row."""
    first, last = attention_mask[0, 0].unbind()
    out = decode_attention(query, key, value, first, last, scale=query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out[:, None], None


def packed(attend: Attention) -> Attention:
    """``attend``, prompt by prompt. ``attention_mask`` is what ``spans`` gives."""

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


def spans(queries: list[int], keys: list[int], window: int | None) -> torch.Tensor:
    """(1, 1, prompts, 3): each prompt's queries, its keys (the same, or more where earlier ones are cached), and the window or 0."""
    return torch.tensor([[[[*pair, window or 0] for pair in zip(queries, keys, strict=True)]]])


def causal_mask(queries: int, keys: int, window: int, device: torch.device) -> Any:
    """The mask of one prompt's last ``queries`` tokens over its ``keys``; ``None`` where SDPA's own causal kernel does."""
    if window and keys > window:
        position = torch.arange(keys, device=device)
        mine = position[keys - queries :, None]
        return ((position <= mine) & (position > mine - window))[None, None]
    return None if queries == keys else causal_lower_right(queries, keys)
