"""Weights of 4 and 8 bits in the order in which tensor cores want them, in plain torch.

A weight (rows × columns) is cut into tiles of 16 rows and 64 columns. A tile is what the 32 threads of a warp read with one 16-byte load
each (two for 8 bits), and every thread gets just the values that ``mma.m16n8k16`` expects of it: thread ``4 g + t`` holds rows ``g`` and
``g + 8``, and columns ``8 t … 8 t + 7`` of both halves of the tile; of 4-bit weights, word ``j`` holds four columns of both rows.
Which columns make up a step of the product does not matter to a sum, as long as the activations are read in the same order.

4-bit tables (NF4, FP4) are stored by *label*, a renaming of the codes that suits the byte permutes which look the values up
(``tables.lookup_table``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from optkit_plugins.kernels.packed.tables import TABLES, labels

Format = Literal["nf4", "fp4", "int4", "int8", "fp8"]
FORMATS: tuple[str, ...] = get_args(Format)
#: Formats of 8 bits: the same layout, and one scale a row.
EIGHT_BITS = ("int8", "fp8")
TILE_ROWS, TILE_COLUMNS = 16, 64


@dataclass
class Packed:
    """A weight ready for the kernels.

    :ivar words: int32 (row tiles, column tiles, 32, 4), for 8 bits (row tiles, column tiles, 2, 32, 4).
    :ivar scales: one scale a group: (row tiles, groups, 8, 2) with rows ``g`` and ``g + 8`` side by side; for 8 bits one group a row.
        16 bits wide where that loses nothing, which is so for every weight that had 16 bits itself.
    :ivar zeros: uint8 codes that stand for zero, shaped like the scales; ``int4`` only.
    :ivar group: columns that share a scale.
    """

    format: str
    shape: tuple[int, int]
    group: int
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def stored_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.words, self.scales, self.zeros) if t is not None)


def why_not(shape: tuple[int, int], group: int) -> str | None:
    """Why a weight of this shape cannot be packed, or ``None``."""
    columns = shape[1]
    if columns % TILE_COLUMNS:
        return f"input width {columns} is no multiple of {TILE_COLUMNS}"
    if group % TILE_COLUMNS or columns % group:
        return f"groups of {group} columns: the size has to be a multiple of {TILE_COLUMNS} that divides the input width {columns}"
    return None


# Quantization -------------------------------------------------------------------------------------------------------------------------


def pack(weight: torch.Tensor, format: str, group: int | None = None) -> Packed:
    """Quantize ``weight`` (rows × columns). ``group`` is 64 by default and a whole row for 8 bits."""
    if format in TABLES:
        return pack_table(weight, format, group or 64)
    if format == "int4":
        return pack_int4(weight, group or 64)
    if format == "int8":
        return pack_int8(weight)
    if format == "fp8":
        return pack_fp8_codes(*round_fp8(weight))
    raise ValueError(f"format {format!r}: known are {', '.join(FORMATS)}")


def pack_nf4(weight: torch.Tensor, blocksize: int = 64) -> Packed:
    return pack_table(weight, "nf4", blocksize)


def pack_table(weight: torch.Tensor, format: str, blocksize: int) -> Packed:
    """The nearest of the 16 values times the block's largest magnitude."""
    _require(weight, blocksize)
    blocks = weight.detach().float().reshape(weight.shape[0], -1, blocksize)
    absmax = blocks.abs().amax(-1)
    unit = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    values, codes = torch.tensor(TABLES[format], device=weight.device).sort(stable=True)
    nearest = torch.bucketize(unit, (values[1:] + values[:-1]) / 2)
    return pack_table_codes(codes[nearest].reshape(weight.shape).to(torch.uint8), absmax, format, blocksize)


def pack_table_codes(codes: torch.Tensor, absmax: torch.Tensor, format: str, blocksize: int) -> Packed:
    """From uint8 codes (rows × columns) of bitsandbytes' table and the blocks' absmax (rows × columns / blocksize)."""
    _require(codes, blocksize)
    label_of = torch.empty(16, dtype=torch.uint8, device=codes.device)
    label_of[torch.tensor(labels(format), device=codes.device)] = torch.arange(16, dtype=torch.uint8, device=codes.device)
    words = _tile_4bit(label_of[codes.int()], by_row=True)
    return Packed(format, (codes.shape[0], codes.shape[1]), blocksize, words, _tile_groups(narrow(absmax)))


def pack_bitsandbytes(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], format: str, blocksize: int) -> Packed:
    """From bitsandbytes' bytes (two codes each, high nibble first, row after row) and its plain float32 absmax."""
    data = packed.view(torch.uint8).reshape(-1)
    codes = torch.stack((data >> 4, data & 15), dim=1).reshape(shape)
    return pack_table_codes(codes, absmax.float().reshape(shape[0], -1), format, blocksize)


def pack_int4(weight: torch.Tensor, group: int) -> Packed:
    """Rounded to 16 steps between a group's least and greatest value (zero included)."""
    _require(weight, group)
    groups = weight.detach().float().reshape(weight.shape[0], -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-7)
    if weight.dtype != torch.float32:
        scale = scale.to(weight.dtype).float().clamp(min=torch.finfo(weight.dtype).tiny)
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    return pack_int4_codes(codes.reshape(weight.shape).to(torch.uint8), scale, zero.to(torch.uint8), group)


def pack_int4_codes(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group: int) -> Packed:
    """From uint8 codes (rows × columns), scales and zeros (rows × groups): ``(code - zero) * scale``, zero 8 where there is none."""
    _require(codes, group)
    tiled_zeros = None if zeros is None else _tile_groups(zeros.to(torch.uint8))
    return Packed(
        "int4", (codes.shape[0], codes.shape[1]), group, _tile_4bit(codes, by_row=False), _tile_groups(narrow(scales)), tiled_zeros
    )


def pack_int8(weight: torch.Tensor) -> Packed:
    """Symmetric, one scale a row."""
    rows = weight.detach().float()
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
    return pack_int8_codes((rows / scale).round().clamp(-127, 127).to(torch.int8), scale)


def pack_int8_codes(codes: torch.Tensor, scales: torch.Tensor) -> Packed:
    """From int8 codes (rows × columns) and one scale a row."""
    _require(codes, codes.shape[1])
    return Packed("int8", (codes.shape[0], codes.shape[1]), codes.shape[1], _tile_8bit(codes), _tile_groups(scales.float().reshape(-1, 1)))


def round_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest float8 e4m3 values (rows × columns) and float32 scales (rows × 1): a row's largest magnitude becomes 448, the greatest.

    In float32 whatever the weight's dtype: float16 could not hold the scale of a row of small weights. A row of zeros stays zeros.
    """
    rows, greatest = weight.detach().float(), torch.finfo(torch.float8_e4m3fn).max
    scale = (rows.abs().amax(1, keepdim=True) / greatest).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / scale).clamp(-greatest, greatest).to(torch.float8_e4m3fn), scale


def pack_fp8_codes(codes: torch.Tensor, scales: torch.Tensor) -> Packed:
    """From float8 e4m3 values (rows × columns) and one scale a row."""
    packed = pack_int8_codes(codes.view(torch.int8), scales)
    return replace(packed, format="fp8")


def narrow(scales: torch.Tensor) -> torch.Tensor:
    """The scales in 16 bits where every one of them survives that, else in float32."""
    scales = scales.float()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    return scales


# Back ---------------------------------------------------------------------------------------------------------------------------------


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight (rows × columns), computed in float32."""
    rows, columns = packed.shape
    scales, codes = _untile_groups(packed.scales, rows).float(), integers(packed)
    if packed.format in EIGHT_BITS:
        return (codes.float() * scales).to(dtype)
    if packed.format in TABLES:
        values = torch.tensor(TABLES[packed.format], device=codes.device)[torch.tensor(labels(packed.format), device=codes.device)]
        units = values[codes.int()].reshape(rows, -1, packed.group)
    else:
        zeros = 8 if packed.zeros is None else _untile_groups(packed.zeros, rows).float()[..., None]
        units = codes.float().reshape(rows, -1, packed.group) - zeros
    return (units * scales[..., None]).reshape(rows, columns).to(dtype)


def integers(packed: Packed) -> torch.Tensor:
    """What is stored of each weight, rows × columns: int8 or float8 values, codes of ``int4``, or labels of a table."""
    if packed.format in EIGHT_BITS:
        values = _untile_8bit(packed.words, packed.shape)
        return values.view(torch.float8_e4m3fn) if packed.format == "fp8" else values
    return _untile_4bit(packed.words, packed.shape, by_row=packed.format in TABLES)


def to_bitsandbytes(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (n, 1) and float32 absmax, flat, as bitsandbytes stores them: the reverse of ``pack_bitsandbytes``."""
    codes = torch.tensor(labels(packed.format), dtype=torch.uint8, device=packed.words.device)[integers(packed).int()].reshape(-1, 2)
    return (codes[:, 0] << 4 | codes[:, 1])[:, None], _untile_groups(packed.scales, packed.shape[0]).float().reshape(-1)


# Layout -------------------------------------------------------------------------------------------------------------------------------


def _require(weight: torch.Tensor, group: int) -> None:
    problem = why_not((weight.shape[0], weight.shape[1]), group)
    if problem:
        raise ValueError(problem)


def _row_tiles(values: torch.Tensor) -> torch.Tensor:
    missing = -values.shape[0] % TILE_ROWS
    return torch.nn.functional.pad(values, (0, 0, 0, missing)) if missing else values


def _tile_4bit(codes: torch.Tensor, by_row: bool) -> torch.Tensor:
    """:param by_row: a word's nibbles are four columns of the first row, then of the second (byte permutes); else the nibbles 0 and 4,
    1 and 5 and so on are neighbouring columns of one row, as masks and shifts want them.
    """
    codes = _row_tiles(codes)
    tiles, blocks = codes.shape[0] // 16, codes.shape[1] // 64
    values = codes.reshape(tiles, 2, 8, blocks, 2, 4, 2, 2, 2)  # tile, half, g, block, j1, t, j0, c1, c0
    values = values.permute(0, 3, 2, 5, 4, 6, 1, 7, 8) if by_row else values.permute(0, 3, 2, 5, 4, 6, 8, 7, 1)
    nibbles = values.reshape(tiles, blocks, 32, 16, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous().view(torch.int32)


def _untile_4bit(words: torch.Tensor, shape: tuple[int, int], by_row: bool) -> torch.Tensor:
    tiles, blocks = words.shape[:2]
    data = words.contiguous().view(torch.uint8)
    nibbles = torch.stack((data & 15, data >> 4), dim=-1).reshape(tiles, blocks, 8, 4, 2, 2, 2, 2, 2)
    values = nibbles.permute(0, 6, 2, 1, 4, 3, 5, 7, 8) if by_row else nibbles.permute(0, 8, 2, 1, 4, 3, 5, 7, 6)
    return values.reshape(tiles * 16, blocks * 64)[: shape[0]]


def _tile_8bit(codes: torch.Tensor) -> torch.Tensor:
    codes = _row_tiles(codes)
    tiles, blocks = codes.shape[0] // 16, codes.shape[1] // 64
    # step j = 2 j1 + j0 is in load j1; a word is four columns of one row, bytes 0 and 2 neighbours, and 1 and 3
    values = codes.reshape(tiles, 2, 8, blocks, 2, 4, 2, 2, 2)  # tile, half, g, block, j1, t, j0, c1, c0
    return values.permute(0, 3, 4, 2, 5, 6, 1, 8, 7).contiguous().reshape(tiles, blocks, 2, 32, 16).view(torch.int32)


def _untile_8bit(words: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    tiles, blocks = words.shape[:2]
    values = words.contiguous().view(torch.int8).reshape(tiles, blocks, 2, 8, 4, 2, 2, 2, 2)
    return values.permute(0, 6, 3, 1, 2, 4, 5, 8, 7).reshape(tiles * 16, blocks * 64)[: shape[0]]


def _tile_groups(values: torch.Tensor) -> torch.Tensor:
    values = _row_tiles(values)
    tiles, groups = values.shape[0] // 16, values.shape[1]
    return values.reshape(tiles, 2, 8, groups).permute(0, 3, 2, 1).contiguous()


def _untile_groups(tiled: torch.Tensor, rows: int) -> torch.Tensor:
    tiles, groups = tiled.shape[:2]
    return tiled.permute(0, 3, 2, 1).reshape(tiles * 16, groups)[:rows]
