"""Kernels of ``decode_attention``, in plain Triton."""

# Triton reads the kernels' own annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span(first, last, row, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr):
    """A row's first column, the one behind its last, the columns of each part, and the number of parts that have any."""
    begin = tl.load(first + row).to(tl.int32)
    end = tl.load(last + row).to(tl.int32) + 1
    if WINDOW > 0:
        begin = tl.maximum(begin, end - WINDOW)
    length = tl.maximum(end - begin, 0)
    share = (length + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    share = tl.maximum(share, BLOCK)
    return begin, end, share, (length + share - 1) // share


@triton.jit
def add_up(
    pair, parts, out, sums, stats, kv_heads,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr, PADDED_SPLITS: tl.constexpr, PARTS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write the output of one row and key head from its parts' sums, past the first-level cache: other programs wrote them."""
    group = tl.arange(0, PADDED_GROUPS)
    part = tl.arange(0, PADDED_SPLITS)
    at = (pair * SPLITS + part[:, None]) * GROUPS + group[None, :]
    there = (part[:, None] < parts) & (group[None, :] < GROUPS)
    highest = tl.max(tl.load(stats + at * 2, mask=there, other=float("-inf"), cache_modifier=".cg"), axis=0)
    highest = tl.where(group < GROUPS, highest, 0.0)
    size = tl.arange(0, WIDTH)
    total = tl.zeros((PADDED_GROUPS, WIDTH), tl.float32)
    weight = tl.zeros((PADDED_GROUPS,), tl.float32)
    for begin in range(0, parts, PARTS_AT_ONCE):
        some = begin + tl.arange(0, PARTS_AT_ONCE)
        place = (pair * SPLITS + some[:, None]) * GROUPS + group[None, :]
        exists = (some[:, None] < parts) & (group[None, :] < GROUPS)
        factor = tl.exp2(tl.load(stats + place * 2, mask=exists, other=float("-inf"), cache_modifier=".cg") - highest[None, :])
        weight += tl.sum(factor * tl.load(stats + place * 2 + 1, mask=exists, other=0.0, cache_modifier=".cg"), axis=0)
        mask = exists[:, :, None] & (size[None, None, :] < SIZE)
        sums_of = tl.load(sums + place[:, :, None] * SIZE + size[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")
        total += tl.sum(sums_of * factor[:, :, None], axis=0)
    store(out, total / tl.where(weight > 0, weight, 1.0)[:, None], pair, kv_heads, group, size, GROUPS, SIZE)


@triton.jit
def store(out, value, pair, kv_heads, group, size, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    head = pair // kv_heads * kv_heads * GROUPS + pair % kv_heads * GROUPS + group
    mask = (group[:, None] < GROUPS) & (size[None, :] < SIZE)
    tl.store(out + head[:, None] * SIZE + size[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def turned(start, cos, sin, size, mask, SIZE: tl.constexpr, ROTARY: tl.constexpr):
    """Vectors at ``start``, turned by their position's angles (rotary embedding, Su et al. 2021), in their own dtype."""
    plain = tl.load(start, mask=mask, other=0.0)
    if ROTARY:
        lower = size < SIZE // 2
        shift = tl.where(lower, SIZE // 2, -(SIZE // 2))
        across = tl.load(start + shift, mask=mask, other=0.0).to(tl.float32)
        within = size < SIZE
        across *= tl.load(sin + size, mask=within, other=0.0).to(tl.float32) * tl.where(lower, -1.0, 1.0)
        return (plain.to(tl.float32) * tl.load(cos + size, mask=within, other=0.0).to(tl.float32) + across).to(plain.dtype)
    return plain


@triton.jit
def split(
    query, keys, values, first, last, out, sums, stats, counters, new_keys, new_values, cos, sin, column_at,
    query_row, query_head, key_row, key_head, key_column, value_row, value_head, value_column,
    new_key_row, new_key_head, new_value_row, new_value_head, angle_row, scale, kv_heads,
    TILE: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr, UPCAST: tl.constexpr, SHARE: tl.constexpr,
    FRESH: tl.constexpr, ROTARY: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    PADDED_GROUPS: tl.constexpr, PADDED_SPLITS: tl.constexpr, PARTS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One part of one row and key head: the sum over its columns, their weight and highest score, by the online softmax.

    :param FRESH: the program whose part has the column at ``column_at`` puts the new key and value there first.
    :param ROTARY: query and new key are turned by the row's angles before.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    pair = tl.program_id(0)
    part = tl.program_id(1)
    row = pair // kv_heads
    head = pair % kv_heads
    begin, end, share, parts = span(first, last, row, BLOCK, SPLITS, WINDOW)
    group = tl.arange(0, TILE)
    size = tl.arange(0, WIDTH)
    if part >= tl.maximum(parts, 1):
        return
    low = begin + part * share
    high = tl.minimum(low + share, end)
    query_at = query + row.to(tl.int64) * query_row + (head * GROUPS + group)[:, None] * query_head + size[None, :]
    cos += row * angle_row
    sin += row * angle_row
    asked = turned(query_at, cos, sin, size[None, :], (group[:, None] < GROUPS) & (size[None, :] < SIZE), SIZE, ROTARY)
    if UPCAST:
        asked = asked.to(tl.float32)
    owner = (row // SHARE).to(tl.int64)
    key_at = keys + owner * key_row + head.to(tl.int64) * key_head
    value_at = values + owner * value_row + head.to(tl.int64) * value_head
    if FRESH:
        new = tl.load(column_at).to(tl.int32)
        within = size < SIZE
        new_key_at = new_keys + row.to(tl.int64) * new_key_row + head * new_key_head + size
        new_key = turned(new_key_at, cos, sin, size, within, SIZE, ROTARY)
        new_value = tl.load(new_values + row.to(tl.int64) * new_value_row + head * new_value_head + size, mask=within, other=0.0)
        if part == tl.minimum(tl.maximum(new - begin, 0) // share, tl.maximum(parts, 1) - 1):
            tl.store(key_at + new.to(tl.int64) * key_column + size, new_key, mask=within)
            tl.store(value_at + new.to(tl.int64) * value_column + size, new_value, mask=within)
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    weight = tl.zeros((TILE,), tl.float32)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    for at in range(low, high, BLOCK):
        column = at + tl.arange(0, BLOCK)
        there = column < high
        key = tl.load(
            key_at + column[None, :].to(tl.int64) * key_column + size[:, None], mask=there[None, :] & (size[:, None] < SIZE), other=0.0
        )
        value = tl.load(
            value_at + column[:, None].to(tl.int64) * value_column + size[None, :], mask=there[:, None] & (size[None, :] < SIZE), other=0.0
        )
        if FRESH:  # not read back from where it was just written: that would be one more wait
            key = tl.where(column[None, :] == new, new_key[:, None], key)
            value = tl.where(column[:, None] == new, new_value[None, :], value)
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(asked, key, input_precision="ieee") * scale
        if SOFTCAP > 0:
            scores = SOFTCAP * (1 - 2 / (tl.exp2(scores * (2 * LOG2E / SOFTCAP)) + 1))  # tanh
        scores = tl.where(there[None, :], scores * LOG2E, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - higher)
        share_of = tl.exp2(scores - higher[:, None])
        weight = weight * shrink + tl.sum(share_of, axis=1)
        total = total * shrink[:, None] + tl.dot(share_of.to(value.dtype), value, input_precision="ieee")
        highest = higher
    if SPLITS == 1 or parts <= 1:
        store(out, total / tl.where(weight > 0, weight, 1.0)[:, None], pair, kv_heads, group, size, GROUPS, SIZE)  # zeros without columns
    else:
        place = (pair * SPLITS + part) * GROUPS + group
        tl.store(sums + place[:, None] * SIZE + size[None, :], total, mask=(group[:, None] < GROUPS) & (size[None, :] < SIZE))
        tl.store(stats + place * 2, highest, mask=group < GROUPS)
        tl.store(stats + place * 2 + 1, weight, mask=group < GROUPS)
        if FUSED:
            tl.debug_barrier()  # every thread's part is written before one of them says so
            if tl.atomic_add(counters + pair, 1, sem="acq_rel") == parts - 1:
                add_up(pair, parts, out, sums, stats, kv_heads, GROUPS, SIZE, WIDTH, SPLITS, PADDED_GROUPS, PADDED_SPLITS, PARTS_AT_ONCE)
                tl.store(counters + pair, 0)


@triton.jit
def combine(
    first, last, out, sums, stats, kv_heads,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    PADDED_GROUPS: tl.constexpr, PADDED_SPLITS: tl.constexpr, PARTS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The second launch where no counters are there to tell which program is the last."""
    pair = tl.program_id(0)
    begin, end, share, parts = span(first, last, pair // kv_heads, BLOCK, SPLITS, WINDOW)
    if parts > 1:
        add_up(pair, parts, out, sums, stats, kv_heads, GROUPS, SIZE, WIDTH, SPLITS, PADDED_GROUPS, PADDED_SPLITS, PARTS_AT_ONCE)
