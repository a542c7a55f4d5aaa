"""What the processes of ``parallel.mode=tensor`` tell each other: right, and how long it takes, three ways.

    python -m benchmarks.exchange --output benchmarks/results/exchange.json

Two GPUs, one process each. Sums and gathered parts of the kernel that writes to the other GPU are compared with NCCL's. Then a CUDA graph
of many exchanges is replayed: microseconds for one are the median of 20 replays over their number. Last, a graph of an odd number of them
runs 300 times on fresh data: a protocol that loses count would hang or be wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from optkit_plugins.kernels.parallel.exchange import Exchange

HIDDEN, LOGITS = 4096, 64128  # of Llama-3.1-8B: hidden states, and half of the vocabulary


def microseconds(call: Callable[[], Any], number: int) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(number):
            call()
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    values = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        values.append(1e3 * start.elapsed_time(end) / number)
    return round(statistics.median(values), 2)


def work(rank: int, meeting: str, output: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{meeting}", rank=rank, world_size=2, device_id=device)
    direct, nccl = Exchange(device), Exchange(device, direct=False)
    packages = ("torch", "triton")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": {name: version(name) for name in packages}}
    found |= {"form": direct.form, "problem": direct.problem}

    def note(name: str, value: Any) -> None:
        found[name] = value
        if rank == 0:
            print(name, value, flush=True)
            Path(output).write_text(json.dumps(found, indent=2) + "\n")

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (1, 8, 16):
            draw = torch.Generator(device).manual_seed(rank + rows)
            x = torch.randn(rows, HIDDEN, device=device, generator=draw).to(dtype)
            ours, theirs = direct.sum(x), nccl.sum(x)
            first = ours.clone()
            dist.broadcast(first, 0)
            checks = {
                "sum": torch.equal(ours, theirs),
                "gather": torch.equal(direct.gather(x), nccl.gather(x)),
                "ranks": torch.equal(ours, first),
            }
            note(f"equal {dtype} {rows} x {HIDDEN}", checks)
    ways = {"kernel": direct, "nccl": nccl}
    for rows in (1, 8, 32):
        x = torch.randn(rows, HIDDEN, device=device).bfloat16()
        note(f"us sum {rows} x {HIDDEN}", {name: microseconds(lambda way=way, x=x: way.sum(x), 64) for name, way in ways.items()})  # type: ignore[misc]
    x = torch.randn(1, LOGITS, device=device).bfloat16()
    note(f"us gather 1 x {LOGITS}", {name: microseconds(lambda way=way, x=x: way.gather(x), 8) for name, way in ways.items()})  # type: ignore[misc]
    note("us one shot of torch", one_shot(device))
    note("wrong of 300", wrong(direct, nccl, device))
    dist.destroy_process_group()


def one_shot(device: torch.device) -> float:
    """torch's own all-reduce over symmetric memory, with the copy into its buffer."""
    from torch.distributed import _symmetric_memory as symmetric

    group: Any = dist.group.WORLD
    buffer = symmetric.empty(1, HIDDEN, dtype=torch.bfloat16, device=device)
    symmetric.rendezvous(buffer, group)
    x = torch.randn(1, HIDDEN, device=device).bfloat16()
    return microseconds(lambda: torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x, "sum", group.group_name), 64)


def wrong(direct: Exchange, nccl: Exchange, device: torch.device) -> int:
    x = torch.randn(1, HIDDEN, device=device).bfloat16()
    graph = torch.cuda.CUDAGraph()
    direct.sum(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = direct.gather(direct.sum(direct.sum(x) * 0.5))
    count = 0
    for _ in range(300):
        x.copy_(torch.randn(1, HIDDEN, device=device))
        graph.replay()
        count += not torch.equal(found, nccl.gather(nccl.sum(nccl.sum(x) * 0.5)))
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(f"{folder}/meeting", str(arguments.output)), nprocs=2)


if __name__ == "__main__":
    main()
