"""Slices of a model in two processes that gloo joins: logits and greedy tokens are those of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed as dist

import optkit
from optkit import UnavailableError
from optkit_plugins import parallel
from optkit_plugins.kernels.parallel import tensor as parallel_tensor
from optkit_plugins.kernels.parallel.exchange import join
from optkit_plugins.kernels.parallel.tensor import check, sliced, why_whole
from optkit_plugins.kernels.parallel.workers import leave
from tests.plugins.tiny import plain_greedy, ragged_prompts, tiny_model

#: "gathered": the plan of models that norm whole queries and keys (OLMo 2). "tied": the head is the embedding. "odd": a vocabulary that two cannot share. "biased": biases in every projection.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_neox")},
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "odd": ("llama", {"vocab_size": 127}),
    "gathered": ("llama", {}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
}
PROMPTS = ragged_prompts((5, 12, 3, 9))


def case_model(case: str) -> Any:
    kind, overrides = CASES[case]
    model, _ = tiny_model(kind, **overrides)
    if case == "gathered":
        styles = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output") | {"o_proj": "rowwise_split_input"}
        model._tp_plan = model._tp_plan | {f"model.layers.*.self_attn.{name}": style for name, style in styles.items()}
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers' biases begin at zero
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model


def outputs(case: str, folder: str, rank: int) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Of the sliced model: logits of all tokens, logits of one token a row, greedy tokens."""
    place = {"file": f"{folder}/{case}", "device": "cpu", "rank": rank, "world": 2}
    model = parallel_tensor.join_and_slice(case_model(case), **place)
    try:
        return all_logits(model), newest_logits(model), plain_greedy(model, PROMPTS, 6)
    finally:
        leave()
        join(None)


def all_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([PROMPTS[1]]), use_cache=False).logits


def newest_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([PROMPTS[1]] * 3), use_cache=False, logits_to_keep=1).logits


def follow(folder: str) -> None:
    """The second process."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for case in CASES:
        outputs(case, folder, 1)


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("meetings"))
    process = torch.multiprocessing.get_context("spawn").Process(target=follow, args=(folder,), daemon=True)
    process.start()
    with torch.no_grad():
        found = {case: outputs(case, folder, 0) for case in CASES}
    process.join(20)
    assert process.exitcode == 0
    return found


@pytest.mark.parametrize("case", CASES)
def test_slices_add_up_to_the_model(case: str, slices: Any) -> None:
    model = case_model(case)
    everything, newest, tokens = slices[case]
    torch.testing.assert_close(everything, all_logits(model), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(newest, newest_logits(model), atol=1e-5, rtol=1e-5)
    assert tokens == plain_greedy(model, PROMPTS, 6)


def test_the_compiled_step_on_slices_draws_the_same_tokens_as_on_one_device() -> None:
    sampling = {"generate.do_sample": True, "generate.temperature": 0.8, "compile.backend": "aot_eager"}
    model, tokenizer = tiny_model("llama")
    alone = optkit.optimize(model, tokenizer, plugins=["compile"], set=sampling)
    model, _ = tiny_model("llama")
    devices = {"parallel.mode": "tensor", "parallel.devices": "cpu,cpu"}
    together = optkit.optimize(model, tokenizer, plugins=["compile", "parallel"], set=sampling | devices)
    drawn = []
    for optimized in (alone, together):
        torch.manual_seed(7)
        drawn.append([optimized.engine.generate(PROMPTS, new_tokens=8, exact=True) for _ in range(2)])
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]
    with pytest.raises(UnavailableError, match="close the other engine of parallel.mode=tensor first"):
        optkit.optimize(tiny_model("llama")[0], tokenizer, plugins=["parallel"], set=devices)
    facts = together.proof()
    assert facts["compile"]["facts"]["graph_breaks"] == facts["compile"]["facts"]["recompiles"] == 0
    assert facts["parallel"]["facts"]["summed_layers"] == 4
    together.close()
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_recorded_step_on_two_gpus() -> None:
    plain, tokenizer = tiny_model("llama")
    model, _ = tiny_model("llama")
    optimized = optkit.optimize(model.cuda(), tokenizer, plugins=["compile", "parallel"], set={"parallel.mode": "tensor"})
    for _ in range(3):  # run, recorded, replayed
        assert optimized.engine.generate(PROMPTS, new_tokens=6, exact=True) == plain_greedy(plain, PROMPTS, 6)
    facts = optimized.proof()["compile"]["facts"]
    assert facts["recorded_steps"] == 1 and not facts["not_recorded"] and not facts["recompiles"]
    optimized.close()


def test_plans_with_more_than_linear_layers_of_a_divisible_size_are_refused() -> None:
    model, _ = tiny_model("llama")
    assert why_whole(model, 2) == "" and not sliced(model)["summed_layers"]
    assert why_whole(model, 3) == "64 of model.layers.0.self_attn.q_proj cannot be shared by 3 devices"
    model._tp_plan = model._tp_plan | {"model.layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(UnavailableError, match="its plan has 'packed_colwise' for model.layers.0.mlp.up_proj, and only colwise.*=replicas"):
        parallel.check_sliceable(model, 2)


def test_experts_are_refused() -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=16, num_local_experts=2, **sizes))
    with pytest.raises(UnavailableError, match="MixtralForCausalLM cannot be sliced: its plan has .* for model.layers.0.mlp.experts"):
        parallel.check_sliceable(model, 2)


def test_slices_that_do_not_add_up_are_refused() -> None:
    model, _ = tiny_model("llama")
    logits = torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(0))
    check(model, logits + 1e-6, logits)
    for wrong in (logits + 0.1, logits * float("nan")):
        with pytest.raises(UnavailableError, match="slices of LlamaForCausalLM do not add up to it.*set parallel.mode=replicas"):
            check(model, wrong, logits)
