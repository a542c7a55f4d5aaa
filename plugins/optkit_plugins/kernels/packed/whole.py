"""Packed weights expanded on a GPU, and products without assembly: for large batches, and for what the fast kernels don't take."""

from __future__ import annotations

import torch

from optkit_plugins.kernels.packed.formats import TABLES, TILE_COLUMNS, Packed
from optkit_plugins.kernels.packed.launch import NOTHING, common, inverse, pointers, wide_assembly
from optkit_plugins.kernels.packed.lookup import values
from optkit_plugins.kernels.packed.variants import Wide

#: Row tiles of a program that expands a weight.
TILES = 4


def plain_product(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same without assembly, for any dtype and GPU, and under Triton's interpreter."""
    from optkit_plugins.kernels.packed import plain as kernel

    row_tiles, blocks = packed.words.shape[:2]
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    kernel.product[(row_tiles, x.shape[0])](
        x, *_arguments(packed), bias if bias is not None else out, out, packed.shape[0], blocks,
        BIAS=bias is not None, **_constants(packed),
    )  # fmt: skip
    return out


def expand(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight (rows × columns) in 16 bits, in one pass. Needs sm_80."""
    from optkit_plugins.kernels.packed import wide_triton as kernel

    row_tiles, blocks = packed.words.shape[:2]
    out = torch.empty(packed.shape, dtype=dtype, device=packed.words.device)
    _, words, scales, zeros, table, *_ = pointers(out.new_empty(0), packed, None, Wide(TILES, 16, 1, 4), NOTHING, out)
    kernel.weight_only_expand[(-(-row_tiles // TILES), blocks)](
        words, scales, zeros, table, out, packed.shape[0], row_tiles, blocks, inverse(packed, dtype),
        **{name: value for name, value in common(packed, False).items() if name != "BIAS"}, **wide_assembly(packed, dtype),
        RT=TILES, num_warps=4,
    )  # fmt: skip
    return out


def plain_expand(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The same without assembly, for any dtype and GPU, and under Triton's interpreter."""
    from optkit_plugins.kernels.packed import plain as kernel

    row_tiles, blocks = packed.words.shape[:2]
    out = torch.empty(packed.shape, dtype=dtype, device=packed.words.device)
    kernel.expand[(row_tiles, blocks)](*_arguments(packed), out, packed.shape[0], blocks, **_constants(packed))
    return out


def _arguments(packed: Packed) -> tuple[torch.Tensor, ...]:
    table = values(packed.format, packed.words.device) if packed.format in TABLES else packed.words
    return packed.words, packed.scales, packed.zeros if packed.zeros is not None else packed.words, table


def _constants(packed: Packed) -> dict[str, int | bool]:
    kind = 0 if packed.format in TABLES else {"int4": 1, "int8": 2, "fp8": 3}[packed.format]
    return {"KIND": kind, "TILES_A_GROUP": packed.group // TILE_COLUMNS, "ZEROS": packed.zeros is not None}
