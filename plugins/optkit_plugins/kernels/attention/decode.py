"""Attention of one query a row over the columns that the row really has: ``decode_attention``.

A decode step reads keys and values once and computes little, so time is bytes, and columns that are allocated but empty must not be
read. The query heads of a group share one reading of their key head; the columns of a row are split over programs (split-K, as in
Flash-Decoding, Dao et al. 2023), and the last of them to finish adds the parts up. First and last column are read on the device, so one
CUDA graph serves every position; programs without columns leave at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

#: First compute capability that Triton's products run on.
CAPABILITY = (7, 5)
#: Heads up to this size fit in a program's registers.
LARGEST_SIZE = 256
#: Programs that share a row's columns, at most; twice as many where more than ``LONG`` columns are allocated.
MOST_SPLITS, LONG = 16, 4096


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over the columns ``first[row]`` … ``last[row]``, both included: (rows, heads, size) in the query's dtype.

    :param query: (rows, heads, 1, size). :param keys: (rows, key heads, columns, size), as :param values:, with any strides but 1 for the
        last; heads is a multiple of key heads, and consecutive query heads share a key head. So may consecutive rows of queries share a
        row of keys: a draft's tokens do.
    :param first: (rows,) integers on the same device, as :param last:. A row without columns gives zeros.
    :param scale: factor on the scores. :param window: only the last ``window`` columns. :param softcap: ``c`` in ``c * tanh(score / c)``.
    :param counters: zeros, int32, at least rows × key heads, for one launch instead of two. They are zeros again afterwards; give the
        same ones to launches of one stream only.
    """
    return _op(query, keys, values, first, last, counters, scale, window or 0, softcap or 0.0)


def plain_decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The same in plain torch over all allocated columns, computed in ``dtype``."""
    rows, heads, _, size = query.shape
    groups = heads // keys.shape[1]
    grouped = query.to(dtype).reshape(rows, keys.shape[1], groups, size)
    keys, values = (tensor.repeat_interleave(rows // keys.shape[0], 0) if rows != keys.shape[0] else tensor for tensor in (keys, values))
    scores = grouped @ keys.to(dtype).transpose(2, 3) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    seen = spans_mask(first, last, keys.shape[2], window)[:, None, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    some = torch.where(seen.transpose(2, 3), values.to(dtype), 0)  # what lies in other columns may be anything
    return (weights @ some).reshape(rows, heads, values.shape[3]).to(query.dtype)


def spans_mask(first: torch.Tensor, last: torch.Tensor, columns: int, window: int | None = None) -> torch.Tensor:
    """(rows, columns): whether a row sees a column."""
    at = torch.arange(columns, device=first.device)
    seen = (at >= first[:, None]) & (at <= last[:, None])
    return seen & (at > last[:, None] - window) if window else seen


@torch.library.custom_op("optkit::decode_attention", mutates_args=())
def _op(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    counters: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """``counters`` are not declared as mutated, because they leave as they came."""
    if usable(query, keys, values):
        return launch(query, keys, values, first, last, counters, scale, window, softcap)
    return plain_decode_attention(query, keys, values, first, last, scale=scale, window=window, softcap=softcap)


@_op.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    counters: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[3])


def usable(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors; else the plain version computes."""
    return (
        runs_on(query.device)
        and keys.shape[3] == values.shape[3] <= LARGEST_SIZE
        and query.dtype == keys.dtype == values.dtype
        and query.stride(3) == keys.stride(3) == values.stride(3) == 1
    )


@lru_cache
def runs_on(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU with Triton."""
    from torch.utils._triton import has_triton

    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= CAPABILITY
        and bool(has_triton())
    )


class Fresh(NamedTuple):
    """A new key and value, (rows, key heads, 1, size), for the column at ``column`` (1,), and the angles by which query and key are turned
    first: ``cos`` and ``sin`` (1 or rows, size), or ``None``."""

    key: torch.Tensor
    value: torch.Tensor
    column: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None


def launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    counters: torch.Tensor | None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    *,
    fresh: Fresh | None = None,
    block: int | None = None,
    splits: int | None = None,
    warps: int = 2,
) -> torch.Tensor:
    """The kernel's launches; under Triton's interpreter on a CPU too.

    :param fresh: what to put into keys and values first. :param block: columns that a program reads at once. :param splits: programs that
        share a row's key head.
    """
    from optkit_plugins.kernels.attention import decode_triton as kernel

    rows, heads, _, size = query.shape
    kv_heads = keys.shape[1]
    block = block or (32 if power_of_two(size) * query.element_size() <= 512 else 16)
    pairs, groups = rows * kv_heads, heads // kv_heads
    splits = splits or default_splits(pairs, keys.shape[2], query.device)
    out = query.new_empty(rows, heads, size)
    sums = torch.empty((pairs, splits, groups, size) if splits > 1 else (1,), dtype=torch.float32, device=query.device)
    stats = torch.empty((pairs, splits, groups, 2) if splits > 1 else (1,), dtype=torch.float32, device=query.device)
    fused = splits > 1 and counters is not None and counters.numel() >= pairs
    new = fresh or Fresh(query, query, first, None, None)
    turns = new.cos is not None
    chosen = constants(groups, size, block, splits, window)
    kernel.split[(pairs, splits)](
        query,
        keys,
        values,
        first,
        last,
        out,
        sums,
        stats,
        counters if counters is not None else first,
        new.key,
        new.value,
        new.cos if turns else query,
        new.sin if turns else query,
        new.column,
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        *values.stride()[:3],
        *new.key.stride()[:2],
        *new.value.stride()[:2],
        new.cos.stride(0) if new.cos is not None and new.cos.shape[0] > 1 else 0,
        scale,
        kv_heads,
        TILE=max(16, power_of_two(groups)),
        SOFTCAP=softcap,
        FUSED=fused,
        UPCAST=upcast(query),
        SHARE=rows // keys.shape[0],
        FRESH=fresh is not None,
        ROTARY=turns,
        **chosen,
        num_warps=warps,
        num_stages=min(stages(block, size, query.element_size()), -(-keys.shape[2] // (splits * block))),
    )
    if splits > 1 and not fused:
        kernel.combine[(pairs,)](first, last, out, sums, stats, kv_heads, **chosen, num_warps=warps)
    return out


def constants(groups: int, size: int, block: int, splits: int, window: int) -> dict[str, int]:
    """What both kernels are compiled for. A register tile's sides are powers of two."""
    width, padded = power_of_two(size), power_of_two(groups)
    return {
        "GROUPS": groups,
        "SIZE": size,
        "WIDTH": width,
        "BLOCK": block,
        "SPLITS": splits,
        "WINDOW": window,
        "PADDED_GROUPS": padded,
        "PADDED_SPLITS": power_of_two(splits),
        "PARTS_AT_ONCE": max(1, min(power_of_two(splits), 4096 // (padded * width))),
    }


def stages(block: int, size: int, itemsize: int) -> int:
    """Blocks under way at once: as many as 64 KB of shared memory hold, which every GPU has, and not more than three."""
    return max(1, min(3, (1 << 16) // (2 * block * power_of_two(size) * itemsize)))


def upcast(query: torch.Tensor) -> bool:
    """Whether products must be taken in float32, because the device multiplies no bfloat16."""
    return query.dtype == torch.bfloat16 and (query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) < (8, 0))


def default_splits(pairs: int, columns: int, device: torch.device) -> int:
    """Programs a row and key head: enough to fill the device. More of them make short rows slower, because their parts are added up."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64
    most = MOST_SPLITS if columns <= LONG else 2 * MOST_SPLITS
    return max(1, min(most, power_of_two(2 * processors // pairs + 1) // 2))


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
