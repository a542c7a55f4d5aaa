"""Attention over several prompts that lie one after another in a single row, without padding and without a mask over all of them.

Where each prompt lies travels in place of a mask: transformers passes four-dimensional masks on as they are. A compiled layer sees one
opaque operator, so that its graph serves any number of prompts of any lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
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
    AttentionInterface.register(name, packed(own))  # type: ignore[arg-type]
    AttentionMaskInterface.register(name, sdpa_mask)  # type: ignore[arg-type]
    return name


def packed(own: str) -> Attention:
    """Attention prompt by prompt. ``attention_mask`` is what ``packed_mask`` gives."""

    def attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        groups = getattr(module, "num_key_value_groups", 1)
        return packed_attention(query, key, value, attention_mask, own, groups, kwargs.get("scaling")), None

    return attention


def packed_mask(queries: list[int], keys: list[int], window: int | None) -> torch.Tensor:
    """(1, 1, prompts + 1, 3), on the host: each prompt's queries, its keys (the same, or more where earlier ones are cached), and the
    window or 0. The last row is empty: a size of one would be a graph of its own."""
    rows = [[*pair, window or 0] for pair in zip(queries, keys, strict=True)]
    return torch.tensor([[[*rows, [0, 0, window or 0]]]])


@torch.library.custom_op("optkit::packed_attention", mutates_args=())
def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, own: str, groups: int, scale: float | None
) -> torch.Tensor:
    """Each prompt's queries over its own keys: (1, queries, heads, size).

    :param query: (1, heads, queries, size). :param key: (1, key heads, keys, size), as :param value:. :param mask: of ``packed_mask``.
    :param own: transformers' attention that is asked prompt by prompt, where no kernel takes all of them at once.
    :param groups: query heads of a key head. :param scale: of the scores; by default 1 / sqrt(size).
    """
    prompts = [(queries, keys) for queries, keys, _ in mask[0, 0, :-1].tolist()]
    window = int(mask[0, 0, -1, 2])
    if at_once(query, key, value):
        return flash(query, key, value, prompts, window, scale)
    if query.is_cuda and groups > 1:  # without the flash kernel, SDPA has none for grouped heads but the one that writes all scores out
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    module, attend = SimpleNamespace(num_key_value_groups=groups, is_causal=True), ALL_ATTENTION_FUNCTIONS[own]
    parts, begin, key_begin = [], 0, 0
    with sdpa_kernel(ANY_LENGTH):
        for queries, keys in prompts:
            end, key_end = begin + queries, key_begin + keys
            ours, theirs = slice(begin, end), slice(key_begin, key_end)
            seen = causal_mask(queries, keys, window, query.device)
            parts.append(attend(module, query[:, :, ours], key[:, :, theirs], value[:, :, theirs], seen, scaling=scale)[0])  # type: ignore[operator]
            begin, key_begin = end, key_end
    return torch.cat(parts, 1)


@packed_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, own: str, groups: int, scale: float | None
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def at_once(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's flash kernel takes these heads: in half precision, from compute capability 8.0."""
    if not query.is_cuda:
        return False
    # not causal: that refuses more keys than queries, which this kernel aligns at their ends, as it should be
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, query.shape[1] != key.shape[1]))


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prompts: list[tuple[int, int]], window: int, scale: float | None
) -> torch.Tensor:
    """All prompts in one launch (FlashAttention-2, Dao 2023): (1, queries, heads, size)."""
    bounds = [[0, *accumulate(tokens)] for tokens in zip(*prompts, strict=True)]
    starts = torch.tensor(bounds, dtype=torch.int32, pin_memory=True).to(query.device, non_blocking=True)
    longest = [max(tokens) for tokens in zip(*prompts, strict=True)]
    states = [part[0].transpose(0, 1) for part in (query, key, value)]  # (tokens, heads, size)
    sides = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
    out = torch.ops.aten._flash_attention_forward(*states, *starts, *longest, 0.0, True, False, scale=scale, **sides)[0]
    return out[None]


def causal_mask(queries: int, keys: int, window: int, device: torch.device) -> Any:
    """The mask of one prompt's last ``queries`` tokens over its ``keys``; ``None`` where SDPA's own causal kernel does."""
    if window and keys > window:
        position = torch.arange(keys, device=device)
        mine = position[keys - queries :, None]
        return ((position <= mine) & (position > mine - window))[None, None]
    return None if queries == keys else causal_lower_right(queries, keys)
