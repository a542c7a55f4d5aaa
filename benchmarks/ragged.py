"""Ragged generation: hundreds of prompts of unequal length, padded batches beside continuous batching, transformers' and ours.

    python -m benchmarks.ragged --config Llama-3.1-8B.json --output benchmarks/results/ragged-h200.json

Case ``equal``: every prompt gets ``--new`` tokens. Case ``varied``: 16 to 2 x ``--new``, known to no arm beforehand. Random weights: the text
means nothing, the work is that of a trained model. Each arm warms up, then runs ``--repeats`` times, a slow one once; every
run has prompts of its own, so that nothing is fast only because its shape was seen before. Arms:

    padded        generate on batches of 64 in file order
    paged         transformers' generate_batch over SDPA; "paged-flash" over flash-attn, where it is installed
    SLOTS         compile + batching.kind=continuous with this many slots, such as 256
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import random
import sys
import time
import traceback
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import optkit
from optkit.engine import pad_left
from optkit.measure import Clock, generate_limit_seconds, measure_peaks, model_work, peak_memory, reset_peak_memory

Prompts = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config.json of a model; its weights are random")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arms", default="padded,paged,256", help="plain arms first: ours may change the model in place")
    parser.add_argument("--cases", default="varied,equal", help="the longest first, whose slots serve the others, too")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--lengths", default="64-512", help="tokens of a prompt, drawn evenly")
    parser.add_argument("--shared", type=int, default=0, help="the first tokens of all prompts are the same")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64, help="rows of a padded batch")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--enough", type=float, default=10, help="an arm is not repeated once its runs took so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="inductor", help="compile.backend")
    parser.add_argument("--seconds", type=float, default=500, help="no arm begins after this long")
    arguments = parser.parse_args()
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(arguments.config, device, arguments.seed)
    prompts = [draw_prompts(arguments, model.config.vocab_size, arguments.seed + run) for run in range(arguments.repeats + 1)]
    engines: dict[str, optkit.Optimized] = {}
    cases = {name: draw_limits(name, arguments) for name in arguments.cases.split(",")}
    bounds = {name: limit_seconds(model, prompts[1], limits, device) for name, limits in cases.items()}
    for name, limits in cases.items():
        tokens = f"{sum(map(len, prompts[1]))} prompt tokens, {sum(limits)} new ones"
        print(f"{name}: {tokens}, at best {sum(limits) / bounds[name]:.0f} tok/s", flush=True)
    rows = []
    for arm, (name, limits) in itertools.product(arguments.arms.split(","), cases.items()):
        if time.monotonic() - started > arguments.seconds:
            print(f"{name:8s} {arm:11s} not run: the time is up", flush=True)
            continue
        found = measured(make_arm(arm, model, engines, arguments), prompts, limits, arguments)
        rows.append({"case": name, "arm": arm, "limit_seconds": bounds[name]} | found)
        print(line(rows[-1]), flush=True)
        write(arguments.output, rows, arguments, device)


def random_model(config: str, device: str, seed: int) -> Any:
    """bfloat16 on a GPU, float32 elsewhere; no token ends a text."""
    torch.manual_seed(seed)
    shape = AutoConfig.from_pretrained(config)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation="sdpa").eval()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def draw_prompts(arguments: argparse.Namespace, vocabulary: int, seed: int) -> Prompts:
    draw = random.Random(f"prompts/{seed}")
    shortest, longest = map(int, arguments.lengths.split("-"))
    shared = [draw.randrange(vocabulary) for _ in range(arguments.shared)]
    lengths = [draw.randint(shortest, longest) for _ in range(arguments.prompts)]
    return [shared + [draw.randrange(vocabulary) for _ in range(length - len(shared))] for length in lengths]


def draw_limits(case: str, arguments: argparse.Namespace) -> list[int]:
    draw = random.Random(f"limits/{arguments.seed}")
    return [
        draw.randint(min(16, arguments.new), 2 * arguments.new) if case == "varied" else arguments.new for _ in range(arguments.prompts)
    ]


def limit_seconds(model: Any, prompts: Prompts, limits: list[int], device: str) -> float:
    """The least time that this machine allows, all prompts in one batch and each step with the mean of rows that are left."""
    work = model_work(model)
    peaks = measure_peaks(device, model.dtype, min(work.weight_bytes, 1 << 30))
    whole = generate_limit_seconds(work, peaks, [[len(prompt) for prompt in prompts]], 1)
    for step in range(1, max(limits)):
        left = [len(prompt) + step for prompt, limit in zip(prompts, limits, strict=True) if limit > step]
        whole += max(work.weight_bytes / peaks.read_bandwidth, 2 * work.parameters * len(left) / peaks.flops)
        whole += sum(left) * work.kv_bytes / peaks.read_bandwidth
    return whole


# ---------------------------------------------------------------- arms


class Padded:
    """Every batch runs to its longest limit; what is beyond a row's own is thrown away, as it is with end-of-text."""

    def __init__(self, model: Any, batch: int):
        self.model, self.batch = model, batch

    def warm(self, prompts: Prompts, limits: list[int]) -> None:
        self.run(prompts[: self.batch], [8] * min(self.batch, len(prompts)))

    def run(self, prompts: Prompts, limits: list[int]) -> Prompts:
        texts: Prompts = []
        for begin in range(0, len(prompts), self.batch):
            batch, wanted = prompts[begin : begin + self.batch], limits[begin : begin + self.batch]
            ids, mask = pad_left(batch, 0, self.model.device)
            config = GenerationConfig(max_new_tokens=max(wanted), do_sample=False, pad_token_id=0)
            with torch.inference_mode():
                rows = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
            texts += [row[:limit] for row, limit in zip(rows, wanted, strict=True)]
        return texts

    def facts(self, prompts: Prompts) -> dict[str, Any]:
        return {"batch": self.batch}

    def close(self) -> None:
        pass


class Paged:
    """``generate_batch``, its manager kept between runs: warming it up and taking its memory are not in the time."""

    def __init__(self, model: Any, attention: str):
        self.model, self.attention = model, attention
        self.own = model.config._attn_implementation
        model.set_attn_implementation(attention)

    def warm(self, prompts: Prompts, limits: list[int]) -> None:
        """Limits as in the run: the manager is made for the longest that it sees first."""
        from transformers.generation.continuous_batching.utils import WorkloadHints

        self.config = GenerationConfig(max_new_tokens=max(limits), do_sample=False, eos_token_id=-1, pad_token_id=0)
        self.hints = WorkloadHints(
            max_prompt_length=max(map(len, prompts)), max_generated_length=max(limits), num_requests=len(prompts)
        )  # fmt: skip
        self.run(prompts[:32], [8] * min(32, len(prompts)))

    def run(self, prompts: Prompts, limits: list[int]) -> Prompts:
        with self.model.continuous_batching_context_manager(
            generation_config=self.config, persistent_manager=True, workload_hints=self.hints
        ) as manager:
            names = [
                manager.add_request(input_ids=prompt, max_new_tokens=limit, eos_token_id=-1)
                for prompt, limit in zip(prompts, limits, strict=True)
            ]
            found: dict[str, list[int]] = {}
            while len(found) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    found[result.request_id] = result.generated_tokens
                elif result is None and not manager.is_running():
                    raise RuntimeError("the manager stopped")
        return [found[name] for name in names]

    def facts(self, prompts: Prompts) -> dict[str, Any]:
        return {"attention": self.attention}

    def close(self) -> None:
        self.model.destroy_cached_continuous_batching_manager()
        self.model.set_attn_implementation(self.own)


class Continuous:
    """Ours: ``compile`` with ``batching.kind=continuous``. Its engine stays for the next case."""

    def __init__(self, optimized: optkit.Optimized):
        self.optimized, self.engine = optimized, cast(Any, optimized.engine)

    def warm(self, prompts: Prompts, limits: list[int]) -> None:
        self.run(prompts, limits)

    def run(self, prompts: Prompts, limits: list[int]) -> Prompts:
        return self.engine.generate_up_to(prompts, limits, exact=True)

    def facts(self, prompts: Prompts) -> dict[str, Any]:
        told = {name: told["facts"] for name, told in self.optimized.proof().items()}
        device = self.optimized.model.device.type
        with Clock(device) as clock:
            self.run(prompts, [1] * len(prompts))
        return {"reading_seconds": round(clock.seconds, 3), "proof": told}

    def close(self) -> None:
        pass


def make_arm(name: str, model: Any, engines: dict[str, optkit.Optimized], arguments: argparse.Namespace) -> Any:
    if name == "padded":
        return Padded(model, arguments.batch)
    if name in ("paged", "paged-flash"):
        return Paged(model, "paged|sdpa" if name == "paged" else "paged|flash_attention_2")
    if name not in engines:
        options = {"batching.kind": "continuous", "batching.size": int(name), "compile.backend": arguments.backend}
        tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=0)
        engines[name] = optkit.optimize(model, tokenizer, ["compile", "batching"], set=options)
    return Continuous(engines[name])


def measured(arm: Any, prompts: list[Prompts], limits: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of warming up and of each repeat, and what the arm says of itself; the reason where it fails."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        reset_peak_memory(device)
        with Clock(device) as warming:
            arm.warm(prompts[0], limits)
        seconds: list[float] = []
        while len(seconds) < arguments.repeats and sum(seconds) < arguments.enough:
            with Clock(device) as clock:
                texts = arm.run(prompts[1 + len(seconds)], limits)
            seconds.append(clock.seconds)
            assert [len(text) for text in texts] == limits, "an arm gave more or fewer tokens than were asked for"
        row = {"warm_up_seconds": warming.seconds, "seconds": seconds, "tokens": sum(limits), "peak_bytes": peak_memory(device)}
        return row | {"facts": arm.facts(prompts[0])}
    except Exception as error:  # one arm's fault must not cost the others
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        arm.close()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


# ---------------------------------------------------------------- output


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['case']:8s} {row['arm']:11s} failed: {row['error']}"
    seconds = median(row["seconds"])
    return (
        f"{row['case']:8s} {row['arm']:11s} {row['tokens'] / seconds:8.0f} tok/s, {row['limit_seconds'] / seconds:5.1%} of the limit, "
        f"{seconds:.2f} s x {len(row['seconds'])} (warm-up {row['warm_up_seconds']:.1f} s) {row['facts']}"
    )


def write(output: Path, rows: list[dict[str, Any]], arguments: argparse.Namespace, device: str) -> None:
    """Everything so far, with what produced it."""
    origin = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "optkit": optkit.__version__},
        "command": command(),
        "n": arguments.repeats,  # an arm's own is the number of its seconds
    }
    output.write_text(json.dumps(origin | {"rows": rows}, indent=1) + "\n")


def command() -> str:
    """As it was typed, without folders."""
    return " ".join(["python -m benchmarks.ragged", *(Path(word).name if "/" in word else word for word in sys.argv[1:])])


if __name__ == "__main__":
    main()
