"""The exchange kernel: several processes under Triton's interpreter, which really write to each other's memory and wait for each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from optkit_plugins.kernels.fused.graph import StepPass
from optkit_plugins.kernels.parallel import exchange as parallel_exchange
from optkit_plugins.kernels.parallel.exchange import CAPACITY, Inboxes

INTERPRETED = """
import json, os, sys, torch
from optkit_plugins.kernels.parallel.exchange import CAPACITY, Inboxes

world = int(sys.argv[1])
torch.set_num_threads(1)
memory = torch.zeros(world, 2, world, CAPACITY, dtype=torch.int64).share_memory_()
addresses = [memory[rank].data_ptr() for rank in range(world)]  # the same in every process: they are forked
#: (values, dtype, add): odd numbers of programs, so that halves of inboxes take turns unevenly
CASES = [(700, torch.bfloat16, True), (256, torch.float32, True), (1026, torch.float16, True), (514, torch.bfloat16, False),
         (2, torch.bfloat16, True), (700, torch.bfloat16, True), (3, torch.float32, False), (1400, torch.bfloat16, True)]

def inputs(rank, case):
    size, dtype, _ = CASES[case]
    return torch.randn(1, size, generator=torch.Generator().manual_seed(100 * rank + case)).to(dtype)

def residual(case):  # every second sum has one
    return inputs(world, case) if CASES[case][2] and case % 2 == 0 else None

shapes = [(1, size) if add else (world, 1, size) for size, _, add in CASES]
results = [[torch.zeros(shape, dtype=dtype).share_memory_() for shape, (_, dtype, _) in zip(shapes, CASES)] for _ in range(world)]
rank, children = 0, []
for other in range(1, world):
    child = os.fork()
    if child == 0:
        rank = other
        break
    children.append(child)
inboxes = Inboxes(memory[rank], addresses, rank)
for case, (_, _, add) in enumerate(CASES):
    inboxes.exchange(inputs(rank, case), results[rank][case], residual(case), add=add)
if rank:
    os._exit(0)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
errors = []
for case, (_, dtype, add) in enumerate(CASES):
    parts = torch.stack([inputs(rank, case) for rank in range(world)])
    expected = parts if not add else parts.double().sum(0) + (residual(case).double() if case % 2 == 0 else 0)
    for rank in range(world):
        assert torch.equal(results[rank][case], results[0][case]), "every process must round alike"
        difference = (results[rank][case].double() - expected.double()).abs().max() / expected.double().abs().max()
        errors.append((str(dtype), difference.item()))
print(json.dumps(errors))
"""


@pytest.mark.parametrize("world", [2, 3])
def test_sums_and_parts_of_all_processes(world: int) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED, str(world)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 8 * world
    for dtype, error in errors:
        assert error <= {"torch.bfloat16": 2**-7, "torch.float16": 2**-10, "torch.float32": 2**-22}[dtype], dtype


def test_what_goes_through_the_inboxes() -> None:
    inboxes = Inboxes(torch.zeros(2, 2, CAPACITY, dtype=torch.int64), [0, 0], 0)
    assert inboxes.takes(torch.zeros(1, 1, 4096, dtype=torch.bfloat16))
    assert inboxes.takes(torch.zeros(CAPACITY)) and not inboxes.takes(torch.zeros(CAPACITY + 1)), "larger ones are a matter of bandwidth"
    assert not inboxes.takes(torch.zeros(3, dtype=torch.bfloat16)), "half a word"
    assert not inboxes.takes(torch.zeros(4, dtype=torch.float64)) and not inboxes.takes(torch.zeros(0))
    assert not inboxes.takes(torch.zeros(5, dtype=torch.bfloat16)[1:]), "not aligned to a word"


class Doubled:
    """A group of two processes that hold the same."""

    def sum(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return x + x if residual is None else x + x + residual

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x])


@pytest.fixture
def doubled() -> Iterator[None]:
    parallel_exchange.join(Doubled())  # type: ignore[arg-type]
    yield
    parallel_exchange.join(None)


def test_operators_keep_the_shapes_that_the_compiler_expects(doubled: None) -> None:
    x, norm = torch.arange(6.0).view(1, 2, 3), torch.rand(3)
    torch.testing.assert_close(parallel_exchange.gather_parts(x, 2), torch.cat([x, x], dim=-1), atol=0, rtol=0)
    torch.library.opcheck(parallel_exchange.sum_parts, (x,))
    torch.library.opcheck(parallel_exchange.gather_parts, (x, 2))
    torch.library.opcheck(parallel_exchange.sum_parts_fused, (x, None, 0.0, x, False))
    torch.library.opcheck(parallel_exchange.sum_parts_fused, (x, norm, 1e-5))
    torch.library.opcheck(parallel_exchange.sum_parts_fused, (x[..., :2], None, 0.0, x[..., :1], True))


def test_a_compiled_step_adds_the_residual_in_the_exchange(doubled: None) -> None:
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def output(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + parallel_exchange.sum_parts(torch.nn.functional.linear(x, weight))

    x, hidden = torch.randn(1, 1, 4), torch.randn(1, 1, 8)
    traced = make_fx(output, tracing_mode="fake", _allow_non_fake_inputs=True)(x, hidden)
    step = StepPass()
    step(traced.graph)
    traced.recompile()
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert torch.ops.optkit.sum_parts_fused.default in called and torch.ops.aten.add.Tensor not in called
    assert step.found["residuals"] == 1
    torch.testing.assert_close(traced(x, hidden), output(x, hidden))
