"""Products of a single row: the kernel against float64, and the compiler pass that puts it into a compiled step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from optkit_plugins.kernels.fused import matvec as multiplying  # noqa: E402
from optkit_plugins.kernels.fused.graph import StepPass, with_products  # noqa: E402
from optkit_plugins.kernels.fused.matvec import MatvecPass, fused_matvec, matvec  # noqa: E402

INTERPRETED = """
import json, torch
from optkit_plugins.kernels.fused.matvec import launch

CASES = [  # rows, columns, what is there, outputs a program
    (24, 2048, "bias", 1), (7, 4096, "", 1), (5, 2048 + 72, "bias", 1), (9, 200, "", 1),
    (7, 4096, "norm", 1), (10, 2048 + 72, "norm bias residual", 2), (10, 200, "residual", 1),
    (12, 2048, "norm gated", 1), (16, 300, "norm bias residual gated", 2), (16, 256, "bias gated", 4),
]
errors = []
generator = torch.Generator().manual_seed(0)
for rows, columns, there, lines in CASES:
    draw = lambda *shape: torch.randn(*shape, generator=generator).half()
    x, whole, gated = draw(1, columns), draw(rows, columns + 8) / columns**0.5, "gated" in there
    weight = whole[:, :columns]  # rows further apart than they are long
    bias = draw(rows) if "bias" in there else None
    norm = draw(columns) if "norm" in there else None
    residual = draw(1, rows // 2 if gated else rows) if "residual" in there else None
    expected = x.double()
    if norm is not None:
        expected = expected / (expected.square().mean() + 0.1).sqrt() * norm.double()
    expected = expected @ weight.double().T + (bias.double() if bias is not None else 0)
    if gated:
        gate, up = expected[:, : rows // 2], expected[:, rows // 2 :]
        expected = gate * gate.sigmoid() * up
    if residual is not None:
        expected = expected + residual.double()
    out = launch(x, weight, bias, norm, 0.1, residual, gated, lines=lines)
    errors.append(((out.double() - expected).norm() / expected.norm()).item())
print(json.dumps(errors))
"""


def test_the_kernel_equals_float64():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 10
    assert max(errors) < 1e-3, errors  # float16 rounds the result by up to 2 ** -11


@pytest.mark.parametrize("capability", [75, 90, 120])
def test_the_kernel_compiles_for_each_generation_of_gpu(capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from optkit_plugins.kernels.fused import matvec_triton as kernel

    values = {"COLUMNS": 14336, "BLOCK": 2048, "LINES": 2, "EARLY": capability >= 90}
    values |= dict.fromkeys(("NORM", "BIAS", "RESIDUAL", "GATED"), True)
    names = kernel.product.arg_names
    signature = {name: "constexpr" if name in values else "*fp16" for name in names} | {"stride": "i32", "outputs": "i32", "eps": "fp32"}
    places = {(names.index(name),): value for name, value in values.items()}
    compiled = triton.compile(
        ASTSource(kernel.product, signature, places), target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}
    )
    assert compiled.asm["cubin"]


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(64, 128), torch.nn.Linear(128, 32, bias=False)
        self.odd = torch.nn.Linear(64, 33, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()).sum() + self.odd(x).sum()


@pytest.mark.filterwarnings("ignore:.*torch\\.jit\\.:DeprecationWarning")  # torch's own compiler still imports modules that use it
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_the_pass_takes_products_of_one_row_in_16_bits(monkeypatch):
    from torch._inductor.utils import fresh_cache

    monkeypatch.setattr(multiplying, "FEWEST_BYTES", 64 * 128 * 2 // 2)
    layers, chosen = Layers().bfloat16(), MatvecPass()
    arguments = {"backend": "inductor", "options": {"post_grad_custom_pre_pass": chosen}}
    compiled = torch.compile(layers, fullgraph=True, dynamic=False, **arguments)
    one, two = torch.randn(1, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    try:
        with fresh_cache(), torch.no_grad():  # a graph that an earlier run left on disk goes through no pass
            torch.testing.assert_close(compiled(one), layers(one), rtol=0.02, atol=0.02)
            assert chosen.replaced == 2  # with and without bias; the third is too small
            torch.testing.assert_close(compiled(two), layers(two), rtol=0.02, atol=0.02)
            assert chosen.replaced == 2
            any_rows = torch.compile(layers, fullgraph=True, dynamic=True, **arguments)
            torch.testing.assert_close(any_rows(two), layers(two), rtol=0.02, atol=0.02)
            assert chosen.replaced == 2
    finally:
        torch.compiler.reset()


def test_the_op_is_a_linear_layer():
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(1, 8)
    torch.testing.assert_close(matvec(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    torch.library.opcheck(torch.ops.optkit.matvec.default, (x, weight, bias))
    norm, residual = torch.rand(8), torch.randn(1, 3)
    normal = torch.nn.functional.rms_norm(x, (8,), norm, 1e-5)
    gate, up = torch.nn.functional.linear(normal, weight, bias).chunk(2, -1)
    everything = (x, weight, bias, norm, 1e-5, residual, True)
    torch.testing.assert_close(fused_matvec(*everything), torch.nn.functional.silu(gate) * up + residual)
    torch.library.opcheck(torch.ops.optkit.fused_matvec.default, everything)


def test_products_are_chosen_through_inductors_options():
    plain = {"backend": "inductor", "fullgraph": True, "mode": "reduce-overhead"}
    assert with_products(plain, "library") == plain
    assert with_products({"backend": "eager"}, "matvec") == {"backend": "eager"}
    tuned = with_products(plain, "inductor")
    assert tuned == {"backend": "inductor", "fullgraph": True, "options": {"triton.cudagraphs": True, "coordinate_descent_tuning": True}}
    for products, kind in (("matvec", MatvecPass), ("fused", StepPass)):
        ours = with_products(plain, products)["options"]["post_grad_custom_pre_pass"]
        assert isinstance(ours, kind)
        assert ours.uuid() == kind().uuid()  # so that compiled graphs are found again in the compiler's cache
