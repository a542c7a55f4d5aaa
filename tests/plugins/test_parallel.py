"""parallel: replicas and slices in processes of their own give the plain model's tokens and scores; what cannot work says so."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import optkit
from optkit import Engine, Machine, ModelSource, OptkitError, UnavailableError, UsageError
from optkit.estimate import estimate
from optkit.measure import model_work
from optkit.plan import Choice, make_plan
from optkit.registry import discover
from optkit_plugins import parallel
from optkit_plugins.kernels.parallel.engines import Lockstep, Replicas
from optkit_plugins.kernels.parallel.workers import Worker, settle
from tests.plugins.tiny import plain_greedy, ragged_prompts, tiny_model

PROMPTS = ragged_prompts((5, 12, 3, 9, 7))
NEW_TOKENS = 6


def machine(device: str = "cpu", count: int = 1) -> Machine:
    return Machine(device, "test", count, None, 1 << 30, 1 << 34, "test", 2)


def plain_scores(model: Any, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Log probabilities of each token from the second on, one sequence at a time, in float64."""
    rows = []
    for sequence in sequences:
        with torch.inference_mode():
            logs = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].double().log_softmax(-1)
        rows.append(torch.tensor([float(logs[at - 1, sequence[at]]) for at in range(1, len(sequence))]))
    return rows


def agrees(engine: Engine, model: Any) -> None:
    assert engine.generate(PROMPTS, new_tokens=NEW_TOKENS, exact=True) == plain_greedy(model, PROMPTS, NEW_TOKENS)
    scores = engine.score(PROMPTS, [1] * len(PROMPTS))
    for score, expected in zip(scores, plain_scores(model, PROMPTS), strict=True):
        torch.testing.assert_close(score.double(), expected.double(), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def replicas() -> Iterator[Any]:
    model, tokenizer = tiny_model("llama")
    optimized = optkit.optimize(model, tokenizer, plugins=["parallel"], set={"parallel.devices": "cpu,cpu"})
    yield optimized
    optimized.close()


def test_replicas_give_the_plain_tokens_and_scores_in_order(replicas: Any) -> None:
    plain, _ = tiny_model("llama")
    agrees(replicas.engine, plain)
    facts = replicas.proof()["parallel"]["facts"]
    assert facts["devices"] == facts["served"] == ["cpu", "cpu"]
    assert replicas.plan.settings["batch.size"] == 2 * optkit.Settings({})["batch.size"]


def test_replicas_are_other_processes(replicas: Any) -> None:
    (worker,) = replicas.engine.workers
    assert worker.process.pid != os.getpid() and os.getpgid(worker.process.pid) == os.getpgid(0)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_rows(count: int, replicas: Any) -> None:
    plain, _ = tiny_model("llama")
    expected = plain_greedy(plain, PROMPTS[:count], 4)
    assert replicas.engine.generate(PROMPTS[:count], new_tokens=4, exact=True) == expected
    assert len(replicas.engine.score(PROMPTS[:count], [1] * count)) == count


def test_distributions_come_from_the_first_device(replicas: Any) -> None:
    plain, _ = tiny_model("llama")
    (rows,) = replicas.engine.log_probs(PROMPTS[:1], [1])
    expected = plain(input_ids=torch.tensor(PROMPTS[:1])).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)


def test_a_failure_in_a_replica_is_told_and_the_next_batch_is_right(replicas: Any) -> None:
    plain, _ = tiny_model("llama")
    too_large = [PROMPTS[0], [10**6]]  # the second row goes to the second device
    with pytest.raises(OptkitError, match="the worker on cpu failed: IndexError"):
        replicas.engine.generate(too_large, new_tokens=2, exact=True)
    with pytest.raises(IndexError):
        replicas.engine.generate(too_large[::-1], new_tokens=2, exact=True)
    assert replicas.engine.generate(PROMPTS, new_tokens=4, exact=True) == plain_greedy(plain, PROMPTS, 4)


def test_quantized_layers_and_the_plans_engine_reach_the_replicas_and_a_lost_one_is_told() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'optkit[nf4]'")
    model, tokenizer = tiny_model("llama")
    alone = optkit.optimize(model, tokenizer, plugins=["nf4"])
    expected = [alone.engine.generate([prompt], new_tokens=4, exact=True)[0] for prompt in PROMPTS]
    model, _ = tiny_model("llama")
    both = optkit.optimize(
        model, tokenizer, plugins=["nf4", "compile", "parallel"], set={"parallel.devices": "cpu,cpu", "compile.backend": "aot_eager"}
    )
    assert both.engine.generate(PROMPTS, new_tokens=4, exact=True) == expected
    assert both.engine.inner.name == "compiled"  # type: ignore[attr-defined]
    (worker,) = both.engine.workers  # type: ignore[attr-defined]
    worker.process.kill()
    worker.process.join()
    with pytest.raises(OptkitError, match=r"the worker on cpu is gone \(exit code -9\)"):
        both.engine.generate(PROMPTS, new_tokens=4, exact=True)
    both.close()
    assert not worker.process.is_alive()


def test_tensor_parallel_gives_the_plain_tokens_with_half_of_the_weights() -> None:
    plain, _ = tiny_model("llama")
    model, tokenizer = tiny_model("llama")
    optimized = optkit.optimize(model, tokenizer, plugins=["parallel"], set={"parallel.mode": "tensor", "parallel.devices": "cpu,cpu"})
    agrees(optimized.engine, plain)
    (rows,) = optimized.engine.log_probs(PROMPTS[:1], [1])
    assert rows.shape == (len(PROMPTS[0]) - 1, 128)
    local = optimized.model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr]
    assert local.shape == (64, 64) and local.untyped_storage().nbytes() == local.nbytes, "the other half is freed"
    facts = optimized.proof()["parallel"]["facts"]
    assert facts["devices"] == ["cpu", "cpu"] and facts["summed_layers"] == 4 and facts["exchange"] == "gloo"
    assert optimized._session.whole_work == model_work(plain)  # the limit is that of the whole model
    with pytest.raises(UnavailableError, match="leave out parallel to save it"):
        parallel.save_model(trial=optimized._session.contexts["parallel"])
    optimized.close()
    assert not torch.distributed.is_initialized()


def test_models_that_cannot_be_sliced_are_refused() -> None:
    model, _ = tiny_model("gpt2")
    with pytest.raises(UnavailableError, match="no tensor parallel plan for GPT2LMHeadModel; set parallel.mode=replicas"):
        parallel.check_sliceable(model, 2)
    model, _ = tiny_model("llama")
    with pytest.raises(UsageError, match="4 devices cannot share 4 query heads and 2 KV heads"):
        parallel.check_sliceable(model, 4)
    parallel.check_sliceable(model, 2)


def test_a_worker_that_cannot_be_started_leaves_none_behind(make_trial: Any) -> None:
    trial = make_trial("parallel", parallel.ParallelOptions(mode="tensor", devices="cpu,cpu"), machine=machine())
    model, _ = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnavailableError, match="cannot be sent to the process of cpu"):
        parallel.transform_model(model=model, trial=trial)
    assert trial.notes["parallel"]["workers"] == []


def test_a_model_without_a_pickled_form_is_refused() -> None:
    model, _ = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnavailableError, match="cannot be sent to the process of cpu"):
        Worker(model, "cpu", seed=0)


class Fake:
    """A worker without a process."""

    def __init__(self, fails: bool):
        self.asked, self.fails, self.device = True, fails, "cuda:1"

    def answer(self) -> str:
        self.asked = False
        if self.fails:
            raise OptkitError("test")
        return "fetched"


def test_every_answer_is_fetched_even_if_one_failed() -> None:
    workers: Any = [Fake(True), Fake(False), Fake(True)]
    with pytest.raises(OptkitError, match="test"):
        settle(workers)
    assert not any(worker.asked for worker in workers)


def test_engines_of_other_runtimes_are_refused(make_trial: Any) -> None:
    trial = make_trial("parallel", parallel.ParallelOptions(devices="cpu,cpu"), machine=machine())
    with pytest.raises(UnavailableError, match="cannot build the engine 'engine'"):
        parallel.wrap_engine(Engine(), trial)


def test_what_the_plan_is_told() -> None:
    def claims(device: str = "cuda", count: int = 2, **options: Any) -> Any:
        return parallel.configure(options=parallel.ParallelOptions(**options), machine=machine(device, count))

    two = claims()
    assert two.problem is None and {wish.name: wish.value for wish in two.settings} == {"batch.size": 16}
    assert "cuda:0, cuda:1" in two.notes[0] and not two.adds
    assert claims(mode="layers").settings[0].name == "load.device_map"
    assert claims(mode="layers").adds == {"python-in-forward"} and not claims(mode="tensor").adds
    assert claims(mode="tensor").refuses == {"weights-quantized"}
    shares = {mode: claims(mode=mode).devices for mode in ("replicas", "layers", "tensor")}
    assert {mode: (devices.count, devices.share) for mode, devices in shares.items()} == {
        "replicas": (2, "rows"), "layers": (2, "layers"), "tensor": (2, "slices"),
    }  # fmt: skip
    assert claims("cpu", 1, devices="cpu,cpu").devices.count == 1  # two processes of one device have its bandwidth
    assert "this machine has 1 GPU; leave out parallel" in claims(count=1).problem
    assert "computes on its CPU; leave out parallel" in claims("cpu", 1).problem
    assert "there is no cuda:2" in claims(devices="cuda:0,cuda:2").problem
    assert "not all of the kind 'cuda'" in claims(devices="cuda:0,cpu").problem
    assert claims("cpu", 1, devices="cpu, cpu").problem is None
    assert "layers on one CPU" in claims("cpu", 1, devices="cpu,cpu", mode="layers").problem


def test_the_estimate_of_a_plan_over_two_gpus_is_for_each_of_them(tmp_path: Any) -> None:
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    source, registry = ModelSource("tiny", "folder", str(tmp_path)), discover({"parallel"})

    def bytes_of(*choices: Choice) -> dict[str, int]:
        found = estimate(source, make_plan(registry, machine("cuda", 2), "generate", choices), "cuda")
        assert found is not None
        return found

    def over_two(mode: str) -> dict[str, int]:
        return bytes_of(Choice("parallel", {"mode": mode}))

    table = 2 * 1000 * 64 * 4  # embedding and head in float32
    one, rows, layers, slices = bytes_of(), *map(over_two, ("replicas", "layers", "tensor"))
    assert rows == one  # twice as many rows a batch, shared by two
    assert layers["weights"] == one["weights"] // 2 and layers["kv_cache"] == one["kv_cache"] // 2
    assert slices["weights"] == (one["weights"] - table) // 2 + table and slices["kv_cache"] == one["kv_cache"] // 2
    assert all(plan["total"] < one["total"] and plan["activations"] == one["activations"] for plan in (layers, slices))


def test_the_baseline_is_told_apart(make_trial: Any) -> None:
    trial = make_trial("parallel", parallel.ParallelOptions())
    assert parallel.prove_effect(model=None, trial=trial)["devices"] == ["cpu"]  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", ["replicas", "layers", "tensor"])
def test_on_two_gpus(mode: str) -> None:
    plain, tokenizer = tiny_model("llama")
    model, _ = tiny_model("llama")
    optimized = optkit.optimize(model.cuda(), tokenizer, plugins=["parallel"], set={"parallel.mode": mode})
    assert optimized.engine.generate(PROMPTS, new_tokens=NEW_TOKENS, exact=True) == plain_greedy(plain, PROMPTS, NEW_TOKENS)
    assert optimized.proof()["parallel"]["facts"]["devices"] == ["cuda:0", "cuda:1"]
    if mode == "layers":
        assert {parameter.device.index for parameter in optimized.model.parameters()} == {0, 1}
    optimized.close()


def test_rows_are_dealt_in_turn(make_trial: Any) -> None:
    """Without processes: what each device is asked, and that results come back in the order of the rows."""

    class Echo(Engine):
        def generate(self, prompts: Any, *, new_tokens: int, exact: bool = False) -> list[list[int]]:
            return [list(prompt) for prompt in prompts]

    class EchoWorker(Fake):
        def __init__(self) -> None:
            super().__init__(False)
            self.asked = False
            self.rows: Any = []

        def ask(self, call: str, prompts: Any, named: Any) -> None:
            self.rows, self.asked = prompts, True

        def answer(self) -> Any:
            self.asked = False
            return self.rows

    workers: Any = [EchoWorker(), EchoWorker()]
    engine = Replicas(Echo(), "cuda:0", workers)
    rows = [[at] for at in range(7)]
    assert engine.generate(rows, new_tokens=1) == rows
    assert [worker.rows for worker in workers] == [[[1], [4]], [[2], [5]]]
    assert engine.served == {0, 1, 2}


def test_other_tokens_on_another_device_are_told() -> None:
    class Inner(Engine):
        trial = type("Trial", (), {"settings": optkit.Settings({})})

        def generate(self, prompts: Any, *, new_tokens: int, exact: bool = False) -> list[list[int]]:
            return [[3, 4]]

    class Other(Fake):
        tokens = [[3, 4]]

        def ask(self, call: str, *_: Any) -> None:
            self.asked = True

        def answer(self) -> Any:
            self.asked = False
            return self.tokens

    worker: Any = Other(False)
    engine = Lockstep(Inner(), [worker])  # type: ignore[arg-type]
    assert engine.generate([[1]], new_tokens=2) == [[3, 4]]
    worker.tokens = [[3, 5]]
    with pytest.raises(OptkitError, match="the worker on cuda:1 took other tokens"):
        engine.generate([[1]], new_tokens=2)
