"""Products of a single row: the kernel against float64, and the compiler pass that puts it into a compiled step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from optkit_plugins.kernels import matvec as multiplying  # noqa: E402
from optkit_plugins.kernels.matvec import MatvecPass, matvec, with_products  # noqa: E402

INTERPRETED = """
import json, torch
from optkit_plugins.kernels.matvec import launch

errors = []
generator = torch.Generator().manual_seed(0)
for rows, columns, biased in ((24, 2048, True), (7, 4096, False), (5, 2048 + 72, True), (9, 200, False)):
    x, whole = torch.randn(1, columns, generator=generator).half(), torch.randn(rows, columns + 8, generator=generator).half()
    weight = whole[:, :columns]  # rows further apart than they are long
    bias = torch.randn(rows, generator=generator).half() if biased else None
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0)
    errors.append(((launch(x, weight, bias).double() - expected).norm() / expected.norm()).item())
print(json.dumps(errors))
"""


def test_the_kernel_equals_float64():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 4
    assert max(errors) < 1e-3, errors  # float16 rounds the result by up to 2 ** -11


@pytest.mark.parametrize("capability", [75, 90, 120])
def test_the_kernel_compiles_for_each_generation_of_gpu(capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from optkit_plugins.kernels import matvec_triton as kernel

    values = {"COLUMNS": 14336, "BLOCK": 2048, "BIAS": True}
    signature = {name: "constexpr" if name in values else "*fp16" for name in kernel.matvec.arg_names} | {"stride": "i32"}
    places = {(kernel.matvec.arg_names.index(name),): value for name, value in values.items()}
    compiled = triton.compile(
        ASTSource(kernel.matvec, signature, places), target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}
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
    arguments = with_products({"backend": "inductor", "mode": None}, "matvec")
    arguments["options"]["post_grad_custom_pre_pass"] = chosen
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


def test_products_are_chosen_through_inductors_options():
    plain = {"backend": "inductor", "fullgraph": True, "mode": "reduce-overhead"}
    assert with_products(plain, "library") == plain
    assert with_products({"backend": "eager"}, "matvec") == {"backend": "eager"}
    tuned = with_products(plain, "inductor")
    assert tuned == {"backend": "inductor", "fullgraph": True, "options": {"triton.cudagraphs": True, "coordinate_descent_tuning": True}}
    ours = with_products(plain, "matvec")["options"]["post_grad_custom_pre_pass"]
    assert isinstance(ours, MatvecPass)
    assert ours.uuid() == MatvecPass().uuid()  # so that compiled graphs are found again in the compiler's cache
