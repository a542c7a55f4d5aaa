"""Launches of the kernels for packed weights, and what they are given. The tensors are those of ``Packed``.

One activation, some, and many have a kernel each: ``row_triton``, ``few_triton`` and ``wide_triton``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from optkit_plugins.kernels.packed.formats import TABLES, TILE_COLUMNS, Packed, lookup_table
from optkit_plugins.kernels.packed.lookup import lookup
from optkit_plugins.kernels.packed.variants import Few, Row, Wide, choose

#: Bytes of shared memory up to which Triton takes what every kernel may have, without asking the driver for more.
SMALL_SHARED = 48 << 10


class LayoutError(RuntimeError):
    """Triton gave threads other registers than the kernel's assembly relies on."""


@dataclass(frozen=True)
class Fused:
    """What a product of one activation does beside multiplying (see ``fused.product``)."""

    norm_weight: torch.Tensor | None = None
    eps: float = 0.0
    residual: torch.Tensor | None = None
    gated: bool = False


@dataclass(frozen=True)
class Call:
    """A kernel's arguments: tensors, then numbers, then constants; warps and stages of a program; programs."""

    kernel: Any
    tensors: list[torch.Tensor]
    numbers: list[Any]
    constants: dict[str, Any]
    warps: int
    grid: tuple[int, ...]
    stages: int = 1


@dataclass(frozen=True)
class Launch:
    """A compiled kernel and what of its arguments is the same in every call of this kind.

    Triton looks its kernel up by every argument anew, which takes longer than a small product: a decode loop of Python would wait for it.
    """

    run: Callable[..., None]
    variant: Row | Few | Wide
    numbers: tuple[Any, ...]


_launches: dict[Any, Launch] = {}
NOTHING = Fused()


def product(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None = None,
    variant: Row | Few | Wide | None = None,
    fused: Fused = NOTHING,
) -> torch.Tensor:
    """``x`` (batch, columns), bfloat16 or float16, times the weight's transpose: (batch, rows) in x's dtype. Needs sm_80.

    :param fused: with a batch of one alone, and a norm with bfloat16 alone. Gated, half of the rows are a multiple of 16.
    :raises LayoutError: where this Triton would compute something else.
    """
    tensors = (packed.scales, packed.zeros, bias, fused.norm_weight, fused.residual)
    aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
    kinds = (packed.scales.dtype, *(tensor is None for tensor in tensors[1:]), fused.eps, fused.gated, x.dtype, x.device, aligned)
    key = (packed.format, packed.shape, packed.group, x.shape[0], variant, kinds)
    launch = _launches.get(key)
    row_tiles, blocks = packed.words.shape[:2]
    chosen = launch.variant if launch else variant or choose(packed.format, x.shape[0], row_tiles, blocks, fused.gated)
    out = _output(x, packed, chosen, fused)
    if launch is None:
        launch = _launches[key] = prepare(arguments(x, packed, bias, chosen, fused, out), chosen)
    launch.run(*pointers(x, packed, bias, chosen, fused, out), *launch.numbers)
    return out if out.dim() == 2 else add_up(out, bias, x.dtype)


def prepare(call: Call, variant: Row | Few | Wide) -> Launch:
    """Compile the kernel for calls like this one, and check its registers."""
    compiled = call.kernel.warmup(
        *call.tensors, *call.numbers, **call.constants, num_warps=call.warps, num_stages=call.stages, grid=call.grid
    )
    if not isinstance(variant, Wide) and not one_row_a_thread(compiled):
        raise LayoutError("this Triton lays (threads, 4) tensors out in another way than the fused kernel needs")
    if isinstance(variant, Wide) and variant.pairs and compiled.metadata.shared <= SMALL_SHARED:
        raise LayoutError(f"the kernel's own {compiled.metadata.shared} bytes of shared memory leave no room for the pairs beside them")
    names = call.kernel.arg_names[len(call.tensors) + len(call.numbers) :]
    return Launch(compiled[(*call.grid, 1, 1)[:3]], variant, (*call.numbers, *(call.constants[name] for name in names)))


def add_up(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sums (splits, batch, rows) of programs that shared the columns, added in one pass: (batch, rows) in ``dtype``."""
    from optkit_plugins.kernels.packed import plain as kernel

    splits, batch, rows = parts.shape
    out = torch.empty(batch, rows, dtype=dtype, device=parts.device)
    block = 1024
    grid = (-(-out.numel() // block),)
    kernel.add_up[grid](parts, bias if bias is not None else out, out, out.numel(), rows, SPLITS=splits, BIAS=bias is not None, BLOCK=block)
    return out


# Arguments ----------------------------------------------------------------------------------------------------------------------------


def arguments(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, variant: Row | Few | Wide, fused: Fused, out: torch.Tensor
) -> Call:
    if isinstance(variant, Row):
        return _row_call(x, packed, bias, variant, fused, out)
    if isinstance(variant, Few):
        return _few_call(x, packed, bias, variant, fused, out)
    return _wide_call(x, packed, bias, variant, fused, out)


def _output(x: torch.Tensor, packed: Packed, variant: Row | Few | Wide, fused: Fused) -> torch.Tensor:
    shape = (x.shape[0], packed.shape[0] // (2 if fused.gated else 1))
    if isinstance(variant, Wide) and variant.splits > 1:
        return torch.empty((variant.splits, *shape), dtype=torch.float32, device=x.device)
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def pointers(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, variant: Row | Few | Wide, fused: Fused, out: torch.Tensor
) -> list[torch.Tensor]:
    """The tensors as the kernels read them; one that is not there is stood for by another."""
    wide = isinstance(variant, Wide)
    scales = packed.scales if packed.scales.dtype == torch.float32 else packed.scales.view(torch.int32)
    zeros = packed.words if packed.zeros is None else _words(packed.zeros) if wide else packed.zeros.view(torch.int16)
    table = lookup(packed.format, x.dtype, _pairs(variant), x.device)[0] if packed.format in TABLES else packed.words
    more = [out if fused.norm_weight is None else fused.norm_weight.view(torch.int32), out if fused.residual is None else fused.residual]
    return [
        x if wide else x.view(torch.int32), packed.words, scales, zeros, table, out if bias is None else bias,
        *(more if isinstance(variant, Row) else ()), out,
    ]  # fmt: skip


def _pairs(variant: Row | Few | Wide) -> bool:
    return True if isinstance(variant, Row) else variant.pairs


def _words(zeros: torch.Tensor) -> torch.Tensor:
    """uint8 (row tiles, groups, 8, 2) as int32 (row tiles, groups, 4)."""
    return zeros.flatten(2).view(torch.int32)


def _row_call(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, variant: Row, fused: Fused, out: torch.Tensor) -> Call:
    from optkit_plugins.kernels.packed import assembly
    from optkit_plugins.kernels.packed import row_triton as kernel

    row_tiles, blocks = packed.words.shape[:2]
    bfloat16 = x.dtype == torch.bfloat16
    kind = {"int4": assembly.BIASED, "int8": assembly.BYTES}.get(packed.format, assembly.PAIRS).value
    step = variant.column_warps * variant.column_tiles
    constants = {
        **common(packed, bias is not None),
        **_assembly(kind, bfloat16, False),
        "KIND": kind,
        "NORM": fused.norm_weight is not None,
        "RESIDUAL": fused.residual is not None,
        "GATED": fused.gated,
        "WK": variant.column_warps,
        "WM": variant.row_warps,
        "U": variant.column_tiles,
        "STEPS": -(-blocks // step),
        "EVEN": blocks >= step,
        "MAGIC": assembly.magic(bfloat16),
        "ONES": assembly.one_bits(bfloat16),
        "FILL": assembly.FILL,
        "TIMES": assembly.TIMES,
    }
    numbers = [packed.shape[0], row_tiles, blocks, inverse(packed, x.dtype), fused.eps, 1]
    warps = variant.column_warps * variant.row_warps
    grid = (-(-row_tiles // variant.row_warps),)
    return Call(kernel.weight_only_product_row, pointers(x, packed, bias, variant, fused, out), numbers, constants, warps, grid)


def _few_call(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, variant: Few, fused: Fused, out: torch.Tensor) -> Call:
    from optkit_plugins.kernels.packed import assembly
    from optkit_plugins.kernels.packed import few_triton as kernel

    row_tiles, blocks = packed.words.shape[:2]
    bfloat16 = x.dtype == torch.bfloat16
    table = assembly.PAIRS if variant.pairs else assembly.PERMUTE
    kind = {"int4": assembly.AFFINE, "int8": assembly.BYTES}.get(packed.format, table).value
    tokens = 8 if x.shape[0] <= 8 else 16
    step = variant.column_warps * variant.column_tiles
    constants = {
        **common(packed, bias is not None),
        **_assembly(kind, bfloat16, kind == assembly.BYTES.value),
        "KIND": kind,
        "WK": variant.column_warps,
        "WM": variant.row_warps,
        "R": variant.row_tiles,
        "U": variant.column_tiles,
        "NT": tokens // 8,
        "EVEN": blocks % step == 0,
        "AHEAD": variant.ahead if blocks > step else 0,
        "MAGIC": assembly.magic_bits(bfloat16),
        "FILL": assembly.FILL,
    }
    numbers = [x.shape[0], packed.shape[0], row_tiles, blocks, inverse(packed, x.dtype), 1]
    grid = (-(-row_tiles // (variant.row_warps * variant.row_tiles)), -(-x.shape[0] // tokens))
    warps = variant.column_warps * variant.row_warps
    return Call(kernel.weight_only_product_few, pointers(x, packed, bias, variant, fused, out), numbers, constants, warps, grid)


def _wide_call(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, variant: Wide, fused: Fused, out: torch.Tensor) -> Call:
    from optkit_plugins.kernels.packed import assembly
    from optkit_plugins.kernels.packed import wide_triton as kernel

    row_tiles, blocks = packed.words.shape[:2]
    constants = {
        **common(packed, bias is not None and variant.splits == 1),
        **wide_assembly(packed, x.dtype, variant.pairs),
        "RT": variant.row_tiles,
        "TOKENS": variant.tokens,
        "STEPS": 0,
        "STAGES": variant.stages,
        "WARPS": variant.warps,
        "FILL": assembly.FILL,
        "SHARED_PAIRS": assembly.SHARED_PAIRS,
    }
    numbers = [x.shape[0], packed.shape[0], row_tiles, blocks, blocks // variant.splits, inverse(packed, x.dtype)]
    grid = (-(-row_tiles // variant.row_tiles), -(-x.shape[0] // variant.tokens), variant.splits)
    given = pointers(x, packed, bias, variant, fused, out)
    return Call(kernel.weight_only_product_wide, given, numbers, constants, variant.warps, grid, variant.stages)


def common(packed: Packed, bias: bool) -> dict[str, Any]:
    from optkit_plugins.kernels.packed import assembly

    scale = {torch.bfloat16: assembly.BF16, torch.float16: assembly.FP16, torch.float32: assembly.FP32}[packed.scales.dtype].value
    return {"SCALE": scale, "TILES_A_GROUP": packed.group // TILE_COLUMNS, "ZEROS": packed.zeros is not None, "BIAS": bias}


def _assembly(kind: int, bfloat16: bool, adds: bool) -> dict[str, str]:
    from optkit_plugins.kernels.packed import assembly

    expand, expand_registers = assembly.expand_assembly(kind, bfloat16)
    multiply, multiply_registers = assembly.multiply_assembly(bfloat16, adds)
    return {
        "EXPAND": expand, "EXPAND_REGISTERS": expand_registers, "MULTIPLY": multiply, "MULTIPLY_REGISTERS": multiply_registers,
    }  # fmt: skip


def wide_assembly(packed: Packed, dtype: torch.dtype, pairs: bool = False) -> dict[str, Any]:
    """The constants of ``wide_triton`` that stand for a format."""
    from optkit_plugins.kernels.packed import assembly

    table = assembly.NAMED if pairs else assembly.PERMUTE
    kind = {"int4": assembly.AFFINE, "int8": assembly.BYTES}.get(packed.format, table).value
    written = assembly.BIASED.value if kind == assembly.AFFINE.value else kind
    expand, registers = assembly.expand_word_assembly(written, dtype == torch.bfloat16)
    return {"KIND": kind, "ASSEMBLY": True, "EXPAND": expand, "EXPAND_REGISTERS": registers}


def inverse(packed: Packed, dtype: torch.dtype) -> float:
    return 1 / lookup_table(packed.format, dtype).factor if packed.format in TABLES else 1.0


def one_row_a_thread(compiled: Any) -> bool:
    """Whether every assembly over four registers got its thread's own row, as the kernel's arithmetic assumes of Triton's layouts."""
    text = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", text, re.MULTILINE))
    used = re.findall(r"packed_element = 4 .*?: tensor<\d+x4x\w+, (#\w+)>", text)
    return bool(used) and all(layouts.get(name, "").startswith("sizePerThread = [1, 4], threadsPerWarp = [32, 1]") for name in used)
