"""Which variant of the kernel runs for which shape, and the launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from optkit_plugins.kernels.weight_only_formats import TABLES, TILE_COLUMNS, Packed, lookup_table


@dataclass(frozen=True)
class Variant:
    """One way to cut the work.

    :ivar pairs: look 4-bit tables up in shared memory, not with byte permutes.
    :ivar column_warps: warps of a program that share the columns. :ivar row_warps: warps that share the rows.
    :ivar row_tiles: tiles of 16 rows a warp. :ivar column_tiles: tiles of 64 columns that a warp loads at once.
    :ivar ahead: load the next tiles before these are computed.
    :ivar overlap: begin to load weights while the kernel before still runs (programmatic dependent launch, sm_90).
    """

    pairs: bool = False
    column_warps: int = 8
    row_warps: int = 1
    row_tiles: int = 1
    column_tiles: int = 4
    ahead: bool = True
    overlap: bool = False


def product(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, variant: Variant, tokens: int | None = None) -> torch.Tensor:
    """``x`` (batch, columns) times the weight's transpose, (batch, rows) in x's dtype.

    :param tokens: activations a program, a multiple of 8.
    """
    from optkit_plugins.kernels import weight_only_triton as kernel

    bfloat16 = x.dtype == torch.bfloat16
    batch, columns = x.shape
    rows = packed.shape[0]
    out = torch.empty(batch, rows, dtype=x.dtype, device=x.device)
    if packed.format in TABLES:
        kind = kernel.PAIRS.value if variant.pairs else kernel.PERMUTE.value
        table, factor = _table(packed.format, x.dtype, variant.pairs, x.device)
    else:
        kind = kernel.BYTES.value if packed.format == "int8" else kernel.AFFINE.value
        table, factor = packed.words, 1.0
    tokens = tokens or min(64, -(-batch // 8) * 8)
    row_tiles, blocks = packed.words.shape[:2]
    groups = -(-row_tiles // (variant.row_warps * variant.row_tiles))
    scale_kind = {torch.bfloat16: kernel.BF16, torch.float16: kernel.FP16, torch.float32: kernel.FP32}[packed.scales.dtype].value
    expand, expand_registers = kernel.expand_assembly(kind, bfloat16)
    multiply, multiply_registers = kernel.multiply_assembly(bfloat16, kind == kernel.BYTES.value)
    kernel.product[(groups, -(-batch // tokens))](
        x.view(torch.int32),
        packed.words,
        packed.scales if packed.scales.dtype == torch.float32 else packed.scales.view(torch.int32),
        packed.zeros.view(torch.int16) if packed.zeros is not None else packed.words,
        table,
        bias if bias is not None else out,
        out,
        batch,
        rows,
        row_tiles,
        blocks,
        1 / factor,
        KIND=kind,
        SCALE=scale_kind,
        TILES_A_GROUP=packed.group // TILE_COLUMNS,
        ZEROS=packed.zeros is not None,
        BIAS=bias is not None,
        WK=variant.column_warps,
        WM=variant.row_warps,
        R=variant.row_tiles,
        U=variant.column_tiles,
        NT=tokens // 8,
        EVEN=blocks % (variant.column_warps * variant.column_tiles) == 0,
        AHEAD=variant.ahead and blocks > variant.column_warps * variant.column_tiles,
        WAITS=variant.overlap,
        EXPAND=expand,
        EXPAND_REGISTERS=expand_registers,
        MULTIPLY=multiply,
        MULTIPLY_REGISTERS=multiply_registers,
        MAGIC=kernel.magic_bits(bfloat16),
        FILL=kernel.FILL,
        FENCE=kernel.FENCE,
        num_warps=variant.column_warps * variant.row_warps,
        launch_pdl=variant.overlap,
    )
    return out


@lru_cache
def _table(format: str, dtype: torch.dtype, pairs: bool, device: torch.device) -> tuple[torch.Tensor, float]:
    """The lookup table on the device: all pairs, or the permutes' eight words, 32 times each (a copy for every lane)."""
    lookup = lookup_table(format, dtype)
    values = torch.tensor(lookup.pairs if pairs else lookup.words, dtype=torch.int64).to(torch.int32)
    return (values if pairs else values.repeat_interleave(32)).to(device), lookup.factor
