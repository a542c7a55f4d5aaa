"""Products with packed weights beside bf16 cuBLAS and bitsandbytes, on the layers of Llama-3.1-8B.

    PYTHONPATH=plugins python benchmarks/weight_kernels.py --output benchmarks/results/weight_kernels_h200.json [--sweep]

Prints a line a case: microseconds in a CUDA graph (launch included), share of the time that reading the stored bytes takes at the
measured bandwidth, and the gain over bf16. Every case walks through at least 300 MB of weights, so that no cache helps, and the variants
are compared with float64 before anything is timed. ``--sweep`` times other variants than the chosen ones too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from optkit_plugins.kernels.device import starts_early
from optkit_plugins.kernels.fused.projections import fuse_projections
from optkit_plugins.kernels.packed import formats
from optkit_plugins.kernels.packed.launch import Fused, product
from optkit_plugins.kernels.packed.linear import WeightOnlyLinear
from optkit_plugins.kernels.packed.variants import MANY, Few, Row, Wide, choose
from optkit_plugins.kernels.packed.whole import expand, plain_expand

SHAPES = {"gate_up": (28672, 4096), "down": (4096, 14336), "qkv": (6144, 4096), "o": (4096, 4096), "head": (128256, 4096)}
BATCHES = (1, 4, 8, 16, 32, 48, 64, 128, 256)
MANY_BATCHES = (257, 512, 2048)
FORMATS = (("nf4", 64), ("int4", 64), ("int4", 128), ("int8", 0), ("fp8", 0))
ROTATED_BYTES = 300_000_000


def random_packed(format: str, shape: tuple[int, int], group: int, scale_dtype: torch.dtype = torch.bfloat16, zeros: bool = False) -> Any:
    """A weight of random codes: timing needs no quantized one."""
    tiles, blocks = -(-shape[0] // 16), shape[1] // 64
    words = torch.randint(
        -(2**31), 2**31 - 1, (tiles, blocks, *((2,) if format in formats.EIGHT_BITS else ()), 32, 4), dtype=torch.int32, device="cuda"
    )
    if format == "fp8":
        words &= ~0x01010101  # a float of all ones is none
    group = group or shape[1]
    scales = torch.rand(tiles, shape[1] // group, 8, 2, device="cuda") * 0.03 + 0.01
    codes = torch.randint(0, 16, scales.shape, dtype=torch.uint8, device="cuda") if zeros else None
    return formats.Packed(format, shape, group, words, scales.to(torch.float32 if format in formats.EIGHT_BITS else scale_dtype), codes)


def candidates(format: str, batch: int, row_tiles: int, blocks: int) -> list[Row | Few | Wide]:
    """Variants worth a try."""
    if batch == 1:
        cuts = [(8, 1, 8), (4, 1, 8), (2, 2, 8), (1, 4, 8), (8, 1, 4), (4, 1, 4), (2, 2, 4), (4, 2, 8)]
        return [Row(*cut) for cut in cuts if cut[0] * cut[2] <= blocks]
    if batch > 16:
        # row tiles, activations, stages, warps, column tiles a step
        short = [(4, 32, 4, 4, 1), (8, 32, 7, 4, 1), (4, 32, 5, 4, 2)]
        middle = [(8, 64, 5, 4, 1), (4, 64, 6, 4, 1), (4, 64, 4, 4, 2), (8, 64, 3, 4, 2), (16, 64, 4, 8, 1)]
        long = [(8, 128, 4, 4, 1), (8, 128, 4, 8, 1), (4, 128, 3, 4, 2)] if batch <= 128 else [(8, 256, 3, 8, 1), (4, 256, 3, 4, 1)]
        table = format in formats.TABLES
        # the smallest cut leaves no room for pairs
        return [
            Wide(*cut[:4], split, table and cut != short[0], ordered, cut[4])
            for cut in (short if batch <= 32 else middle if batch <= 64 else long)
            for split in ((1, 2) if row_tiles >= MANY else (2, 4, 8))
            for ordered in (True, False)
            if blocks % (split * cut[4]) == 0
        ]
    cuts = [(4, 1, 1, 4, 1), (4, 1, 1, 2, 1), (2, 2, 2, 2, 1), (2, 2, 1, 4, 1), (1, 4, 2, 2, 1), (2, 2, 2, 2, 0), (4, 1, 1, 8, 0)]
    tables = (True, False) if format in formats.TABLES else (False,)
    return [Few(pairs, *cut) for cut in cuts for pairs in tables]


def cases(sweep: bool) -> Iterator[tuple[str, str, int, int, Row | Few | Wide]]:
    """(shape's name, format, group, batch, variant); the chosen variant of each batch comes first."""
    for name, (rows, columns) in SHAPES.items():
        for format, group in FORMATS:
            for batch in BATCHES:
                chosen = choose(format, batch, rows // 16, columns // 64)
                yield name, format, group, batch, chosen
                if sweep and (format, group) != ("int4", 64):
                    for variant in candidates(format, batch, rows // 16, columns // 64):
                        if variant != chosen:
                            yield name, format, group, batch, variant


def error_of(format: str, group: int, batch: int, variant: Row | Few | Wide | None, shape: tuple[int, int], **options: Any) -> float:
    """Relative error of the product with float64, fresh random numbers each time."""
    dtype = options.pop("dtype", torch.bfloat16)
    packed = random_packed(format, shape, group, **options)
    x = torch.randn(batch, shape[1], device="cuda", dtype=dtype)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype) if batch % 2 else None
    exact = x.double() @ formats.dequantize(packed, torch.float64).double().T
    if bias is not None:
        exact += bias
    return ((product(x, packed, bias, variant).double() - exact).norm() / exact.norm()).item()


def check(share: list[Any]) -> list[str]:
    """Failures among (format, group, batch, variant, shape, options)."""
    torch.manual_seed(len(share))
    failures = []
    for format, group, batch, variant, shape, options in share:
        error = error_of(format, group, batch, variant, shape, **options)
        if not error < (6e-3 if options.get("dtype", torch.bfloat16) == torch.bfloat16 else 1.5e-3):
            failures.append(f"{format} group {group} batch {batch} {shape} {variant} {options}: error {error}")
    return failures


def contract() -> Iterator[Any]:
    """What users may bring: odd row counts, both dtypes, wide scales, zeros, any batch."""
    for dtype in (torch.bfloat16, torch.float16):
        for batch in (1, 5, 13, 27, 64, 100):
            for format in ("nf4", "fp4", *formats.EIGHT_BITS):
                yield format, 0 if format in formats.EIGHT_BITS else 64, batch, None, (200, 1088), {"dtype": dtype}
            yield "int4", 64, batch, None, (200, 1088), {"dtype": dtype, "zeros": True, "scale_dtype": dtype}
            yield "nf4", 64, batch, None, (4096, 2048), {"dtype": dtype, "scale_dtype": torch.float32}


def check_fused() -> list[str]:
    """Products of one activation with a norm, a bias, a gate and a residual in them, beside float64."""
    failures = []
    for format in formats.FORMATS:
        for columns, gated in ((1088, False), (4096, True), (14336, False)):
            packed = random_packed(format, (544, columns), 0 if format in formats.EIGHT_BITS else 64, zeros=format == "int4" and gated)
            x, norm = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16) * 3, torch.rand(columns, device="cuda").bfloat16() + 0.5
            bias, residual = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in (544, 272 if gated else 544))
            wide = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.double()
            exact = wide @ formats.dequantize(packed, torch.float64).double().T + bias.double()
            if gated:
                exact = torch.nn.functional.silu(exact[:, :272]) * exact[:, 272:]
            got = product(x, packed, bias, fused=Fused(norm, 1e-5, residual, gated, starts_early(x.device))).double()
            error = ((got - exact - residual.double()).norm() / exact.norm()).item()
            if not error < 8e-3:
                failures.append(f"{format} fused, {columns} columns, gated {gated}: error {error}")
    return failures


def check_layer() -> list[str]:
    """The layer compiled without a break, in a CUDA graph, and expanded for a large batch, beside float64."""
    failures = []
    linear = torch.nn.Linear(1024, 512, device="cuda", dtype=torch.bfloat16)
    for format in formats.FORMATS:
        layer = WeightOnlyLinear.from_linear(linear, format)
        weight = layer.dequantize(torch.float64)
        plain = plain_expand(layer.packed, torch.float32)
        if not torch.allclose(plain.double(), weight, rtol=1e-5, atol=1e-9):
            failures.append(f"{format}: expanded weight differs")
        compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        for batch in (1, 3, 200):
            x = torch.randn(batch, 1024, device="cuda", dtype=torch.bfloat16)
            exact = x.double() @ weight.T + layer.bias.double()
            for _ in range(3):
                got = compiled(x)
            error = ((got.double() - exact).norm() / exact.norm()).item()
            if not error < 6e-3:
                failures.append(f"{format} compiled, batch {batch}: error {error}")
    return failures + check_fused() + check_projections()


class GateAndUp(torch.nn.Module):
    """Two layers of one input, as an MLP has them."""

    def __init__(self, format: str | None):
        super().__init__()
        linears = [torch.nn.Linear(1024, rows, device="cuda", dtype=torch.bfloat16) for rows in (512, 256)]
        layers = linears if format is None else [WeightOnlyLinear.from_linear(linear, format) for linear in linears]
        self.gate_proj, self.up_proj = layers

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate_proj(x), self.up_proj(x)


def check_projections() -> list[str]:
    """Gate and up joined into one product, in a CUDA graph, beside two products."""
    failures = []
    for format in (None, *formats.FORMATS):
        torch._dynamo.reset()
        layers = GateAndUp(format)
        inputs = {batch: torch.randn(batch, 1024, device="cuda", dtype=torch.bfloat16) for batch in (1, 40)}
        with torch.inference_mode():
            apart = {batch: layers(x) for batch, x in inputs.items()}
            fuse_projections(layers)
            compiled = torch.compile(layers, fullgraph=True, mode="reduce-overhead")
            for batch, x in inputs.items():
                for _ in range(3):
                    got = compiled(x)
                errors = [((a - b).double().norm() / b.double().norm()).item() for a, b in zip(got, apart[batch], strict=True)]
                if not max(errors) < 6e-3:
                    failures.append(f"joined {format}, batch {batch}: errors {errors}")
    return failures


def microseconds(run: Callable[[int], Any], copies: int, milliseconds: float = 8) -> float:
    """Median time of one ``run(i)`` in a CUDA graph over all copies."""
    for i in range(min(copies, 3)):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    graph.replay()

    def timed(replays: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / replays / copies

    replays = max(1, int(milliseconds * 1e3 / 5 / (timed(2) * copies)))
    return statistics.median(timed(replays) for _ in range(5))


def baselines(shape: tuple[int, int]) -> Iterator[tuple[str, int, float]]:
    """(name, batch, microseconds) of bf16 cuBLAS, and of bitsandbytes where it is installed."""
    copies = max(2, -(-ROTATED_BYTES // (shape[0] * shape[1] * 2)))
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
    inputs = {batch: torch.randn(batch, shape[1], device="cuda", dtype=torch.bfloat16) for batch in BATCHES + MANY_BATCHES}
    for batch, x in inputs.items():
        yield "bf16", batch, microseconds(lambda i, x=x: torch.nn.functional.linear(x, weights[i]), copies)
    try:
        import bitsandbytes
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return
    packed, state = quantize_4bit(weights[0], blocksize=64, quant_type="nf4")
    copies = max(2, -(-ROTATED_BYTES // packed.numel()))
    rotated = [packed.clone() for _ in range(copies)]
    for batch, x in inputs.items():
        if batch in MANY_BATCHES[1:]:
            continue
        yield "bitsandbytes", batch, microseconds(lambda i, x=x: bitsandbytes.matmul_4bit(x, rotated[i].t(), quant_state=state), copies, 6)


def expanded(weights: list[Any], bf16: dict[int, float], row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of products for which the weight is expanded first, as for large batches."""
    for batch in MANY_BATCHES:
        x = torch.randn(batch, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)
        time_us = microseconds(lambda i, x=x: torch.nn.functional.linear(x, expand(weights[i], x.dtype)), len(weights))
        yield row | {"batch": batch, "us": time_us, "gain": bf16[batch] / time_us}


def bandwidth() -> float:
    """TB/s of cuBLAS' bf16 matrix-vector product over 1 GB, which does little but read."""
    weight = torch.randn(131072, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    return weight.numel() * 2 / microseconds(lambda i: torch.nn.functional.linear(x, weight), 1) / 1e6


def measure(sweep: bool, seconds: float) -> list[dict[str, Any]]:
    begin, rows = time.monotonic(), []
    peak = bandwidth()
    print(f"reads {peak:.2f} TB/s", flush=True)
    plan = list(cases(sweep))
    for name, shape in SHAPES.items():
        bf16: dict[int, float] = {}
        for kind, batch, time_us in baselines(shape):
            bf16.setdefault(batch, time_us)
            rows.append({"shape": name, "format": kind, "batch": batch, "us": time_us, "gain": bf16[batch] / time_us})
        torch.cuda.empty_cache()
        for format, group in FORMATS:
            one = random_packed(format, shape, group).stored_bytes
            weights = [random_packed(format, shape, group) for _ in range(max(2, -(-ROTATED_BYTES // one)))]
            tried: set[tuple[int, Row | Few | Wide]] = set()
            for _, _, _, batch, variant in (case for case in plan if case[:3] == (name, format, group)):
                if time.monotonic() - begin > seconds and batch in {b for b, _ in tried}:
                    continue
                x = torch.randn(batch, shape[1], device="cuda", dtype=torch.bfloat16)
                time_us = microseconds(lambda i, x=x, v=variant, w=weights: product(x, w[i], None, v), len(weights))
                row = {"shape": name, "format": format, "group": group, "batch": batch, "variant": asdict(variant), "us": time_us}
                row |= {"bytes": one, "share": one / time_us / 1e6 / peak, "gain": bf16[batch] / time_us}
                row["chosen"] = batch not in {b for b, _ in tried}
                tried.add((batch, variant))
                rows.append(row)
            rows.extend(expanded(weights, bf16, {"shape": name, "format": f"{format} expanded", "group": group}))
            del weights
        report([row for row in rows if row["shape"] == name])
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """One line a case; of a sweep the chosen variant and the best."""
    for key in dict.fromkeys((row["format"], row.get("group"), row["batch"]) for row in rows):
        same = [row for row in rows if (row["format"], row.get("group"), row["batch"]) == key]
        best = min(same, key=lambda row: row["us"])
        for row in [same[0]] + ([best] if best is not same[0] else []):
            share = f" share {row['share']:.2f} {tuple(row['variant'].values())}" if "share" in row else ""
            print(
                f"{row['shape']:8s} {key[0]:12s} {key[1] or '':>4} batch {key[2]:2d} {row['us']:7.2f} us gain {row['gain']:.2f}{share}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--processes", type=int, default=12, help="for compiling and checking the variants")
    parser.add_argument("--seconds", type=float, default=60, help="after which no further variants are timed")
    arguments = parser.parse_args()
    begin = time.monotonic()
    small = {(f, g, b, v, (528, SHAPES[n][1]), ()) for n, f, g, b, v in cases(arguments.sweep)}
    work = [(*case[:5], {}) for case in small] + list(contract())
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        layer = pool.submit(check_layer)
        shares = [work[i :: arguments.processes] for i in range(arguments.processes)]
        failures = [failure for found in pool.map(check, shares) for failure in found] + layer.result()
    print(
        f"checked {len(work)} products in {time.monotonic() - begin:.1f} s, {len(failures)} failures", *failures[:10], sep="\n", flush=True
    )
    rows = measure(arguments.sweep, arguments.seconds)
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"], capture_output=True, text=True
    )
    import triton

    result = {
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "driver_clocks": smi.stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "failures": failures,
        "rows": rows,
    }
    with open(arguments.output, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
