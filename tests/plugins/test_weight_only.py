"""Packed weights: their values, their layout, both kernels' arithmetic, and the layer."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optkit.modules import plain_tensors
from optkit_plugins.kernels.packed import formats
from optkit_plugins.kernels.packed.convert import from_grid, give_back, use_fused_kernels
from optkit_plugins.kernels.packed.linear import FORMATS, WeightOnlyLinear, fuse, pack, weight_only_linear, why_not
from optkit_plugins.kernels.packed.tables import lookup_table
from optkit_plugins.kernels.packed.variants import Wide, choose


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(40, 192, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


# Values -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_layers_keep_their_values(weight: torch.Tensor, format: str, double_quant: bool) -> None:
    pytest.importorskip("bitsandbytes")
    from optkit_plugins._bitsandbytes import load_bitsandbytes

    bnb = load_bitsandbytes()
    layer = bnb.nn.Linear4bit(192, 40, bias=False, quant_type=format)
    layer.weight = bnb.nn.Params4bit(weight.float(), quant_type=format, blocksize=64, compress_statistics=double_quant, module=layer).to(
        "cpu"
    )
    state = layer.weight.quant_state
    expected = bnb.functional.dequantize_4bit(layer.weight.data, state)
    assert torch.equal(WeightOnlyLinear.from_bitsandbytes(layer).dequantize(), expected)


def test_nf4_takes_the_nearest_of_its_values_times_absmax(weight: torch.Tensor) -> None:
    blocks = weight.double().reshape(-1, 64)
    values = torch.tensor(formats.TABLES["nf4"], dtype=torch.float64)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = values[((blocks / absmax)[..., None] - values).abs().argmin(-1)] * absmax
    torch.testing.assert_close(formats.dequantize(pack(weight, "nf4"), torch.float64), nearest.reshape(40, 192), rtol=1e-6, atol=0)


def test_int4_stays_within_half_a_step(weight: torch.Tensor) -> None:
    packed = pack(weight, "int4")
    groups = weight.double().reshape(40, -1, 64)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (formats.dequantize(packed, torch.float64) - weight.double()).abs().reshape(40, -1, 64)
    assert (error <= step[..., None] * 1.02).all()  # half for the value, half for the zero
    assert error.mean() < step.mean() / 3


def test_int4_codes_mean_what_gptq_means() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (32, 128), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 16, (32, 2), dtype=torch.uint8, generator=generator)
    scales = torch.rand(32, 2, generator=generator).half()
    expected = (codes.double() - zeros.double().repeat_interleave(64, 1)) * scales.double().repeat_interleave(64, 1)
    assert torch.equal(formats.dequantize(formats.pack_int4_codes(codes, scales, zeros, 64), torch.float64), expected)
    symmetric = formats.dequantize(formats.pack_int4_codes(codes, scales, None, 64), torch.float64)
    assert torch.equal(symmetric, (codes.double() - 8) * scales.double().repeat_interleave(64, 1))


def test_int8_stays_within_half_a_step(weight: torch.Tensor) -> None:
    step = weight.double().abs().amax(1, keepdim=True) / 127
    assert ((formats.dequantize(pack(weight, "int8"), torch.float64) - weight.double()).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_scales_take_16_bits_only_where_nothing_is_lost(weight: torch.Tensor, format: str) -> None:
    assert pack(weight, format).scales.dtype == torch.bfloat16
    assert pack(weight.float() * 1.1, format).scales.dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused_with_the_reason(weight: torch.Tensor) -> None:
    assert why_not((40, 192), 64) is None
    assert "multiple of 64" in str(why_not((40, 100), 64))
    with pytest.raises(ValueError, match="divides the input width 192"):
        pack(weight, "nf4", 128)
    with pytest.raises(ValueError, match="known are nf4"):
        pack(weight, "int3")


# The fused kernel's arithmetic --------------------------------------------------------------------------------------------------------

KINDS = ["nf4", "nf4-pairs", "fp4", "fp4-pairs", "int4", "int8", "fp8"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_assembly_and_layout_give_the_product(kind: str, dtype: torch.dtype) -> None:
    """One tile by eight activations, from the packed words to the sums, with the assembly that the GPU runs."""
    pytest.importorskip("triton")
    emulator = pytest.importorskip("tests.plugins.weight_only_emulator")
    from optkit_plugins.kernels.packed import assembly as kernel

    generator = torch.Generator().manual_seed(2)
    format, bfloat16 = kind.split("-")[0], dtype == torch.bfloat16
    packed = pack(torch.randn(16, 64, generator=generator).to(torch.bfloat16), format)
    x = torch.randn(8, 64, generator=generator).to(dtype)
    words = packed.words[0, 0].numpy().view(np.uint32)
    table = lookup_table(format, dtype) if format in formats.TABLES else None
    if kind.endswith("pairs"):
        assert table is not None
        shared = np.repeat(np.array(table.pairs, np.uint32), 32)
        lanes = np.arange(32, dtype=np.uint32) * 4
        first = emulator.run(kernel.expand_assembly(kernel.PAIRS.value, bfloat16), [*words.T, *[lanes] * 4], shared)
    elif table is not None:
        entries = [np.full(32, word, np.uint32) for word in table.words for _ in range(4)]
        first = emulator.run(kernel.expand_assembly(kernel.PERMUTE.value, bfloat16), [*words.T, *entries])
    elif format == "int4":
        assert packed.zeros is not None
        zeros = packed.zeros[0, 0].numpy().astype(np.uint32)[np.arange(32) // 4]
        pairs = [(zeros[:, row] * 0x10001 | kernel.magic_bits(bfloat16)).astype(np.uint32) for row in (0, 1) for _ in range(4)]
        first = emulator.run(kernel.expand_assembly(kernel.AFFINE.value, bfloat16), [*words.T, *pairs])
    else:
        written = kernel.FLOATS if format == "fp8" else kernel.BYTES
        halves = [emulator.run(kernel.expand_assembly(written.value, bfloat16), list(half.T)) for half in words]
        first = halves[0] + halves[1]
    lane = np.arange(32)
    activations = x.view(torch.int32).numpy().view(np.uint32)[lane // 4]  # (threads, 32 words)
    second = [activations[lane, half * 16 + lane % 4 * 4 + i] for half in (0, 1) for i in range(4)]
    total = sum(emulator.mma(first[4 * step : 4 * step + 4], second[2 * step : 2 * step + 2], bfloat16) for step in range(4))
    scales = formats._untile_groups(packed.scales, 16).double().numpy()
    result = total * scales / (table.factor if table else 1)
    exact = formats.dequantize(packed, torch.float64).numpy() @ x.double().numpy().T
    error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
    assert error < (1e-6 if table is None else 2e-3 if bfloat16 else 3e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairs", [False, True])
def test_assembly_multiplies_with_the_rows_scales(pairs: bool, dtype: torch.dtype) -> None:
    """Every word of one tile as the wide kernel expands it; scales are powers of two, so that nothing is rounded."""
    pytest.importorskip("triton")
    emulator = pytest.importorskip("tests.plugins.weight_only_emulator")
    from optkit_plugins.kernels.packed import assembly

    generator, bfloat16 = torch.Generator().manual_seed(5), dtype == torch.bfloat16
    codes = torch.randint(0, 16, (16, 64), generator=generator, dtype=torch.uint8)
    scales = 2.0 ** torch.randint(-3, 4, (16, 1), generator=generator)
    packed, table = formats.pack_table_codes(codes, scales, "nf4", 64), lookup_table("nf4", dtype)
    # the emulator has no names for what lies in shared memory: the pairs begin at 0
    kind = assembly.PAIRS if pairs else assembly.PERMUTE
    lane = np.arange(32)
    lookup = [lane.astype(np.uint32) * 4] if pairs else [np.full(32, word, np.uint32) for word in table.words]
    both = packed.scales.to(dtype)[0, 0].contiguous().view(torch.int32).flatten().numpy().view(np.uint32)[lane // 4]
    shared = np.repeat(np.array(table.pairs, np.uint32), 32)
    weight = formats.dequantize(packed, torch.float64).numpy() * table.factor
    for number, word in enumerate(packed.words[0, 0].numpy().view(np.uint32).T):
        registers = emulator.run(assembly.expand_word_assembly(kind.value, bfloat16, True), [word, *lookup, both], shared)
        column = number // 2 * 32 + lane % 4 * 8 + number % 2 * 4
        for i, register in enumerate(registers):  # rows g and g + 8, then the next two columns of both
            for c, value in enumerate(emulator.halves(register, bfloat16)):
                np.testing.assert_allclose(value, weight[lane // 4 + i % 2 * 8, column + i // 2 * 2 + c], rtol=2.0**-9)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_tables_are_rounded_finely_enough(format: str) -> None:
    for dtype, bound in ((torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-11)):
        table = lookup_table(format, dtype)
        bits = torch.tensor([pair & 0xFFFF for pair in table.pairs[:16]]).to(torch.uint16).view(dtype).double() / table.factor
        exact = torch.tensor(formats.TABLES[format], dtype=torch.float64)[list(formats.labels(format))]
        torch.testing.assert_close(bits, exact, rtol=bound, atol=0)


def compiled(packed: formats.Packed, batch: int, **fused: Any) -> Any:
    """The kernel for an H100, compiled without one, in the variant that would run."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from optkit_plugins.kernels.packed import launch

    x = torch.zeros(batch, packed.shape[1], dtype=torch.bfloat16)
    variant = choose(packed.format, batch, *packed.words.shape[:2], gated=fused.get("gated", False))
    extra = launch.Fused(**fused)
    call = launch.arguments(x, packed, None, variant, extra, launch._output(x, packed, variant, extra))
    types = {torch.int32: "*i32", torch.int16: "*i16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    values = [*call.tensors, *call.numbers]
    signature = {
        name: types[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
        for name, value in zip(call.kernel.arg_names, values, strict=False)
    }
    signature |= dict.fromkeys(call.constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(call.tensors))}
    source = ASTSource(call.kernel, signature, constexprs=call.constants, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": call.warps, "num_stages": call.stages})


@pytest.mark.parametrize(
    ("format", "batch"), [("nf4", 1), ("int4", 1), ("int8", 1), ("fp8", 1), ("nf4", 12), ("int4", 5), ("int8", 8), ("fp8", 8)]
)
def test_triton_lays_registers_out_as_the_assembly_needs(format: str, batch: int) -> None:
    pytest.importorskip("triton")
    from optkit_plugins.kernels.packed import launch

    packed = pack(torch.randn(64, 4096, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16), format)
    assert launch.one_row_a_thread(compiled(packed, batch))


@pytest.mark.parametrize("batch", [1, 12, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_take_scales_of_every_width(dtype: torch.dtype, batch: int) -> None:
    """Scales stay float32 where 16 bits would round them, as those of nested quantization do."""
    pytest.importorskip("triton")
    packed = pack(torch.randn(64, 1024, generator=torch.Generator().manual_seed(3)).to(dtype), "nf4")
    assert packed.scales.dtype == dtype
    assert compiled(packed, batch).asm["cubin"]


@pytest.mark.parametrize(("format", "batch"), [("nf4", 64), ("int4", 20), ("int8", 200), ("fp8", 64)])
def test_many_activations_are_multiplied_by_whole_warp_groups(format: str, batch: int) -> None:
    pytest.importorskip("triton")
    packed = pack(torch.randn(64, 4096, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16), format)
    kernel = compiled(packed, batch)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    loop = kernel.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert "ttg.local_alloc" not in loop  # expanded weights stay in the registers of the thread that expanded them


@pytest.mark.parametrize("batch", [32, 64, 128, 256])
@pytest.mark.parametrize("format", ["nf4", "int4", "int8", "fp8"])
def test_products_of_many_activations_are_not_waited_for_one_by_one(format: str, batch: int, tmp_path: Path) -> None:
    """But all are before the next weights: nothing else keeps those from registers that the tensor cores still read.

    ptxas says so where it makes products wait for each other, which cost int8 a tenth of its speed.
    """
    triton = pytest.importorskip("triton")
    from optkit_plugins.kernels.packed import launch

    packed = pack(torch.randn(64, 4096, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16), format)
    file = tmp_path / "kernel.ptx"
    kernel = compiled(packed, batch)
    text = kernel.asm["ptx"]
    last = text.rindex("wgmma.mma_async")
    assert "wgmma.wait_group.sync.aligned 0;" in text[last : text.index("bra", last)]
    file.write_text(text)
    command = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", str(file), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "registers" in done.stderr and "serialized" not in done.stderr
    variant = choose(format, batch, *packed.words.shape[:2])
    assert isinstance(variant, Wide)
    launch.check_shared(kernel.metadata.shared, variant, torch.device("cpu"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [17, 64, 100, 256])
def test_programs_share_the_columns_in_whole_steps(format: str, batch: int) -> None:
    for row_tiles in (1, 256, 384, 1792, 8016):
        for blocks in (1, 2, 17, 36, 64, 224):
            variant = choose(format, batch, row_tiles, blocks)
            assert isinstance(variant, Wide)
            assert blocks % (variant.splits * variant.blocks) == 0, (row_tiles, blocks, variant)


def test_pairs_are_left_out_where_shared_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from optkit_plugins.kernels.packed import launch

    wide = Wide(8, 256, 3, 8, pairs=True)
    cpu = torch.device("cpu")
    assert launch.fitting(wide, cpu) == wide
    monkeypatch.setattr(launch, "most_shared", lambda device: 99 << 10)
    assert launch.fitting(wide, cpu) == Wide(8, 256, 3, 8, pairs=False)
    with pytest.raises(launch.LayoutError, match="a program may have 101376 here"):
        launch.check_shared(70 << 10, wide, cpu)
    with pytest.raises(launch.LayoutError, match="no room for the pairs"):
        launch.check_shared(40 << 10, wide, cpu)


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_launches_give_every_argument_its_place(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch is prepared once, and called with the tensors of the moment: as many arguments as the kernel has."""
    pytest.importorskip("triton")
    from optkit_plugins.kernels.packed import launch

    packed = pack(torch.randn(64, 256).to(torch.bfloat16), "int4")
    x, calls = torch.zeros(batch, 256, dtype=torch.bfloat16), []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments: calls.append((grid, arguments))

    monkeypatch.setattr(launch, "one_row_a_thread", lambda compiled: True)
    monkeypatch.setattr(launch, "_launches", {})
    monkeypatch.setattr(launch, "add_up", lambda parts, bias, dtype: parts[0].to(dtype))
    monkeypatch.setattr(launch, "order", lambda x: x)
    variant = choose("int4", batch, *packed.words.shape[:2])
    call = launch.arguments(x, packed, None, variant, launch.NOTHING, launch._output(x, packed, variant, launch.NOTHING))
    monkeypatch.setattr(type(call.kernel), "warmup", lambda self, *arguments, **options: Compiled())
    for _ in range(2):
        assert launch.product(x, packed).shape == (batch, 64)
    for grid, arguments in calls:
        assert len(grid) == 3
        named = dict(zip(call.kernel.arg_names, arguments, strict=True))
        assert named["words"] is packed.words and named["rows"] == 64 and named["KIND"] == call.constants["KIND"]
        assert {name: named[name] for name in call.constants} == call.constants
    assert len(calls) == 2


# The plain kernels, under Triton's interpreter ----------------------------------------------------------------------------------------

INTERPRETED = """
import json, torch
from optkit_plugins.kernels.packed import formats
from optkit_plugins.kernels.packed import launch
from optkit_plugins.kernels.packed import whole
from optkit_plugins.kernels.packed import lookup
from optkit_plugins.kernels.packed import wide_triton as wide

errors = {}
generator = torch.Generator().manual_seed(4)
weight, x, bias = torch.randn(24, 128, generator=generator), torch.randn(2, 128, generator=generator), torch.randn(24, generator=generator)
for format in formats.FORMATS:
    packed = formats.pack(weight, format)
    exact = formats.dequantize(packed, torch.float64)
    expected = x.double() @ exact.T + bias.double()
    errors[format + " expand"] = (whole.plain_expand(packed, torch.float32).double() - exact).norm().item() / exact.norm().item()
    errors[format + " product"] = (whole.plain_product(x, packed, bias).double() - expected).norm().item() / expected.norm().item()
parts = torch.randn(3, 2, 700, generator=generator)  # more than one program, and a rest
for name, more in (("sum", None), ("sum and bias", torch.randn(700, generator=generator))):
    expected = parts.double().sum(0) + (0 if more is None else more.double())
    errors[name] = (launch.add_up(parts, more, torch.float32).double() - expected).norm().item() / expected.norm().item()
def interpreted(call, packed):
    # the wide kernels' arguments without assembly
    tensors, numbers = list(call.tensors), list(call.numbers)
    if packed.format in formats.TABLES:
        tensors[4], numbers[-1] = lookup.values(packed.format, x.device), 1.0
    return tensors, numbers, call.constants | {"ASSEMBLY": False, "SCALED": False, "STEPS": numbers[4]}

x = torch.randn(5, 256, generator=generator).half()
for format, group in (("nf4", 64), ("fp4", 128), ("int4", 128), ("int8", 256), ("fp8", 256)):
    packed = formats.pack(torch.randn(40, 256, generator=generator).half(), format, group)
    exact = formats.dequantize(packed, torch.float64)
    for splits, ordered, blocks in ((1, False, 1), (2, True, 1), (2, False, 2), (1, True, 4)):
        variant = launch.Wide(row_tiles=2, tokens=16, stages=2, warps=4, splits=splits, ordered=ordered, blocks=blocks)
        bias = torch.randn(40, generator=generator).half()
        out = launch._output(x, packed, variant, launch.NOTHING)
        given = launch.order(x) if ordered else x
        assert not ordered or (given != x).any() and given.sort(1).values.equal(x.sort(1).values)
        call = launch.arguments(given, packed, bias, variant, launch.NOTHING, out)
        tensors, numbers, constants = interpreted(call, packed)
        call.kernel[call.grid](*tensors, *numbers, **constants)
        got = out if splits == 1 else launch.add_up(out, bias, x.dtype)
        expected = x.double() @ exact.T + bias.double()
        errors[f"half {format} wide {splits} {ordered} {blocks}"] = (got.double() - expected).norm().item() / expected.norm().item()
    weight = torch.empty(40, 256, dtype=torch.half)
    words, scales, zeros, table = tensors[1:5]
    rest = {name: constants[name] for name in ("KIND", "SCALE", "TILES_A_GROUP", "ZEROS", "ASSEMBLY", "SCALED", "EXPAND", "EXPAND_REGISTERS", "RT")}
    wide.weight_only_expand[(2, 4)](words, scales, zeros, table, weight, 40, *packed.words.shape[:2], 1.0, **rest)
    errors[f"half {format} wide expand"] = (weight.double() - exact).norm().item() / exact.norm().item()
print(json.dumps(errors))
"""


def test_kernels_without_assembly_equal_float64() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    halves = {name: error for name, error in errors.items() if name.startswith("half")}
    assert (len(errors), len(halves)) == (7 * len(FORMATS) + 2, 5 * len(FORMATS))
    assert max(error for name, error in errors.items() if name not in halves) < 1e-6, errors
    assert max(halves.values()) < 6e-4, errors


# The layer ----------------------------------------------------------------------------------------------------------------------------


def layer_of(format: str, rows: int = 48, bias: bool = True, seed: int = 5) -> WeightOnlyLinear:
    torch.manual_seed(seed)
    return WeightOnlyLinear.from_linear(nn.Linear(128, rows, bias=bias), format)


@pytest.mark.parametrize("format", FORMATS)
def test_layer_multiplies_with_the_weight_that_it_tells(format: str) -> None:
    layer = layer_of(format)
    x = torch.randn(2, 3, 128)
    assert layer.bias is not None
    expected = x.double() @ layer.dequantize(torch.float64).T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert layer(x[:0]).shape == (0, 3, 48)


@pytest.mark.parametrize("format", FORMATS)
def test_layer_is_saved_and_copied(format: str) -> None:
    layer, other = layer_of(format), layer_of(format, seed=6)
    x = torch.randn(2, 128)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_casting_a_model_leaves_scales_alone() -> None:
    layer = layer_of("nf4")
    before = layer.dequantize()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dequantize(), before)
    assert layer(torch.randn(1, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("format", FORMATS)
def test_fused_layers_give_their_outputs_side_by_side(format: str) -> None:
    parts = [layer_of(format, rows, seed=rows) for rows in (48, 16, 32)]
    x = torch.randn(4, 128)
    torch.testing.assert_close(fuse(parts)(x), torch.cat([part(x) for part in parts], dim=-1))


def test_layers_that_cannot_be_fused_are_named() -> None:
    with pytest.raises(ValueError, match="format=int8"):
        fuse([layer_of("nf4"), layer_of("int8")])
    with pytest.raises(ValueError, match="of 40 rows"):
        fuse([layer_of("nf4"), layer_of("nf4", rows=40)])
    with pytest.raises(ValueError, match="only some have a bias"):
        fuse([layer_of("nf4"), layer_of("nf4", bias=False)])


def test_operation_is_sound_for_compilers() -> None:
    layer = layer_of("int4")
    arguments = (torch.randn(3, 128), layer.words, layer.scales, layer.zeros, layer.bias, "int4", 48, 64)
    torch.library.opcheck(weight_only_linear, arguments, test_utils=("test_schema", "test_faketensor"))
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 128)
    assert torch.equal(whole(x), layer(x))


def bitsandbytes_layers(sizes: list[tuple[int, int]]) -> nn.Sequential:
    bnb = pytest.importorskip("optkit_plugins._bitsandbytes").load_bitsandbytes()
    layers = []
    for columns, rows in sizes:
        linear = nn.Linear(columns, rows)
        packed = bnb.nn.Linear4bit(columns, rows, quant_type="nf4", compute_dtype=torch.float32)
        packed.weight = bnb.nn.Params4bit(linear.weight.data, quant_type="nf4", blocksize=64, compress_statistics=False, module=packed).to(
            "cpu"
        )
        packed.bias, packed.support_avx512bf16_for_cpu = nn.Parameter(linear.bias.data, requires_grad=False), False
        layers.append(packed)
    return nn.Sequential(*layers).eval()


def torchao_layers(sizes: list[tuple[int, int]]) -> nn.Sequential:
    pytest.importorskip("torchao")
    from optkit_plugins.int8 import Int8Options, load_torchao, torchao_config

    load_torchao()
    from torchao.quantization import quantize_

    model = nn.Sequential(*(nn.Linear(*size) for size in sizes)).eval()
    quantize_(model, torchao_config(Int8Options.model_validate({}), "cpu"))
    return model


@pytest.mark.parametrize("make", [bitsandbytes_layers, torchao_layers])
def test_layers_of_libraries_move_over_with_their_values_and_back(make: Any) -> None:
    torch.manual_seed(7)
    model = make([(128, 64), (64, 40), (40, 8)])
    x = torch.randn(3, 128)
    with torch.no_grad():
        expected, before = model(x), {name: value.clone() for name, value in model.state_dict().items()}
        left = use_fused_kernels(model)
        assert [type(layer) is WeightOnlyLinear for layer in model] == [True, True, False]
        assert list(left) == ["2"] and "input width 40" in left["2"]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        give_back(model)
        assert not any(isinstance(layer, WeightOnlyLinear) for layer in model)
        assert torch.equal(model(x), expected)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        for mine, other in zip(plain_tensors(after[name]), plain_tensors(value), strict=True):
            assert torch.equal(mine, other), name


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 64, True), (4, 128, False), (8, 128, True)])
def test_layers_on_a_grid_are_packed_without_loss_and_given_back(bits: int, group: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    integers = torch.randint(0, 2**bits, (32, 128), generator=generator)
    middle = 2 ** (bits - 1)
    zero = torch.full((32, 128 // group), middle) if symmetric else torch.randint(1, 16, (32, 128 // group), generator=generator)
    scale = (torch.rand(32, 128 // group, generator=generator) * 0.02 + 0.01).half()
    exact = (integers - zero.repeat_interleave(group, 1)).double() * scale.double().repeat_interleave(group, 1)
    model = nn.Sequential(nn.Linear(128, 32))
    model[0].weight = nn.Parameter(exact.to(torch.bfloat16), requires_grad=False)
    packed = from_grid(model[0], bits, scale, zero)
    assert isinstance(packed, WeightOnlyLinear)
    assert torch.equal(packed.dequantize(torch.float64), exact.float().double())
    assert packed.format == {4: "int4", 8: "int8"}[bits]
    weight, model[0] = model[0].weight, packed
    give_back(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, weight)


def test_layers_off_their_grid_stay_with_the_reason() -> None:
    linear = nn.Linear(128, 32)
    scale, zero = torch.full((32, 2), 0.05), torch.full((32, 2), 8)
    assert "no longer lie on their grid" in str(from_grid(linear, 4, scale, zero))
    assert "3 bits in groups of 64" in str(from_grid(linear, 3, scale, zero))
    assert "multiple of 64" in str(from_grid(linear, 4, scale.repeat(1, 2), zero.repeat(1, 2)))
    assert "no longer the one" in str(from_grid(linear, 4, scale[:16], zero[:16]))
