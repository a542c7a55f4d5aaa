"""What runs in front of a product of many activations and behind it: activations in the weights' order, and sums of parts."""

from __future__ import annotations

import torch

from optkit_plugins.kernels.device import starts_early
from optkit_plugins.kernels.packed.formats import TILE_COLUMNS

#: Column tiles of one activation that a program brings into order.
ORDERED_TILES = 16


def order(x: torch.Tensor) -> torch.Tensor:
    """The activations with their columns in the order in which the weights of ``wide_triton`` meet them."""
    from optkit_plugins.kernels.packed import wide_triton as kernel

    out, blocks, early = torch.empty_like(x), x.shape[1] // TILE_COLUMNS, starts_early(x.device)
    grid = (x.shape[0], -(-blocks // ORDERED_TILES))
    kernel.weight_only_order[grid](x, out, blocks, TILES=ORDERED_TILES, EARLY=early, **({"launch_pdl": True} if early else {}))
    return out


def add_up(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sums (splits, batch, rows) of programs that shared the columns, added in one pass: (batch, rows) in ``dtype``."""
    from optkit_plugins.kernels.packed import plain as kernel

    splits, batch, rows = parts.shape
    out = torch.empty(batch, rows, dtype=dtype, device=parts.device)
    block = 1024
    grid = (-(-out.numel() // block),)
    early = starts_early(parts.device)
    kernel.add_up[grid](
        parts, bias if bias is not None else out, out, out.numel(), rows,
        SPLITS=splits, BIAS=bias is not None, BLOCK=block, EARLY=early, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
