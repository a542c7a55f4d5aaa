"""Decoding with a compiled step beside transformers' ``generate``, on one model built once with random weights.

    python -m benchmarks.decode --config Llama-3.1-8B.json --batches 1,64 --output benchmarks/results/decode_h200.json

Every arm generates the same prompts; a unit is one call (prefill and all steps), timed with a synchronized clock, the parts with events.
The share is of the limit that ``optkit`` prints, from bandwidth and arithmetic measured in the same process. First texts are compared with
those of the first arm; where they part, the logits' gap at that place is given, which is a tie where it is within rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import transformers

from optkit import TransformersEngine
from optkit.context import TrialContext
from optkit.machine import detect
from optkit.measure import Peaks, generate_limit_seconds, measure_peaks, model_work
from optkit.settings import Settings
from optkit.sources import ModelSource
from optkit_plugins import compile as compiling


@dataclass(frozen=True)
class Arm:
    """:ivar options: of ``compile``, ``None`` for ``generate``. :ivar kernel: decode attention over true lengths.
    :ivar extra_columns: allocated beyond those that the texts need. :ivar inductor: settings of the compiler that are only tried here."""

    name: str
    options: dict[str, Any] | None = None
    kernel: bool = True
    extra_columns: int = 0
    inductor: dict[str, Any] = field(default_factory=dict)


#: Fused arms last: joining projections changes the model.
ARMS = [
    Arm("generate"),
    Arm("compile, SDPA", {"fuse": False, "products": "library"}, kernel=False),
    Arm("+ attention kernel", {"fuse": False, "products": "library"}),
    Arm("+ fused projections", {"products": "library"}),
    Arm("+ matvec", {"products": "matvec"}),
    Arm("+ fused steps (compile)", {}),
    Arm("compile, steps whole", {"steps": "whole"}),
    Arm("compile, steps by layers", {"steps": "layers"}),
    Arm("compile, prompts as they are", {"prompts": False}),
    Arm("compile, 8192 columns", {}, extra_columns=8000),
    Arm("compile, inductor's products", {"products": "inductor"}),
    Arm("compile, max-autotune", {"mode": "max-autotune"}),
    Arm("compile, combo kernels", {}, inductor={"combo_kernels": True}),
    Arm("compile, inductor's PDL", {}, inductor={"triton.enable_pdl": True}),
]


def build(config: Path, dtype: torch.dtype, device: str) -> Any:
    """The config's architecture with random weights, made on the device."""
    values = json.loads(config.read_text())
    with torch.device(device):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**values), dtype=dtype, attn_implementation="sdpa"
        )
    model.generation_config.eos_token_id = None
    return model.eval()


def trial(model: Any, device: str, **options: Any) -> TrialContext:
    return TrialContext(
        technique="compile",
        options=compiling.CompileOptions(**options),
        settings=Settings({}),
        task="generate",
        device=device,
        seed=0,
        source=ModelSource("random", "random", "config.json"),
        folder=Path("."),
        tokenizer=None,
        machine=detect(),
    )


class Timed:
    """A compiled engine's parts, timed with events: ``prefill`` and ``steps``, milliseconds a call."""

    def __init__(self, engine: Any):
        self.marks: list[tuple[str, Any, Any]] = []
        for part, name in (("_read", "prefill"), ("_decode", "steps")):
            setattr(engine, part, self._timed(getattr(engine, part), name))

    def _timed(self, call: Any, name: str) -> Any:
        def timed(*positional: Any, **named: Any) -> Any:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            try:
                return call(*positional, **named)
            finally:
                end.record()
                self.marks.append((name, begin, end))

        return timed

    def take(self) -> dict[str, float]:
        torch.cuda.synchronize()
        taken = {name: begin.elapsed_time(end) for name, begin, end in self.marks}
        self.marks.clear()
        return taken


def engine_of(arm: Arm, model: Any, device: str) -> Any:
    if arm.options is None:
        return TransformersEngine(model, trial(model, device))
    engine: Any = compiling.build_engine(model=model, trial=trial(model, device, **arm.options))
    if not arm.kernel:
        engine.attention.spans = False
    if arm.extra_columns:
        plain = engine._bucket
        engine._bucket = lambda rows, columns, sampler: plain(rows, columns + arm.extra_columns, sampler)
    return engine


def measure(arm: Arm, engine: Any, prompts: Sequence[Sequence[int]], new_tokens: int, repeats: int, device: str) -> dict[str, Any]:
    """One arm's row: cold seconds, seconds of each repeat, parts, and the tokens."""
    cuda, compiled = device == "cuda", arm.options is not None
    synchronize = torch.cuda.synchronize if cuda else (lambda: None)
    timed = Timed(engine) if cuda and compiled else None

    def unit() -> tuple[float, list[list[int]]]:
        synchronize()
        begin = time.perf_counter()
        texts = engine.generate(prompts, new_tokens=new_tokens, exact=True)
        synchronize()
        return time.perf_counter() - begin, texts

    with torch._inductor.config.patch(arm.inductor):
        cold, texts = unit()
    for _ in range(2):
        unit()
    if timed:
        timed.take()
    rows = []
    for _ in range(repeats):
        seconds, again = unit()
        rows.append({"seconds": seconds, **(timed.take() if timed else {}), "same_tokens": again == texts})
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "same_tokens"}
    facts: dict[str, Any] = {}
    if compiled:
        facts = {"graphs": engine.tally.graphs, "recompiles": engine.tally.recompiles, "buckets": engine.tally.buckets}
        facts |= engine.facts()
        if "steps" in middle:
            middle["step"] = middle["steps"] / (new_tokens - 1)
    return {**asdict(arm), "cold_seconds": cold, "median": middle, "repeats": rows, "facts": facts, "texts": texts}


def kernels_of(engine: Any, column: int) -> dict[str, Any]:
    """What one step of the newest bucket launches: microseconds by kernel, longest first, and the time from first to last."""
    bucket = list(engine.slots.values())[-1]
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        bucket.slot.column.fill_(column)
        torch.cuda.synchronize()
        bucket.step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    table: dict[str, tuple[int, float]] = {}
    for event in events:
        count, spent = table.get(event.name, (0, 0.0))
        table[event.name] = count + 1, spent + event.device_time
    longest = sorted(table.items(), key=lambda item: -item[1][1])
    return {
        "launches": len(events),
        "busy": sum(spent for _, spent in table.values()),
        "span": max(event.time_range.end for event in events) - min(event.time_range.start for event in events),
        "kernels": [{"name": name[:120], "launches": count, "microseconds": spent} for name, (count, spent) in longest[:20]],
    }


def first_difference(model: Any, prompts: Sequence[Sequence[int]], texts: list[list[int]], others: list[list[int]]) -> dict[str, Any]:
    """Where two arms' texts part first, and how far apart plain logits put the two tokens there, in steps of the model's dtype."""
    for row, (one, two) in enumerate(zip(texts, others, strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), None)
        if at is not None:
            ids = torch.tensor([list(prompts[row]) + one[:at]], device=model.device)
            with torch.inference_mode():
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            a, b = float(logits[one[at]]), float(logits[two[at]])
            spacing = torch.finfo(model.dtype).eps * max(abs(a), abs(b))
            return {"row": row, "token": at, "gap": abs(a - b), "steps_of_dtype": abs(a - b) / spacing, "highest": float(logits.max())}
    return {}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = arguments.device
    dtype = getattr(torch, arguments.dtype)
    model = build(arguments.config, dtype, device)
    peaks: Peaks = measure_peaks(device, dtype, 1 << 30 if device == "cuda" else 1 << 20)
    vocabulary = model.config.vocab_size
    result: dict[str, Any] = {"environment": environment(device), "peaks": asdict(peaks), "rows": []}
    work = model_work(model)
    wanted = [arm for arm in ARMS if not arguments.arms or arm.name in arguments.arms.split(";")]
    first: dict[int, list[list[int]]] = {}
    for arm in wanted:
        for batch in map(int, arguments.batches.split(",")):
            prompts = torch.randint(5, vocabulary, (batch, arguments.prompt), generator=torch.Generator().manual_seed(batch)).tolist()
            limit = generate_limit_seconds(work, peaks, [[arguments.prompt] * batch], arguments.new_tokens)
            engine = engine_of(arm, model, device)
            try:
                row = measure(arm, engine, prompts, arguments.new_tokens, arguments.repeats, device)
            except Exception as error:  # one arm's fault must not cost the others
                print(f"{arm.name:40s} batch {batch:3d} failed: {type(error).__name__}: {error}", flush=True)
                engine.close()
                continue
            if arguments.kernels and arm.options is not None:
                row["step_kernels"] = kernels_of(engine, arguments.prompt + arguments.new_tokens // 2)
                for kernel in row["step_kernels"]["kernels"][:12]:
                    print(f"    {kernel['microseconds']:8.1f} us in {kernel['launches']:3d}: {kernel['name'][:90]}", flush=True)
            engine.close()
            texts = row.pop("texts")
            difference = first_difference(model, prompts, first.setdefault(batch, texts), texts)
            row |= {"batch": batch, "limit_seconds": limit, "difference": difference}
            result["rows"].append(row)
            middle = row["median"]
            print(
                f"{arm.name:40s} batch {batch:3d} {batch * arguments.new_tokens / middle['seconds']:8.1f} tok/s "
                f"{limit / middle['seconds']:6.1%} of limit, prefill {middle.get('prefill', 0):.2f} ms, step {middle.get('step', 0):.3f} ms, "
                f"cold {row['cold_seconds']:.1f} s {row['facts']} {difference}",
                flush=True,
            )
            torch.compiler.reset()
            del engine
            if device == "cuda":
                torch.cuda.empty_cache()
            arguments.output.write_text(json.dumps(result, indent=1))
    return result


def environment(device: str) -> dict[str, Any]:
    found = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", "-m", "benchmarks.decode", *sys.argv[1:]]),
    }
    if device == "cuda":
        import triton

        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found |= {"triton": triton.__version__, "device": subprocess.run(query, capture_output=True, text=True).stdout.strip()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--batches", default="1")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arms", default="", help="names, separated by semicolons; all by default")
    parser.add_argument("--kernels", action="store_true", help="profile one step of each arm too (GPU)")
    parser.add_argument("--output", type=Path, required=True)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
