"""A step's whole attention between two products: ``decode_step_attention`` turns query and key by their position, writes key and value into
the cache and attends, in one launch where rotary embedding, two writes and the attention are four or more."""

from __future__ import annotations

import torch

from optkit_plugins.kernels.attention.decode import Fresh, launch, plain_decode_attention, usable
from optkit_plugins.kernels.fused.product import CALLS


@torch.library.custom_op("optkit::decode_step_attention", mutates_args=("keys", "values"), tags=(torch.Tag.flexible_layout,))
def decode_step_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    column: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    counters: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Write ``key`` and ``value`` into the column ``column`` of ``keys`` and ``values``, and attend: (rows, heads, size).

    :param query: (rows, heads, 1, size). :param key: (rows, key heads, 1, size), as :param value:.
    :param cos: (1 or rows, …, size), as :param sin:, by which query and key are turned first (halves against each other), or ``None``.
    :param keys: (rows, key heads, columns, size), as :param values:. :param column: (1,) integer.

    The others as for ``decode_attention``; 0 is none for ``window`` and ``softcap``.
    """
    CALLS.update(["cache writes"] if cos is None else ["cache writes", "rotary embeddings"])
    angles = [None if angle is None else angle.reshape(-1, query.shape[3]) for angle in (cos, sin)]
    fresh = Fresh(key, value, column, *angles)
    if kernel_takes(query, keys, values, fresh):
        return launch(query, keys, values, first, last, counters, scale, window, softcap, fresh=fresh)
    return plain_step_attention(query, keys, values, first, last, fresh, scale=scale, window=window, softcap=softcap)


@decode_step_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    column: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    counters: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[3])


def kernel_takes(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, fresh: Fresh) -> bool:
    """Whether the kernel takes these tensors; else the plain version computes."""
    return (
        usable(query, keys, values)
        and query.shape[0] == keys.shape[0]
        and fresh.key.stride(3) == fresh.value.stride(3) == 1
        and fresh.key.dtype == fresh.value.dtype == keys.dtype
    )


def plain_step_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    fresh: Fresh,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The same in plain torch, computed in ``dtype``."""
    key = fresh.key
    if fresh.cos is not None and fresh.sin is not None:
        cos, sin = (angle.to(dtype)[:, None, None] for angle in (fresh.cos, fresh.sin))
        query, key = turned(query, cos, sin), turned(key, cos, sin)
    keys.index_copy_(2, fresh.column, key)
    values.index_copy_(2, fresh.column, fresh.value)
    return plain_decode_attention(query, keys, values, first, last, scale=scale, window=window, softcap=softcap, dtype=dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: the halves of each vector turned against each other, (…, size) in x's dtype."""
    lower, upper = x.to(cos.dtype).chunk(2, -1)
    return (x * cos + torch.cat([-upper, lower], -1) * sin).to(x.dtype)
