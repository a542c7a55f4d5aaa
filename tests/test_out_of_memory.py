"""Memory that really runs out, the GPU's and the host's, in the trials of whole runs: fewer samples at once, or ``oom``; all others go on.

A technique limits its own process, on a GPU with ``torch.cuda.set_per_process_memory_fraction`` and on a CPU with RLIMIT_DATA: torch's
allocators then raise the errors that a full device and a full host make them raise. And another process takes nearly all of a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from optkit.machine import detect
from optkit.testing.fixtures import OptkitRun
from tests.fakes import plugin

gpu = pytest.mark.skipif(detect().device != "cuda", reason="needs a GPU")

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32", "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
#: kind of model -> config, samples, and tokens of each. Scores of the first take 60 MB of logits a sample, keys and values of the second
#: 9 MB a text; weights and all else are small. Its heads are not grouped: in float32 a GPU's SDPA then has a kernel that does not write
#: all scores (290 MB a text) out.
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "wide vocabulary": ({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50_000}, 8, 300),
    "long texts": (
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_key_value_heads": 8, "vocab_size": 320},
        16,
        3000,
    ),
}
#: Technique -> MB that it leaves a process: for half of the samples of the first model, for a part of the second's, and for none.
ROOMS = {"half-room": 400, "some-room": 128, "no-room": 16}
LEFT = 200
"""MB that the other process leaves of a GPU: less than a CUDA context takes."""

LIMIT = """
@hookimpl
def transform_model(model, trial):
    room = {room} * 2**20
    if trial.device == "cuda":
        import torch
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    else:
        import resource
        from pathlib import Path
        lines = Path("/proc/self/status").read_text().splitlines()
        used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + room, resource.RLIM_INFINITY))

@hookimpl
def prove_effect(model, trial):
    import torch
    times = torch.cuda.memory_stats().get("num_ooms", 0) if trial.device == "cuda" else None
    return {{"times_out_of_memory": times, "summary": f"the allocator refused {{times}} times"}}
"""
FILL = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
left = int(sys.argv[1]) * 2**20
held = []
while free > left:
    size = max(2 * 2**20, (free - left) // 2)
    try:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        break
    free, _ = torch.cuda.mem_get_info()
print(free, flush=True)
sys.stdin.read()
"""
Measured = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def optkit(tmp_path: Path) -> OptkitRun:
    """``optkit`` with techniques that leave a trial little room."""
    (tmp_path / "optkit").mkdir()
    run = OptkitRun(tmp_path / "optkit")
    for name, room in ROOMS.items():
        run.plugin(name, plugin(name, LIMIT.format(room=room), stage="'cache'"))
    return run


@pytest.fixture
def measured(optkit: OptkitRun) -> Measured:
    """``measured(model, task, *plans, …)``: the record of a run of one process pair, and its table."""

    def call(model: str, task: str, *plans: str, device: str, code: int, **settings: Any) -> tuple[dict[str, Any], str]:
        sizes, count, tokens = MODELS[model]
        (optkit.here / "config.json").write_text(json.dumps(CONFIG | sizes))
        rows = [{"id": str(number), "prompt": f"{number} " + "a b c d " * (tokens // 8)} for number in range(count)]
        answers = {"answer": "end"} if task == "score" else {}
        (optkit.here / "samples.jsonl").write_text("".join(json.dumps(row | answers) + "\n" for row in rows))
        command = ["run", "--model", "random:config.json", "--samples", "samples.jsonl", "--limit", str(count), "--task", task]
        command += ["--repeats", "1", "--profile", "cpu" if device == "cpu" else "auto", "--format", "json", "--output", "table.md"]
        command += [word for plan in plans for word in ("--plan", plan)] + ["--plugins", ""]
        pairs = {"batch.size": count, "generate.max_new_tokens": 8} | {name.replace("__", "."): value for name, value in settings.items()}
        done = optkit(*command, *[word for name, value in pairs.items() for word in ("--set", f"{name}={value}")], code=code)
        assert done.stdout.startswith("{"), done.stderr
        return json.loads(done.stdout), (optkit.here / "table.md").read_text()

    return call


@pytest.fixture
def full_gpu() -> Iterator[int]:
    """Another process holds the device's memory; gives the bytes that it leaves."""
    process = subprocess.Popen([sys.executable, "-c", FILL, str(LEFT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(60)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_a_trial_halves_its_batch_or_is_out_of_memory_and_the_others_go_on(device: str, measured: Measured) -> None:
    plans = ("batching,half-room", "batching,no-room") + (("batching",) if device == "cpu" else ())
    record, table = measured("wide vocabulary", "score", *plans, device=device, code=1, batching__kind="largest")
    baseline, half, none, *rest = record["arms"]
    states = [arm["state"] for arm in record["arms"]]
    assert states == ["ok", "ok", "oom", *(["ok"] if rest else [])], [arm["reason"] for arm in record["arms"]]
    assert half["proof"]["batching"]["facts"]["size"] in (1, 2, 4)
    if rest:  # the same free memory, without the limit
        assert rest[0]["proof"]["batching"]["facts"]["size"] == 8
    else:
        assert half["proof"]["half-room"]["facts"]["times_out_of_memory"] >= 1
    assert half["tokens"] == baseline["tokens"] > 0  # every sample was scored
    assert half["quality"]["perplexity"]["value"] == pytest.approx(baseline["quality"]["perplexity"]["value"], rel=1e-4)
    words = "CUDA out of memory" if device == "cuda" else "can't allocate memory"
    assert words in none["reason"] and "\n" not in none["reason"] and not none.get("speed_up")
    row = next(line for line in table.splitlines() if "batching+no-room" in line.replace(" ", "").replace("`", ""))
    assert "oom" in row and "memory" in row and "baseline" in table


@gpu
def test_slots_are_halved_until_they_fit(measured: Measured) -> None:
    """``batching`` with an engine that has slots: its cache for all rows does not fit the process's share of the device."""
    settings = {"batching__kind": "continuous", "batching__size": MODELS["long texts"][1], "compile__backend": "eager"}
    record, _ = measured("long texts", "generate", "compile,batching,some-room", device="cuda", code=0, **settings)
    baseline, arm = record["arms"]
    assert arm["state"] == "ok" and arm["tokens"] == baseline["tokens"]
    facts = arm["proof"]["batching"]["facts"]
    assert facts["out_of_memory"] >= 1 and facts["slots"] < MODELS["long texts"][1]
    assert arm["proof"]["some-room"]["facts"]["times_out_of_memory"] >= 1
    assert arm["quality"]["agreement"]["value"] >= 0.9


@gpu
def test_on_a_gpu_that_another_process_fills_every_arm_says_so(measured: Measured, optkit: OptkitRun, full_gpu: int) -> None:
    record, table = measured("wide vocabulary", "score", device="cuda", code=1)
    assert full_gpu < 3 * LEFT * 2**20
    for arm in record["arms"]:
        assert arm["state"] == "oom" and "out of memory" in arm["reason"].lower(), (arm["state"], arm["reason"])
    assert "oom" in table
    assert "oom" in optkit("report", "--format", "json").stdout
