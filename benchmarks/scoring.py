"""Scoring long rows: plain transformers, without logits of the whole batch, and compiled; with time, share of the limit, and memory.

    python -m benchmarks.scoring --config Llama-3.1-8B.json --rows 4 --length 4096 --output benchmarks/results/scoring-h200.json

All arms take turns in one process, in random order, on one model with random weights: scoring does the same work on any weights. The
compiled model with all its logits stands beside ``compile`` to show what the chunked head changes.

The limit is (2·parameters + 2·layers·hidden·length) FLOP a token at the best rate that a square product reached for a moment. Under
products without a pause a GPU lowers its clock to keep within its power, so the rate that it sustains is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from optkit import measure
from optkit.machine import detect
from optkit.plan import Choice, make_plan
from optkit.registry import discover
from optkit.session import Session
from optkit.sources import model_source

#: arm -> the plan's techniques. The model is shared, so that none of them may change it.
ARMS = {"plain": [], "chunked-loss": [Choice("chunked-loss")], "compile": [Choice("compile", {"fuse": False})]}
WHOLE = "compiled, all logits"
Score = Callable[[list[list[int]]], list[torch.Tensor]]


def sessions(model: str, names: list[str], stack: ExitStack) -> dict[str, Session]:
    """One session an arm, all with the first one's model."""
    machine, registry = detect(), discover()
    source = model_source(model)
    made: dict[str, Session] = {}
    for name in names:
        plan = make_plan(registry, machine, "score", ARMS[name])
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        session = made[name] = Session(registry, plan, source, machine, folder)
        first = made[names[0]]
        session.load() if session is first else session.load(first.model, first.tokenizer)
        session.transform()
        session.build()
    return made


def compiled_whole(model: Any) -> Score:
    """A compiled forward pass that makes every logit."""

    def whole(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)

    compiled = torch.compile(whole, fullgraph=True)

    def score(rows: list[list[int]]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return list(compiled(torch.tensor(rows, device=model.device)))

    return score


def sustained_flops(device: str, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of the peak's own product, repeated without a pause: over the second half of ``seconds``."""
    size = 8192 if device == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    begun, halves = time.perf_counter(), []
    while time.perf_counter() - begun < seconds:
        with measure.Clock(device) as clock:
            for _ in range(16):
                left @ left
        halves.append(clock.seconds)
    late = halves[len(halves) // 2 :]
    return 2 * size**3 * 16 * len(late) / sum(late)


def once(score: Score, rows: list[list[int]], device: str) -> dict[str, Any]:
    """Seconds of one batch, synchronized, peak bytes beyond what rests, and the mean loss in nats."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated() if device == "cuda" else 0
    with measure.Clock(device) as clock:
        found = score(rows)
    peak = torch.cuda.max_memory_allocated() - rest if device == "cuda" else 0
    return {"seconds": clock.seconds, "peak_bytes": peak, "loss": -float(torch.cat(found).double().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a model's config.json, for random weights")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--arms", default=f"{','.join(ARMS)},whole")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    names = options.arms.split(",")
    random.seed(0)
    with ExitStack() as stack, torch.inference_mode():
        made = sessions(f"random:{options.config}", [name for name in names if name != "whole"], stack)
        model: Any = next(iter(made.values())).model
        device = model.device.type
        arms: dict[str, Score] = {
            name: (lambda rows, engine=session.engine: engine.score(rows, [1] * len(rows)))  # type: ignore[misc]
            for name, session in made.items()
        }
        if "whole" in names:
            arms[WHOLE] = compiled_whole(model)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        rows = [[random.randrange(vocabulary) for _ in range(options.length)] for _ in range(options.rows)]
        peaks = measure.measure_peaks(device, model.dtype, 1 << 30)
        limit = measure.score_limit_seconds(measure.model_work(model), peaks, [[options.length] * options.rows])
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
        cold = {}
        for name, score in arms.items():
            started = time.perf_counter()
            once(score, rows, device)
            cold[name] = time.perf_counter() - started
            for _ in range(2):
                once(score, rows, device)
            print(f"{name:22s} cold {cold[name]:.1f} s", flush=True)
        for _ in range(options.blocks):
            for name in random.sample(list(arms), len(arms)):
                runs[name].append(once(arms[name], rows, device))
        after, sustained = measure.measure_peaks(device, model.dtype, 1 << 30), sustained_flops(device, model.dtype)
    tokens = options.rows * (options.length - 1)
    result = {
        "command": " ".join(sys.argv), "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "config": Path(options.config).name, "rows": options.rows, "length": options.length, "dtype": str(model.dtype), "tokens": tokens,
        "peaks": vars(peaks), "peaks_after": vars(after), "sustained_flops": sustained, "limit_seconds": limit,
        "cold_seconds": cold, "runs": runs,
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    rates = f"{peaks.flops / 1e12:.0f} TFLOP/s (after: {after.flops / 1e12:.0f}; sustained: {sustained / 1e12:.0f})"
    print(f"limit {limit * 1e3:.1f} ms at {rates}, n = {options.blocks} turns")
    for name, measured in runs.items():
        seconds = median(run["seconds"] for run in measured)
        fastest, slowest = min(run["seconds"] for run in measured), max(run["seconds"] for run in measured)
        print(
            f"{name:22s} {1e3 * seconds:8.1f} ms [{1e3 * fastest:.1f}, {1e3 * slowest:.1f}]  {tokens / seconds:9.0f} tok/s  "
            f"{limit / seconds:.3f} of the limit  peak {measured[-1]['peak_bytes'] / 1e9:.2f} GB  loss {measured[-1]['loss']:.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
