"""Packed weights and a single activation: the kernel's arithmetic, and products with a norm, a gate or a residual in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optkit_plugins.kernels.fused.product import CALLS
from optkit_plugins.kernels.fused.projections import fuse_projections
from optkit_plugins.kernels.packed import formats
from optkit_plugins.kernels.packed.linear import FORMATS, WeightOnlyLinear, fused_weight_only_linear, pack
from optkit_plugins.kernels.packed.tables import lookup_table
from tests.plugins.test_weight_only import compiled

# torch's own compiler still imports modules that use it
pytestmark = pytest.mark.filterwarnings("ignore:.*torch\\.jit\\.:DeprecationWarning")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_eight_tiles_share_one_second_operand(format: str, dtype: torch.dtype) -> None:
    """16 rows by 8 tiles times one activation, with the assembly that the GPU runs: of tile u's product, column u is taken."""
    pytest.importorskip("triton")
    emulator = pytest.importorskip("tests.plugins.weight_only_emulator")
    from optkit_plugins.kernels.packed import assembly

    generator = torch.Generator().manual_seed(2)
    bfloat16, table = dtype == torch.bfloat16, format in formats.TABLES
    packed = pack(torch.randn(16, 512, generator=generator).to(torch.bfloat16), format)
    x = torch.randn(512, generator=generator).to(dtype)
    lane = np.arange(32)
    columns = x.view(torch.int32).numpy().view(np.uint32).reshape(8, 32)  # words by tile
    second = [columns[lane // 4, half * 16 + lane % 4 * 4 + i] for half in (0, 1) for i in range(4)]

    def multiply(first: list[np.ndarray]) -> np.ndarray:
        return sum(emulator.mma(first[4 * step : 4 * step + 4], second[2 * step : 2 * step + 2], bfloat16) for step in range(4))

    scales = formats._untile_groups(packed.scales, 16).double().numpy()
    sums = multiply([np.full(32, assembly.one_bits(bfloat16), np.uint32)] * 16)
    total, factor = np.zeros(16), 1.0
    for u in range(8):
        words = packed.words[0, u].numpy().view(np.uint32)
        if table:
            lookup = lookup_table(format, dtype)
            shared, factor = np.repeat(np.array(lookup.pairs, np.uint32), 32), lookup.factor
            lanes = [np.arange(32, dtype=np.uint32) * 4] * 4
            first = emulator.run(assembly.expand_assembly(assembly.PAIRS.value, bfloat16), [*words.T, *lanes], shared)
        elif format == "int4":
            first = emulator.run(assembly.expand_assembly(assembly.BIASED.value, bfloat16), list(words.T))
        else:
            written = assembly.FLOATS if format == "fp8" else assembly.BYTES
            halves = [emulator.run(assembly.expand_assembly(written.value, bfloat16), list(half.T)) for half in words]
            first = halves[0] + halves[1]
        part = multiply(first)[:, u]
        if packed.zeros is not None:
            zeros = formats._untile_groups(packed.zeros, 16)[:, u].double().numpy()
            part = part - sums[:, u] * (zeros + assembly.magic(bfloat16))
        total += part * scales[:, u if scales.shape[1] > 1 else 0]
    exact = formats.dequantize(packed, torch.float64).numpy() @ x.double().numpy()
    error = np.linalg.norm(total / factor - exact) / np.linalg.norm(exact)
    assert error < (1e-6 if not table else 2e-3 if bfloat16 else 3e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_kernels_with_everything_in_them_keep_their_layout(format: str) -> None:
    pytest.importorskip("triton")
    from optkit_plugins.kernels.packed import launch

    packed = pack(torch.randn(64, 4096, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16), format)
    whole = {"norm_weight": torch.ones(4096, dtype=torch.bfloat16), "eps": 1e-5, "residual": torch.ones(1, 32, dtype=torch.bfloat16)}
    assert launch.one_row_a_thread(compiled(packed, 1, **whole, gated=True))


def arguments(layer: WeightOnlyLinear) -> tuple[Any, ...]:
    return layer.words, layer.scales, layer.zeros, layer.bias, layer.format, layer.out_features, layer.group


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gated", [False, True])
def test_norm_gate_and_residual_are_those_of_float64(format: str, gated: bool) -> None:
    torch.manual_seed(4)
    layer = WeightOnlyLinear.from_linear(nn.Linear(128, 64), format)
    x, norm, residual = torch.randn(1, 1, 128), torch.rand(128) + 0.5, torch.randn(1, 1, 32 if gated else 64)
    got = fused_weight_only_linear(x, *arguments(layer), norm, 1e-5, residual, gated)
    wide = x.double()
    wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.double()
    assert layer.bias is not None
    expected = wide @ layer.dequantize(torch.float64).T + layer.bias.double()
    if gated:
        gate, up = expected.chunk(2, -1)
        expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(got.double(), expected + residual.double(), rtol=1e-4, atol=1e-5)


def test_fused_operation_is_sound_for_compilers() -> None:
    layer = WeightOnlyLinear.from_linear(nn.Linear(128, 64), "int4")
    inputs = (torch.randn(1, 128), *arguments(layer), torch.ones(128), 1e-5, torch.randn(1, 32), True)
    torch.library.opcheck(fused_weight_only_linear, inputs, test_utils=("test_schema", "test_faketensor"))


class Mlp(nn.Module):
    """A transformer's MLP with its norm and residual."""

    def __init__(self, format: str) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        self.norm = LlamaRMSNorm(128).to(torch.bfloat16)
        for name, (columns, rows) in {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}.items():
            linear = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
            setattr(self, name, WeightOnlyLinear.from_linear(linear, format))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


@pytest.mark.parametrize(("tokens", "found"), [(1, {"norms": 1, "gates": 1, "residuals": 1}), (2, {})])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_compiled_steps_of_one_row_are_fused(format: str, tokens: int, found: dict[str, int]) -> None:
    from optkit_plugins.kernels.fused.graph import StepPass
    from tests.plugins.test_fused_graph import without_codegen

    torch.manual_seed(5)
    model, passes = Mlp(format).eval(), StepPass()
    x = torch.randn(1, tokens, 128).to(torch.bfloat16)
    with torch.inference_mode():
        expected = model(x)
        fuse_projections(model)
        torch.compiler.reset()
        CALLS.clear()
        got = torch.compile(model, backend=without_codegen(passes), fullgraph=True)(x)
        torch.compiler.reset()
    assert {name: count for name, count in passes.found.items() if name != "products" and count} == found
    assert {name: count for name, count in CALLS.items() if name != "products" and count} == found
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
