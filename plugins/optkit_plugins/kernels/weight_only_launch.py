"""Which variant of the kernels runs for which shape, and their launches. The tensors are those of ``Packed``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from optkit_plugins.kernels.weight_only_formats import TABLES, TILE_COLUMNS, Packed, labels, lookup_table

#: Activations up to which the product is fused; above, the weight is expanded and cuBLAS multiplies.
FUSED_BATCH = 64
#: Row tiles up to which all programs run at once although each takes many registers (two a multiprocessor), from which the rows alone
#: fill a GPU, and from which they fill it many times over.
FEW, MANY, VERY_MANY = 264, 1024, 4096


class LayoutError(RuntimeError):
    """Triton gave threads other registers than the kernel's assembly relies on."""


@dataclass(frozen=True)
class Variant:
    """One way to cut the work.

    :ivar pairs: look 4-bit tables up in shared memory, not with byte permutes.
    :ivar column_warps: warps of a program that share the columns. :ivar row_warps: warps that share the rows.
    :ivar row_tiles: tiles of 16 rows a warp. :ivar column_tiles: tiles of 64 columns that a warp loads at once.
    :ivar ahead: steps whose weights are under way while one is computed.
    :ivar slots: steps of activations that wait in shared memory; 0: each warp reads activations itself.
    :ivar splits: programs that share the columns; their sums are added by a second kernel.
    """

    pairs: bool = False
    column_warps: int = 4
    row_warps: int = 1
    row_tiles: int = 1
    column_tiles: int = 4
    ahead: int = 1
    slots: int = 0
    splits: int = 1


def choose(format: str, batch: int, row_tiles: int, blocks: int) -> Variant:
    """The fastest variant measured on an H200 for shapes like this one (benchmarks/weight_kernels.py)."""
    if batch > 16:
        if row_tiles >= MANY:
            return Variant(row_warps=4, column_warps=1, row_tiles=2, column_tiles=1, slots=4)
        splits = 8 if blocks >= 128 else 4 if blocks >= 32 else 1
        return Variant(row_warps=4, column_warps=1, column_tiles=1, ahead=2 if blocks >= 128 else 1, slots=4, splits=splits)
    table = format in TABLES
    if batch > 8:
        if row_tiles >= MANY:
            return Variant(pairs=table, column_warps=2, row_warps=2, row_tiles=2, column_tiles=2, ahead=0 if table else 1)
        return Variant(pairs=table, ahead=1 if row_tiles <= FEW else 0)
    if table:
        if row_tiles >= VERY_MANY:
            return Variant(pairs=True, column_warps=1, row_warps=4, row_tiles=2, column_tiles=2)
        if row_tiles >= MANY:
            return Variant(pairs=True, column_warps=2, row_warps=2, row_tiles=2, column_tiles=4, ahead=0)
        return Variant(pairs=True, column_tiles=8, ahead=1 if blocks >= 128 else 0)
    if format == "int8":
        return Variant(column_warps=8 if row_tiles < MANY and blocks >= 128 else 4, column_tiles=2 if row_tiles >= VERY_MANY else 4)
    if row_tiles >= VERY_MANY:
        return Variant(row_tiles=2, column_tiles=2, ahead=0)
    return Variant(row_tiles=2, column_tiles=8, ahead=0) if row_tiles >= MANY else Variant(column_tiles=8)


@dataclass(frozen=True)
class Launch:
    """A compiled kernel and what of its arguments is the same in every call of this kind.

    Triton looks its kernel up by every argument anew, which takes longer than a small product: a decode loop of Python would wait for it.
    """

    run: Callable[..., None]
    splits: int
    table: torch.Tensor
    numbers: tuple[Any, ...]


_launches: dict[Any, Launch] = {}


def product(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None, variant: Variant | None = None) -> torch.Tensor:
    """``x`` (batch, columns), bfloat16 or float16, times the weight's transpose: (batch, rows) in x's dtype. Needs sm_80.

    :raises LayoutError: where this Triton would compute something else.
    """
    tensors = (packed.scales, packed.zeros, bias)
    aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
    kinds = (packed.scales.dtype, packed.zeros is None, bias is None, x.dtype, x.device, aligned)
    key = (packed.format, packed.shape, packed.group, x.shape[0], variant, kinds)
    launch = _launches.get(key)
    if launch is None:
        launch = _launches[key] = prepare(x, packed, bias, variant)
    shape = (x.shape[0], packed.shape[0])
    if launch.splits == 1:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty((launch.splits, *shape), dtype=torch.float32, device=x.device)
    launch.run(*_pointers(x, packed, bias, launch.table, out), *launch.numbers)
    return out if launch.splits == 1 else add_up(out, bias, x.dtype)


def prepare(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, variant: Variant | None) -> Launch:
    """Compile the kernel for calls like this one, and check its registers."""
    from optkit_plugins.kernels import weight_only_triton as kernel

    row_tiles, blocks = packed.words.shape[:2]
    variant = variant or choose(packed.format, x.shape[0], row_tiles, blocks)
    values, constants, warps = arguments(x, packed, bias, variant)
    groups = -(-row_tiles // (variant.row_warps * variant.row_tiles))
    grid = (groups, -(-x.shape[0] // (constants["NT"] * 8)), variant.splits)
    compiled = kernel.product.warmup(*values, **constants, num_warps=warps, grid=grid)
    if not one_row_a_thread(compiled):
        raise LayoutError("this Triton lays (threads, 4) tensors out in another way than the fused kernel needs")
    names = kernel.product.arg_names
    numbers = (*values[POINTERS:], *(constants[name] for name in names[len(values) :]))
    return Launch(compiled[grid], variant.splits, values[names.index("table")], numbers)


def add_up(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sums (splits, batch, rows) of programs that shared the columns, added in one pass: (batch, rows) in ``dtype``."""
    from optkit_plugins.kernels import weight_only_plain as kernel

    splits, batch, rows = parts.shape
    out = torch.empty(batch, rows, dtype=dtype, device=parts.device)
    block = 1024
    grid = (-(-out.numel() // block),)
    kernel.add_up[grid](parts, bias if bias is not None else out, out, out.numel(), rows, SPLITS=splits, BIAS=bias is not None, BLOCK=block)
    return out


#: Tensors among the kernel's arguments, which come first.
POINTERS = 7


def _pointers(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, table: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as the kernel reads them; one that is not there is stood for by another."""
    scales = packed.scales if packed.scales.dtype == torch.float32 else packed.scales.view(torch.int32)
    zeros = packed.words if packed.zeros is None else packed.zeros.view(torch.int16)
    return [x.view(torch.int32), packed.words, scales, zeros, table, out if bias is None else bias, out]


def arguments(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, variant: Variant) -> tuple[list[Any], dict[str, Any], int]:
    """The kernel's arguments in order, its constants, and the number of warps. The output is allocated here."""
    from optkit_plugins.kernels import weight_only_triton as kernel

    batch, rows = x.shape[0], packed.shape[0]
    row_tiles, blocks = packed.words.shape[:2]
    bfloat16 = x.dtype == torch.bfloat16
    kind, table, factor = _kind_and_table(packed, x, variant.pairs)
    tokens = next(size for size in (8, 16, 32, 48, 64) if size >= min(batch, 64))
    splits = variant.splits
    shape = (batch, rows) if splits == 1 else (splits, batch, rows)
    out = torch.empty(shape, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    values = _pointers(x, packed, bias, table, out)
    steps = variant.column_warps * variant.column_tiles * splits
    expand, expand_registers = kernel.expand_assembly(kind, bfloat16)
    multiply, multiply_registers = kernel.multiply_assembly(bfloat16, kind == kernel.BYTES.value)
    constants = {
        "KIND": kind,
        "SCALE": {torch.bfloat16: kernel.BF16, torch.float16: kernel.FP16, torch.float32: kernel.FP32}[packed.scales.dtype].value,
        "TILES_A_GROUP": packed.group // TILE_COLUMNS,
        "ZEROS": packed.zeros is not None,
        "BIAS": bias is not None and splits == 1,
        "WK": variant.column_warps,
        "WM": variant.row_warps,
        "R": variant.row_tiles,
        "U": variant.column_tiles,
        "NT": tokens // 8,
        "EVEN": blocks % steps == 0,
        "AHEAD": variant.ahead if blocks > steps else 0,
        "SLOTS": variant.slots,
        "EXPAND": expand,
        "EXPAND_REGISTERS": expand_registers,
        "MULTIPLY": multiply,
        "MULTIPLY_REGISTERS": multiply_registers,
        "MAGIC": kernel.magic_bits(bfloat16),
        "FILL": kernel.FILL,
        "FENCE": kernel.FENCE,
        "COPY": kernel.COPY,
        "READ": kernel.READ,
        "READ_REGISTERS": kernel.READ_REGISTERS,
        "SLOT_BYTES": str(variant.slots * variant.column_warps * tokens * 128),
        "WAIT": kernel.wait_assembly(variant.slots),
    }
    return [*values, batch, rows, row_tiles, blocks, 1 / factor], constants, variant.column_warps * variant.row_warps


def plain_product(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same without assembly, for any dtype and GPU, and under Triton's interpreter."""
    from optkit_plugins.kernels import weight_only_plain as kernel

    row_tiles, blocks = packed.words.shape[:2]
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    kernel.product[(row_tiles, x.shape[0])](
        x,
        *_plain_arguments(packed),
        bias if bias is not None else out,
        out,
        packed.shape[0],
        blocks,
        BIAS=bias is not None,
        **_plain(packed),
    )
    return out


def expand(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight (rows × columns) on a GPU, in one pass."""
    from optkit_plugins.kernels import weight_only_plain as kernel

    row_tiles, blocks = packed.words.shape[:2]
    out = torch.empty(packed.shape, dtype=dtype, device=packed.words.device)
    kernel.expand[(row_tiles, blocks)](*_plain_arguments(packed), out, packed.shape[0], blocks, **_plain(packed))
    return out


def _plain_arguments(packed: Packed) -> tuple[torch.Tensor, ...]:
    table = _values(packed.format, packed.words.device) if packed.format in TABLES else packed.words
    return packed.words, packed.scales, packed.zeros if packed.zeros is not None else packed.words, table


def _plain(packed: Packed) -> dict[str, int | bool]:
    kind = 0 if packed.format in TABLES else 2 if packed.format == "int8" else 1
    return {"KIND": kind, "TILES_A_GROUP": packed.group // TILE_COLUMNS, "ZEROS": packed.zeros is not None}


def one_row_a_thread(compiled: Any) -> bool:
    """Whether every assembly over four registers got its thread's own row, as the kernel's arithmetic assumes of Triton's layouts."""
    text = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", text, re.MULTILINE))
    used = re.findall(r"packed_element = 4 .*?: tensor<\d+x4x\w+, (#\w+)>", text)
    return bool(used) and all(layouts.get(name, "").startswith("sizePerThread = [1, 4], threadsPerWarp = [32, 1]") for name in used)


def _kind_and_table(packed: Packed, x: torch.Tensor, pairs: bool) -> tuple[int, torch.Tensor, float]:
    from optkit_plugins.kernels import weight_only_triton as kernel

    if packed.format not in TABLES:
        return kernel.BYTES.value if packed.format == "int8" else kernel.AFFINE.value, packed.words, 1.0
    return kernel.PAIRS.value if pairs else kernel.PERMUTE.value, *_lookup(packed.format, x.dtype, pairs, x.device)


def make_tables(format: str, device: torch.device) -> None:
    """Put a format's lookup tables on the device now: made while a CUDA graph is recorded, they would lie in its memory pool."""
    if format in TABLES:
        _values(format, device)
        for dtype in (torch.bfloat16, torch.float16):
            for pairs in (False, True):
                _lookup(format, dtype, pairs, device)


@lru_cache
def _lookup(format: str, dtype: torch.dtype, pairs: bool, device: torch.device) -> tuple[torch.Tensor, float]:
    """The lookup table on the device: all pairs, or the permutes' eight words, 32 times each (a copy for every lane)."""
    lookup = lookup_table(format, dtype)
    words = torch.tensor(lookup.pairs if pairs else lookup.words, dtype=torch.int64).to(torch.int32)
    return (words if pairs else words.repeat_interleave(32)).to(device), lookup.factor


@lru_cache
def _values(format: str, device: torch.device) -> torch.Tensor:
    """The 16 values by label, float32."""
    return torch.tensor([TABLES[format][code] for code in labels(format)], device=device)
