"""Lookup tables of 4-bit formats on a device, made once for each."""

from __future__ import annotations

from functools import lru_cache

import torch

from optkit_plugins.kernels.packed.tables import TABLES, labels, lookup_table


def make_tables(format: str, device: torch.device) -> None:
    """Put a format's lookup tables on the device now: made while a CUDA graph is recorded, they would lie in its memory pool."""
    if format in TABLES:
        values(format, device)
        for dtype in (torch.bfloat16, torch.float16):
            for pairs in (False, True):
                lookup(format, dtype, pairs, device)


@lru_cache
def lookup(format: str, dtype: torch.dtype, pairs: bool, device: torch.device) -> tuple[torch.Tensor, float]:
    """The lookup table on the device: all pairs, and 4 times each lane; or the permutes' eight words, 32 times each (a copy for every lane)."""
    lookup = lookup_table(format, dtype)
    words = torch.tensor(lookup.pairs if pairs else lookup.words, dtype=torch.int64).to(torch.int32)
    offsets = torch.arange(0, 128, 4, dtype=torch.int32)
    return (torch.cat((words, offsets)) if pairs else words.repeat_interleave(32)).to(device), lookup.factor


@lru_cache
def values(format: str, device: torch.device) -> torch.Tensor:
    """The 16 values by label, float32."""
    return torch.tensor([TABLES[format][code] for code in labels(format)], device=device)
