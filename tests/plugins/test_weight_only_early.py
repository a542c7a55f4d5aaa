"""Packed weights: what a product of one activation may read before the kernel in front is done, and programs that share columns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from optkit_plugins.kernels.packed.linear import FORMATS, pack
from optkit_plugins.kernels.packed.variants import Few, Row, choose
from tests.plugins.test_weight_only import compiled

WAIT = "griddepcontrol.wait"


def loads(lines: list[str], *roots: str) -> int:
    """How many of the loads in these lines of Triton's intermediate code go through pointers that stem from ``roots``."""
    stem, found = set(roots), 0
    for line in lines:
        names = re.findall(r"%[\w#]+", line)
        made, used = (names[:1], names[1:]) if re.match(r"\s*%[\w#]+ = ", line) else ([], names)
        if not stem & set(used):
            continue
        if "tt.load" in line:
            found += 1
        else:
            stem |= set(made)
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gated", [False, True])
def test_weights_alone_are_read_before_the_wait(format: str, gated: bool) -> None:
    pytest.importorskip("triton")
    packed = pack(torch.randn(64, 4096, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16), format)
    rows = 32 if gated else 64
    whole = {"norm_weight": torch.ones(4096, dtype=torch.bfloat16), "eps": 1e-5, "residual": torch.ones(1, rows, dtype=torch.bfloat16)}
    kernel = compiled(packed, 1, **whole, gated=gated, early=True)
    lines = kernel.asm["ttir"].splitlines()
    [wait] = [i for i, line in enumerate(lines) if WAIT in line]
    assert loads(lines[:wait], "%x") == loads(lines[:wait], "%residual") == 0
    assert loads(lines, "%x") >= 2 and loads(lines, "%residual") == 1
    row_tiles, blocks = packed.words.shape[:2]
    variant = choose(format, 1, row_tiles, blocks, gated)
    assert isinstance(variant, Row)
    assert loads(lines[:wait], "%words") == variant.column_tiles * (packed.words.dim() - 3)
    ptx = kernel.asm["ptx"]
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("ld.global") < ptx.index(WAIT) < ptx.index("st.global")
    assert WAIT not in compiled(packed, 1, **whole, gated=gated).asm["ptx"]


class Compiled:
    """Stands in for a compiled kernel, and keeps the arguments of its launches."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.grid: tuple[int, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grid = grid
        return lambda *arguments: self.calls.append(arguments)

    def warmup(self, kernel: Any, *arguments: Any, **options: Any) -> Compiled:
        self.options = options
        return self


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    pytest.importorskip("triton")
    from optkit_plugins.kernels.packed import few_triton, launch, row_triton

    made = Compiled()
    monkeypatch.setattr(launch, "one_row_a_thread", lambda compiled: True)
    monkeypatch.setattr(launch, "_launches", {})
    for kernel in (few_triton.weight_only_product_few, row_triton.weight_only_product_row):
        monkeypatch.setattr(kernel, "warmup", lambda *arguments, **options: made.warmup(None, *arguments, **options))
    return made


@pytest.mark.parametrize("early", [False, True])
def test_early_products_are_launched_as_such(early: bool, stub: Compiled) -> None:
    from optkit_plugins.kernels.packed import launch

    packed, x = pack(torch.randn(64, 256).to(torch.bfloat16), "nf4"), torch.zeros(1, 256, dtype=torch.bfloat16)
    launch.product(x, packed, fused=launch.Fused(early=early))
    assert stub.options.get("launch_pdl", False) is early
    assert stub.options["EARLY"] is early


def test_products_of_uncompiled_layers_never_start_early(stub: Compiled) -> None:
    """Their weight may have been written by the kernel in front."""
    from optkit_plugins.kernels.packed import launch

    launch.product(torch.zeros(1, 256, dtype=torch.bfloat16), pack(torch.randn(64, 256).to(torch.bfloat16), "int4"))
    assert "launch_pdl" not in stub.options and stub.options["EARLY"] is False


def test_programs_that_share_columns_get_their_part(stub: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    from optkit_plugins.kernels.packed import few_triton, launch

    added = []

    def add_up(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        added.append((parts.shape, bias))
        return parts[0].to(dtype)

    monkeypatch.setattr(launch, "add_up", add_up)
    packed, bias = pack(torch.randn(64, 1024).to(torch.bfloat16), "nf4"), torch.zeros(64, dtype=torch.bfloat16)
    variant = Few(True, column_warps=2, row_warps=2, column_tiles=2, splits=4)
    assert launch.product(torch.zeros(12, 1024, dtype=torch.bfloat16), packed, bias, variant).shape == (12, 64)
    assert added == [((4, 12, 64), bias)]
    named = dict(zip(few_triton.weight_only_product_few.arg_names, stub.calls[0], strict=True))
    assert (stub.grid, named["share"], named["blocks"], named["BIAS"]) == ((2, 1, 4), 4, 16, False)
