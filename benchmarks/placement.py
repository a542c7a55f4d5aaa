"""Where a model lives: larger than the GPU's memory (``offload``), and on several GPUs (``parallel``), each beside the plain model.

    python -m benchmarks.placement offload --config Llama-3.1-8B.json --memory 8e9 --output benchmarks/results/offload.json
    python -m benchmarks.placement parallel --config Llama-3.1-8B.json --output benchmarks/results/parallel.json

``offload``: torch may take ``--memory`` bytes of the GPU only, less than the model has. The bus is measured in the same process, and each
row gives the share of it: bytes that had to cross, over the time that tokens took. Beside it, accelerate's own offloading of the same
layers. ``parallel``: the same rows with one device and with all of them. Weights are random: a speed says nothing about quality.
One row a figure: median with its order-statistic interval, n, and the machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from optkit.machine import detect
from optkit.measure import Clock
from optkit.plan import Choice, make_plan
from optkit.registry import discover
from optkit.session import Session
from optkit.settings import Setting
from optkit.sources import ModelSource
from optkit.stats import order_statistic_interval

Row = dict[str, Any]


class Bench:
    """Sessions of one model on this machine, and the rows that were measured."""

    def __init__(self, config: Path, dtype: str, repeats: int, folder: Path):
        self.source, self.dtype, self.repeats, self.folder = ModelSource(config.stem, "random", str(config)), dtype, repeats, folder
        self.registry, self.machine, self.rows = discover(), detect(), list[Row]()
        self.device = self.machine.device

    def session(self, options: dict[str, dict[str, Any]], *, model: Any = None) -> Session:
        """The plan with these techniques carried out, on a model of its own or on the one that is given."""
        wish = Setting(name="load.dtype", value=self.dtype, because="asked for", by="--dtype", strength="flag")
        plan = make_plan(self.registry, self.machine, "generate", [Choice(name, chosen) for name, chosen in options.items()], [wish])
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        session = Session(self.registry, plan, self.source, self.machine, folder)
        session.load(model, session.tokenizer)
        session.transform()
        session.build()
        return session

    def prompts(self, rows: int, length: int) -> list[list[int]]:
        draw = torch.Generator().manual_seed(rows * length)
        vocabulary = json.loads(Path(self.source.location).read_text())["vocab_size"]
        return torch.randint(0, vocabulary, (rows, length), generator=draw).tolist()

    def seconds(self, work: Callable[[], object], repeats: int | None = None) -> list[float]:
        """Seconds a call after one that warms up, synchronized."""
        work()
        values = []
        for _ in range(repeats or self.repeats):
            with Clock(self.device) as clock:
                work()
            values.append(clock.seconds)
        return values

    def row(self, case: str, arm: str, unit: str, values: Sequence[float], **more: Any) -> float:
        interval = order_statistic_interval(values)
        self.rows.append({"case": case, "arm": arm, "unit": unit, **asdict(interval), **more})
        said = "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in more.items())
        print(
            f"{case:34s} {arm:12s} {interval.value:10.5g} {unit}  [{interval.low:.5g}, {interval.high:.5g}] n {interval.n}  {said}",
            flush=True,
        )
        return interval.value


# ---------------------------------------------------------------- offload


def bus_bytes_a_second(bench: Bench, size: int = 1 << 29) -> float:
    """Copies of half a GiB from pinned memory, as many at once as a layer's worth of them would be."""
    home = torch.empty(size, dtype=torch.uint8, pin_memory=bench.device == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=bench.device)
    rates = [4 * size / value / 1e9 for value in bench.seconds(lambda: [there.copy_(home, non_blocking=True) for _ in range(4)], 10)]
    return 1e9 * bench.row("bus, host to device", "pinned", "GB/s", rates)


def offload(bench: Bench, memory: float, tokens: int, batches: list[int]) -> None:
    same_tokens(bench)
    plain = bench.session({})
    batched = [bench.prompts(size, 128) for size in batches]
    for rows in batched:
        decode(bench, "fits", "plain", plain, rows, tokens)
    model: Any = plain.model
    model.to("cpu")
    forget()
    if bench.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(memory / torch.cuda.mem_get_info()[1])
        torch.cuda.reset_peak_memory_stats()
    size = sum(parameter.nbytes for parameter in model.parameters())
    bench.rows.append({"case": "does not fit", "model_bytes": size, "memory_bytes": memory, "out_of_memory": fails(bench, size)})
    print(bench.rows[-1], flush=True)
    session = bench.session({"offload": {"layers": "auto" if bench.device == "cuda" else 2}}, model=model)
    facts = session.facts()["offload"]
    print(facts["summary"], flush=True)
    bus = bus_bytes_a_second(bench)
    for rows in batched:
        decode(bench, f"limited to {memory / 1e9:g} GB", "offload", session, rows, tokens, crossing=facts["bytes_elsewhere"], bus=bus)
    if bench.device == "cuda":
        bench.rows.append({"case": "peak", "bytes": torch.cuda.max_memory_reserved(), "facts": session.facts()["offload"]})
        print(bench.rows[-1], flush=True)
        accelerates(bench, facts, bus, batched[0])


def fails(bench: Bench, size: int) -> bool | None:
    """Whether the model's bytes are refused; ``None`` where there is no limit to try."""
    if bench.device == "cpu":
        return None
    try:
        torch.empty(size, dtype=torch.uint8, device=bench.device)
    except torch.OutOfMemoryError:
        return True
    return False


def same_tokens(bench: Bench) -> None:
    """In float32 the offloaded model's greedy tokens are the plain one's; six layers of the shape, the last four away."""
    shape = json.loads(Path(bench.source.location).read_text())
    few = bench.folder / "few.json"
    few.write_text(json.dumps(shape | {"num_hidden_layers": min(6, shape["num_hidden_layers"])}))
    small = Bench(few, "float32", 1, bench.folder)
    prompts = small.prompts(4, 24)
    session = small.session({})
    expected = session.engine.generate(prompts, new_tokens=8, exact=True)
    model: Any = session.model
    away = max(1, model.config.num_hidden_layers - 2)
    again = small.session({"offload": {"layers": away}}, model=model.to("cpu"))
    found = again.engine.generate(prompts, new_tokens=8, exact=True)
    bench.rows.append({"case": "same greedy tokens, float32", "arm": "offload", "layers_away": away, "equal": found == expected})
    print(bench.rows[-1], flush=True)


def decode(
    bench: Bench, case: str, arm: str, session: Session, rows: list[list[int]], tokens: int, *, crossing: int = 0, bus: float = 0.0,
    repeats: int | None = None,
) -> None:  # fmt: skip
    """Tokens a second of ``generate``; with ``crossing`` bytes a step, their rate and the share of the bus."""
    times = bench.seconds(lambda: session.engine.generate(rows, new_tokens=tokens, exact=True), repeats)
    middle = sorted(times)[len(times) // 2]
    more = {"GB/s": crossing * tokens / middle / 1e9, "share_of_bus": crossing * tokens / middle / bus} if crossing else {}
    bench.row(f"{case}, batch {len(rows)}", arm, "tok/s", [len(rows) * tokens / value for value in times], **more)


def accelerates(bench: Bench, facts: dict[str, Any], bus: float, rows: list[list[int]]) -> None:
    """The same number of last layers on ``cpu`` in accelerate's device map, on a fresh model."""
    from accelerate import dispatch_model

    torch.cuda.set_per_process_memory_fraction(1.0)
    session = bench.session({})
    model: Any = session.model
    model.to("cpu")  # accelerate keeps what is to be on the CPU where it finds it
    count = len(model.model.layers)
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    places |= {f"model.layers.{at}": "cpu" if at >= count - facts["layers_away"] else 0 for at in range(count)}
    dispatch_model(model, places, main_device=0)
    decode(bench, "same layers away", "accelerate", session, rows, 3, crossing=facts["bytes_elsewhere"], bus=bus, repeats=2)


# ---------------------------------------------------------------- parallel


def parallel(bench: Bench, devices: str, arms: list[str], per_device: int, tokens: int, what: list[str]) -> None:
    """Each arm: one prompt alone, generation and scoring, as far as they are in ``what``. A batch holds ``per_device`` rows for each device that shares rows out."""
    count = len(devices.split(",")) if devices else bench.machine.count
    chosen = {"devices": devices} if devices else {}
    rows = {"generate": bench.prompts(per_device * count, 128), "score": bench.prompts(per_device * count, 512)}
    first: dict[str, float] = {}
    reference: list[list[int]] = []
    for arm in arms:
        compiled, mode = arm.startswith("compile"), arm.removeprefix("compile+")
        options: dict[str, dict[str, Any]] = {"compile": {}} if compiled else {}
        if mode in ("replicas", "layers", "tensor"):
            options["parallel"] = {"mode": mode, **chosen}
        started, session = time.perf_counter(), None
        try:
            session = bench.session(options)
            print(f"{arm}: ready after {time.perf_counter() - started:.1f} s", flush=True)
            size = per_device * count if mode == "replicas" else per_device
            found = measure(bench, arm, session, rows, size, tokens, what)
        except Exception as error:  # one arm's fault must not cost the others on a machine that is lent by the minute
            print(f"{arm}: {type(error).__name__}: {error}", flush=True)
            bench.rows.append({"arm": arm, "error": f"{type(error).__name__}: {error}"})
            if session is not None:
                session.close()
            continue
        first = first or found
        gains = {name: round(value / first[name], 3) for name, value in found.items()}
        alone = [[row] for row in rows["generate"][:count]]  # a row a device: rounding depends on the rows of a device
        together = [sum(alone, [])] if mode == "replicas" else alone
        texts = [text for part in together for text in session.engine.generate(part, new_tokens=8, exact=True)]
        reference = reference or texts
        facts = session.facts().get("parallel", {})
        bench.rows.append({"case": "gain over the first arm", "arm": arm, **gains, "tokens_equal": texts == reference, "facts": facts})
        print(bench.rows[-1], flush=True)
        session.close()
        del session
        forget()


def measure(
    bench: Bench, arm: str, session: Session, rows: dict[str, list[list[int]]], size: int, tokens: int, what: list[str]
) -> dict[str, float]:
    engine, found = session.engine, {}

    def generate() -> None:
        for at in range(0, len(rows["generate"]), size):
            engine.generate(rows["generate"][at : at + size], new_tokens=tokens, exact=True)

    def score() -> None:
        for at in range(0, len(rows["score"]), size):
            part = rows["score"][at : at + size]
            sum(float(one.sum()) for one in engine.score(part, [1] * len(part)))

    def one(new_tokens: int) -> list[float]:
        return bench.seconds(lambda: engine.generate(rows["generate"][:1], new_tokens=new_tokens, exact=True))

    made, read = len(rows["generate"]) * tokens, sum(map(len, rows["score"]))
    if "one" in what:
        one(tokens)  # a compiled engine records its prompts in the second call
        alone, first = one(tokens), sorted(one(1))
        found["one prompt"] = bench.row(f"generate 1x128+{tokens}", arm, "tok/s", [tokens / value for value in alone])
        bench.row("a step of one prompt", arm, "ms", [1e3 * (value - first[len(first) // 2]) / (tokens - 1) for value in alone])
    if "generate" in what:
        found["generate"] = bench.row(
            f"generate {len(rows['generate'])}x128+{tokens}", arm, "tok/s", [made / value for value in bench.seconds(generate)]
        )
    if "score" in what:
        found["score"] = bench.row(f"score {len(rows['score'])}x512", arm, "tok/s", [read / value for value in bench.seconds(score)])
    return found


def forget() -> None:
    """Free what sessions that are no longer used have held: hooks and models refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["offload", "parallel"])
    parser.add_argument("--config", type=Path, required=True, help="config.json of the shape; weights are random")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens a prompt")
    parser.add_argument("--memory", type=float, default=8e9, help="offload: bytes of the GPU that torch may take")
    parser.add_argument("--batches", default="1,8", help="offload: prompts a batch")
    parser.add_argument("--devices", default="", help="parallel: such as cuda:0,cuda:1; default all")
    parser.add_argument("--arms", default="plain,replicas,tensor,layers", help="parallel: with compile+ in front for the compiled loop")
    parser.add_argument("--rows", type=int, default=32, help="parallel: rows a device")
    parser.add_argument("--measure", default="one,generate,score", help="parallel: one prompt, batches of prompts, scores")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.config, arguments.dtype, arguments.repeats, Path(folder))
        try:
            if arguments.case == "offload":
                offload(bench, arguments.memory, arguments.tokens, [int(size) for size in arguments.batches.split(",")])
            else:
                parallel(
                    bench, arguments.devices, arguments.arms.split(","), arguments.rows, arguments.tokens, arguments.measure.split(",")
                )
        finally:  # what was measured before a fault is kept
            packages = ("torch", "transformers", "accelerate")
            versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
            given = [
                f"--{name} {getattr(value, 'name', value)}" for name, value in vars(arguments).items() if name not in ("case", "output")
            ]
            command = f"python -m benchmarks.placement {arguments.case} {' '.join(given)}"
            report = {"command": command, "machine": bench.machine.model_dump(), "versions": versions, "rows": bench.rows}
            arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
