"""Launches of the kernels for packed weights, and what they are given. The tensors are those of ``Packed``.

One activation, some, and many have a kernel each: ``row_triton``, ``few_triton`` and ``wide_triton``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from optkit_plugins.kernels.device import ROOMY_SHARED, most_shared, multiplies_in_background, starts_early
from optkit_plugins.kernels.packed.around import add_up, order
from optkit_plugins.kernels.packed.formats import TILE_COLUMNS, Packed
from optkit_plugins.kernels.packed.lookup import lookup
from optkit_plugins.kernels.packed.tables import TABLES, lookup_table
from optkit_plugins.kernels.packed.variants import Few, Row, Wide, choose

#: Bytes of shared memory up to which Triton takes what every kernel may have, without asking the driver for more.
SMALL_SHARED = 48 << 10
#: Bytes of the pairs of values that ``assembly.SHARED_PAIRS`` makes room for.
PAIRS_SHARED = 32 << 10


class LayoutError(RuntimeError):
    """Triton gave threads other registers than the kernel's assembly relies on, or a program more shared memory than there is."""


@dataclass(frozen=True)
class Fused:
    """What a product of one activation does beside multiplying (see ``fused.product``).

    :ivar early: it may start before the kernel in front of it is done, and reads its weights before it waits for that: only for weights
        that no kernel has written just before.
    """

    norm_weight: torch.Tensor | None = None
    eps: float = 0.0
    residual: torch.Tensor | None = None
    gated: bool = False
    early: bool = False


@dataclass(frozen=True)
class Call:
    """A kernel's arguments: tensors, then numbers, then constants; warps and stages of a program; programs; whether they start early."""

    kernel: Any
    tensors: list[torch.Tensor]
    numbers: list[Any]
    constants: dict[str, Any]
    warps: int
    grid: tuple[int, ...]
    stages: int = 1
    early: bool = False


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
    absent = tuple(tensor is None for tensor in tensors)
    kinds = (packed.scales.dtype, absent, fused.eps, fused.gated, fused.early, x.dtype, x.device, aligned)
    key = (packed.format, packed.shape, packed.group, x.shape[0], variant, kinds)
    launch = _launches.get(key)
    row_tiles, blocks = packed.words.shape[:2]
    chosen = launch.variant if launch else fitting(variant or choose(packed.format, x.shape[0], row_tiles, blocks, fused.gated), x.device)
    if isinstance(chosen, Wide) and chosen.ordered:
        x = order(x)
    out = _output(x, packed, chosen, fused)
    if launch is None:
        launch = _launches[key] = prepare(arguments(x, packed, bias, chosen, fused, out), chosen)
    launch.run(*pointers(x, packed, bias, chosen, fused, out), *launch.numbers)
    return out if out.dim() == 2 else add_up(out, bias, x.dtype)


def prepare(call: Call, variant: Row | Few | Wide) -> Launch:
    """Compile the kernel for calls like this one, and check its registers."""
    options = {"num_warps": call.warps, "num_stages": call.stages, **({"launch_pdl": True} if call.early else {})}
    compiled = call.kernel.warmup(*call.tensors, *call.numbers, **call.constants, **options, grid=call.grid)
    if not isinstance(variant, Wide) and not one_row_a_thread(compiled):
        raise LayoutError("this Triton lays (threads, 4) tensors out in another way than the fused kernel needs")
    if isinstance(variant, Wide) and call.tensors[0].is_cuda:
        check_shared(compiled.metadata.shared, variant, call.tensors[0].device)
    names = call.kernel.arg_names[len(call.tensors) + len(call.numbers) :]
    return Launch(compiled[(*call.grid, 1, 1)[:3]], variant, (*call.numbers, *(call.constants[name] for name in names)))


def fitting(variant: Row | Few | Wide, device: torch.device) -> Row | Few | Wide:
    """Byte permutes instead of pairs in shared memory where many activations leave no room for these (sm_86, 89 and 120)."""
    if isinstance(variant, Wide) and variant.pairs and most_shared(device) < ROOMY_SHARED:
        return replace(variant, pairs=False)
    return variant


def check_shared(own: int, variant: Wide, device: torch.device) -> None:
    """:param own: bytes of shared memory that Triton knows of.

    :raises LayoutError: where the kernel could not be launched.
    """
    if variant.pairs and own <= SMALL_SHARED:
        raise LayoutError(f"the kernel's own {own} bytes of shared memory leave no room for the pairs beside them")
    needed = own + (PAIRS_SHARED if variant.pairs else 0)
    if needed > most_shared(device):
        raise LayoutError(f"the kernel takes {needed} bytes of shared memory, and a program may have {most_shared(device)} here")


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
    if not isinstance(variant, Row) and variant.splits > 1:
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
    kind = {"int4": assembly.BIASED, "int8": assembly.BYTES, "fp8": assembly.BYTES}.get(packed.format, assembly.PAIRS).value
    step = variant.column_warps * variant.column_tiles
    constants = {
        **common(packed, bias is not None),
        **_assembly(packed, kind, bfloat16, False),
        "KIND": kind,
        "NORM": fused.norm_weight is not None,
        "RESIDUAL": fused.residual is not None,
        "GATED": fused.gated,
        "WK": variant.column_warps,
        "WM": variant.row_warps,
        "U": variant.column_tiles,
        "STEPS": -(-blocks // step),
        "EVEN": blocks >= step,
        "EARLY": fused.early,
        "MAGIC": assembly.magic(bfloat16),
        "ONES": assembly.one_bits(bfloat16),
        "FILL": assembly.FILL,
        "TIMES": assembly.TIMES,
    }
    numbers = [packed.shape[0], row_tiles, blocks, inverse(packed, x.dtype), fused.eps, 1]
    warps = variant.column_warps * variant.row_warps
    grid = (-(-row_tiles // variant.row_warps),)
    given = pointers(x, packed, bias, variant, fused, out)
    return Call(kernel.weight_only_product_row, given, numbers, constants, warps, grid, early=fused.early)


def _few_call(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, variant: Few, fused: Fused, out: torch.Tensor) -> Call:
    from optkit_plugins.kernels.packed import assembly
    from optkit_plugins.kernels.packed import few_triton as kernel

    row_tiles, blocks = packed.words.shape[:2]
    bfloat16 = x.dtype == torch.bfloat16
    table = assembly.PAIRS if variant.pairs else assembly.PERMUTE
    kind = {"int4": assembly.AFFINE, "int8": assembly.BYTES, "fp8": assembly.BYTES}.get(packed.format, table).value
    tokens = 8 if x.shape[0] <= 8 else 16
    step = variant.column_warps * variant.column_tiles
    share = blocks // variant.splits
    constants = {
        **common(packed, bias is not None and variant.splits == 1),
        **_assembly(packed, kind, bfloat16, kind == assembly.BYTES.value),
        "KIND": kind,
        "WK": variant.column_warps,
        "WM": variant.row_warps,
        "R": variant.row_tiles,
        "U": variant.column_tiles,
        "NT": tokens // 8,
        "EVEN": share % step == 0,
        "AHEAD": variant.ahead if share > step else 0,
        "MAGIC": assembly.magic_bits(bfloat16),
        "FILL": assembly.FILL,
    }
    numbers = [x.shape[0], packed.shape[0], row_tiles, blocks, share, inverse(packed, x.dtype), 1]
    grid = (-(-row_tiles // (variant.row_warps * variant.row_tiles)), -(-x.shape[0] // tokens), variant.splits)
    warps = variant.column_warps * variant.row_warps
    return Call(kernel.weight_only_product_few, pointers(x, packed, bias, variant, fused, out), numbers, constants, warps, grid)


def _wide_call(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, variant: Wide, fused: Fused, out: torch.Tensor) -> Call:
    from optkit_plugins.kernels.packed import assembly
    from optkit_plugins.kernels.packed import wide_triton as kernel

    row_tiles, blocks = packed.words.shape[:2]
    early = starts_early(x.device)
    constants = {
        **common(packed, bias is not None and variant.splits == 1),
        **wide_assembly(packed, x.dtype, variant.pairs),
        "RT": variant.row_tiles,
        "TOKENS": variant.tokens,
        "STEPS": 0,
        "STAGES": variant.stages,
        "BLOCKS": variant.blocks,
        "WARPS": variant.warps,
        "READY": variant.ordered,
        "EARLY": early and variant.ordered,
        "NEXT_EARLY": early and variant.splits > 1,
        "FILL": assembly.FILL,
        "SHARED_PAIRS": assembly.SHARED_PAIRS,
        "WAIT": assembly.WAIT if multiplies_in_background(x.device) else "",
    }
    numbers = [x.shape[0], packed.shape[0], row_tiles, blocks, blocks // variant.splits, inverse(packed, x.dtype)]
    grid = (-(-row_tiles // variant.row_tiles), -(-x.shape[0] // variant.tokens), variant.splits)
    given = pointers(x, packed, bias, variant, fused, out)
    return Call(kernel.weight_only_product_wide, given, numbers, constants, variant.warps, grid, variant.stages, early and variant.ordered)


def common(packed: Packed, bias: bool) -> dict[str, Any]:
    from optkit_plugins.kernels.packed import assembly

    scale = {torch.bfloat16: assembly.BF16, torch.float16: assembly.FP16, torch.float32: assembly.FP32}[packed.scales.dtype].value
    return {"SCALE": scale, "TILES_A_GROUP": packed.group // TILE_COLUMNS, "ZEROS": packed.zeros is not None, "BIAS": bias}


def _assembly(packed: Packed, kind: int, bfloat16: bool, adds: bool) -> dict[str, str]:
    """Both assemblies of a kernel for ``kind``. Floats of 8 bits lie as integers do, and only their words are expanded in another way."""
    from optkit_plugins.kernels.packed import assembly

    written = assembly.FLOATS.value if packed.format == "fp8" else kind
    expand, expand_registers = assembly.expand_assembly(written, bfloat16)
    multiply, multiply_registers = assembly.multiply_assembly(bfloat16, adds)
    return {
        "EXPAND": expand, "EXPAND_REGISTERS": expand_registers, "MULTIPLY": multiply, "MULTIPLY_REGISTERS": multiply_registers,
    }  # fmt: skip


def wide_assembly(packed: Packed, dtype: torch.dtype, pairs: bool = False) -> dict[str, Any]:
    """The constants of ``wide_triton`` that stand for a format."""
    from optkit_plugins.kernels.packed import assembly

    table = assembly.NAMED if pairs else assembly.PERMUTE
    kind = {"int4": assembly.AFFINE, "int8": assembly.BYTES, "fp8": assembly.FLOATS}.get(packed.format, table).value
    written = assembly.BIASED.value if kind == assembly.AFFINE.value else kind
    scaled = packed.format in TABLES and packed.scales.dtype == dtype
    expand, registers = assembly.expand_word_assembly(written, dtype == torch.bfloat16, scaled)
    return {"KIND": kind, "ASSEMBLY": True, "SCALED": scaled, "EXPAND": expand, "EXPAND_REGISTERS": registers}


def inverse(packed: Packed, dtype: torch.dtype) -> float:
    return 1 / lookup_table(packed.format, dtype).factor if packed.format in TABLES else 1.0


def one_row_a_thread(compiled: Any) -> bool:
    """Whether every assembly over four registers got its thread's own row, as the kernel's arithmetic assumes of Triton's layouts."""
    text = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", text, re.MULTILINE))
    used = re.findall(r"packed_element = 4 .*?: tensor<\d+x4x\w+, (#\w+)>", text)
    return bool(used) and all(layouts.get(name, "").startswith("sizePerThread = [1, 4], threadsPerWarp = [32, 1]") for name in used)
