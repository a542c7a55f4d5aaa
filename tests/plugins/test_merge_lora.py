"""merge-lora: the merged model is peft's own unmerged one, in float64 and in float32, and refuses what cannot be merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from optkit import UsageError
from tests.plugins.tiny import ragged_prompts, tiny_model

pytest.importorskip("peft", reason="peft is not installed: pip install 'optkit[lora]'")

from optkit_plugins import merge_lora

IDS = torch.tensor([[5, 9, 77, 31, 4, 100, 63, 12, 8, 55]])
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "up_proj"],
    "qwen3": ["o_proj", "gate_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of the adapters' files are not left in the user's cache."""
    monkeypatch.setenv("OPTKIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def make_adapter(model: Any, folder: Path, kind: str = "llama", size: float = 0.1, **options: Any) -> torch.Tensor:
    """Save an adapter with random weights beside a float64 copy of the model; the unmerged logits of the two."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"} | options))
    adapted = get_peft_model(copy.deepcopy(model).double(), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=size)
            parameter.data = parameter.data.float().to(parameter.dtype)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return logits(adapted.double().eval())


def merged(model: Any, folder: Path, make_trial: Any) -> tuple[Any, Any]:
    trial = make_trial("merge-lora", merge_lora.MergeLoraOptions(adapter=folder))
    return merge_lora.transform_model(model=model, trial=trial), trial


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", TARGETS)
def test_the_merged_model_is_the_unmerged_one(kind: str, options: dict[str, Any], make_trial: Any, tmp_path: Path) -> None:
    model, _ = tiny_model(kind)
    model = model.double()
    plain = logits(model)
    expected = make_adapter(model, tmp_path / "adapter", kind, **options)
    assert (expected - plain).abs().max() > 0.01, "the adapter of the test does nothing"
    result, trial = merged(model, tmp_path / "adapter", make_trial)
    assert result is model and not any("lora" in name for name, _ in result.named_modules())
    assert (logits(result) - expected).abs().max() < 1e-9
    facts = merge_lora.prove_effect(model=result, trial=trial)
    assert facts["layers"] == 2 * len(TARGETS[kind]) and facts["rank"] == 4 and facts["lost_to_rounding"] < 1e-6


def test_low_precision_is_rounded_once(make_trial: Any, tmp_path: Path) -> None:
    """bfloat16 weights get the float64 sum rounded, not a sum of rounded numbers."""
    model, _ = tiny_model("llama")
    model = model.bfloat16()
    make_adapter(model, tmp_path, size=0.02)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    product = state[name.format("B")].double() @ state[name.format("A")].double()
    expected = (model.model.layers[1].self_attn.q_proj.weight.detach().double() + 2.0 * product).bfloat16()
    result, trial = merged(model, tmp_path, make_trial)
    assert torch.equal(result.model.layers[1].self_attn.q_proj.weight, expected)
    assert {parameter.dtype for parameter in result.parameters()} == {torch.bfloat16}
    assert 0.01 < trial.notes["merged"]["lost_to_rounding"] < 1


def test_a_merged_model_is_an_ordinary_folder(make_trial: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = tiny_model("llama")
    make_adapter(model, tmp_path / "adapter")
    result, _ = merged(model, tmp_path / "adapter", make_trial)
    result.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="sdpa")
    assert torch.equal(logits(loaded), logits(result))


def test_an_adapter_that_does_nothing_is_no_effect(make_trial: Any, tmp_path: Path) -> None:
    model, _ = tiny_model("llama")
    before = logits(model)
    make_adapter(model, tmp_path, size=0.0)
    result, trial = merged(model, tmp_path, make_trial)
    assert torch.equal(logits(result), before)
    facts = merge_lora.prove_effect(model=result, trial=trial)
    untouched = merge_lora.prove_effect(model=result, trial=make_trial("merge-lora", merge_lora.MergeLoraOptions()))
    assert facts.pop("summary") != untouched.pop("summary")
    assert facts == untouched == {"layers": 0}


def test_missing_or_wrong_adapters_are_problems_of_the_plan(tmp_path: Path) -> None:
    def problem(folder: Path | None) -> str:
        claims = merge_lora.configure(options=merge_lora.MergeLoraOptions(adapter=folder))
        assert claims is not None and claims.problem is not None
        return claims.problem

    assert "set merge-lora.adapter" in problem(None)
    assert "no adapter_config.json" in problem(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[", encoding="utf-8")
    assert "cannot be read" in problem(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}), encoding="utf-8")
    assert "IA3" in problem(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    assert "adapter_model.safetensors" in problem(tmp_path)


def test_an_adapter_of_another_model_is_refused(make_trial: Any, tmp_path: Path) -> None:
    model, _ = tiny_model("llama")
    make_adapter(model, tmp_path / "wide")
    narrow, _ = tiny_model("llama", hidden_size=32)
    with pytest.raises(UsageError, match="does not fit this model"):
        merged(narrow, tmp_path / "wide", make_trial)
    deep, _ = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(UsageError, match="does not fit this model"):
        merged(deep, tmp_path / "wide", make_trial)
    other, _ = tiny_model("gpt2")
    with pytest.raises(UsageError, match="does not fit this model"):
        merged(other, tmp_path / "wide", make_trial)


def test_tied_embeddings_and_quantized_weights_are_refused(make_trial: Any, tmp_path: Path) -> None:
    model, _ = tiny_model("llama", tie_word_embeddings=False)
    make_adapter(model, tmp_path, target_modules=["embed_tokens"])
    tied, _ = tiny_model("llama", tie_word_embeddings=True)
    before = logits(tied)
    with pytest.raises(UsageError, match="both embedding and head"):
        merged(tied, tmp_path, make_trial)
    assert torch.equal(logits(tied), before)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UsageError, match="quantized"):
        merged(model, tmp_path, make_trial)


def test_results_belong_to_the_adapters_contents(tmp_path: Path) -> None:
    model, _ = tiny_model("llama")
    make_adapter(model, tmp_path)
    first = merge_lora.MergeLoraOptions(adapter=tmp_path)
    again = merge_lora.MergeLoraOptions(**first.model_dump(mode="json"))
    assert again == first and len(first.adapter_digest) >= 32
    make_adapter(model, tmp_path, size=0.2)
    assert merge_lora.MergeLoraOptions(adapter=tmp_path).adapter_digest != first.adapter_digest
    with pytest.raises(ValueError, match="make the plan again"):
        merge_lora.MergeLoraOptions(**first.model_dump(mode="json"))


def test_the_plan_carries_it_out(tmp_path: Path) -> None:
    import optkit
    from optkit.errors import OptkitError

    model, tokenizer = tiny_model("llama")
    expected = make_adapter(model, tmp_path).float()
    optimized = optkit.optimize(model, tokenizer, plugins=["merge-lora"], set={"merge-lora.adapter": str(tmp_path)})
    assert (logits(optimized.model) - expected).abs().max() < 1e-4
    assert optimized.proof()["merge-lora"]["facts"]["layers"] == 6
    assert len(optimized.engine.generate(ragged_prompts(), new_tokens=2, exact=True)) == 4
    optimized.close()
    with pytest.raises(OptkitError, match="set merge-lora.adapter"):
        optkit.optimize(model, tokenizer, plugins=["merge-lora"])
