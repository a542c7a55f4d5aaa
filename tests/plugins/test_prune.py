"""prune: channels that do nothing go without a trace, masks are those of a plain reference, and narrower models load again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from optkit import UsageError
from optkit.modules import linears
from optkit_plugins import prune
from tests.plugins.tiny import ragged_prompts, tiny_model

IDS = torch.tensor([[5, 9, 77, 31, 4, 100, 63, 12, 8, 55]])
KINDS = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def pruned(model: Any, make_trial: Any, calibration: list[list[int]] | None = None, **options: Any) -> Any:
    trial = make_trial("prune", prune.PruneOptions(**options), calibration=calibration or [])
    assert prune.transform_model(model=model, trial=trial) is None
    return trial


def silence(model: Any, channels: list[int]) -> None:
    """Cut these channels off from the output, as a channel that matters least can be."""
    for mlp in prune.mlps(model):
        prune.by_outputs(mlp.last)[:, channels] = 0


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_silent_channels_go_without_a_trace(kind: str, calibrated: bool, make_trial: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = tiny_model(kind)
    silence(model, list(range(1, 128, 4)))
    before = logits(model)
    trial = pruned(model, make_trial, IDS.tolist() if calibrated else None, share=0.25, multiple=8)
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    facts = prune.prove_effect(model=model, trial=trial)
    assert (facts["width_before"], facts["width"], facts["layers"]) == (128, 96, 2)
    assert facts["importance"] == ("activations" if calibrated else "weights")
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters()) < facts["parameters_before"]

    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="sdpa")
    assert torch.equal(logits(loaded), logits(model))


def test_fused_gate_and_up_are_pruned_together(make_trial: Any) -> None:
    from transformers import AutoModelForCausalLM, Phi3Config

    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, pad_token_id=2, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    silence(model, list(range(64)))
    before = logits(model)
    pruned(model, make_trial, share=0.5)
    assert model.model.layers[0].mlp.gate_up_proj.weight.shape == (128, 64)
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_channels_are_kept_by_the_product_of_their_norms(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    part = model.model.layers[1].mlp
    gate, up, down = (getattr(part, name).weight.detach().double() for name in ("gate_proj", "up_proj", "down_proj"))
    product = [float(gate[c].norm() * up[c].norm() * down[:, c].norm()) for c in range(128)]
    kept = sorted(sorted(range(128), key=lambda c: product[c])[64:])
    expected = up[kept].float()
    pruned(model, make_trial, share=0.5)
    assert torch.equal(part.up_proj.weight, expected)
    assert part.up_proj.out_features == part.down_proj.in_features == 64


@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_zeroes_the_smallest_weights_of_each_layer(kind: str, make_trial: Any) -> None:
    model, _ = tiny_model(kind)
    before = {name: module.weight.detach().clone() for name, module in linears(model)}
    untouched = prune.prove_effect(model=model, trial=make_trial("prune", prune.PruneOptions()))
    trial = pruned(model, make_trial, method="magnitude", share=0.5)
    for name, module in linears(model):
        order = before[name].abs().flatten().argsort()
        expected = before[name].flatten().clone()
        expected[order[: len(order) // 2]] = 0
        assert torch.equal(module.weight.flatten(), expected), name
    facts = prune.prove_effect(model=model, trial=trial)
    assert facts["zero_share"] == 0.5 and untouched["zero_share"] == 0.0
    assert facts["parameters"] == facts["parameters_before"] == untouched["parameters"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_wanda_weighs_by_inputs_within_each_output(kind: str, make_trial: Any) -> None:
    """Against the definition, |W| · ‖x‖ a row, with inputs collected by a hook of the test's own on a float64 copy."""
    model, _ = tiny_model(kind)
    reference, inputs, texts = copy.deepcopy(model).double(), {}, ragged_prompts((12, 20))
    names = [name for name, _ in linears(model)]
    for name in names:
        reference.get_submodule(name).register_forward_hook(lambda _, args, __, name=name: inputs.setdefault(name, []).append(args[0][0]))
    for text in texts:
        reference(input_ids=torch.tensor([text]))
    pruned(model, make_trial, texts, method="wanda", share=0.25)
    agreeing = total = 0
    for name in names:
        weight, after = (prune.by_outputs(each.get_submodule(name)) for each in (reference, model))
        scores = weight.abs() * torch.cat(inputs[name]).norm(dim=0)
        dropped = torch.zeros_like(weight, dtype=torch.bool)
        dropped.scatter_(1, scores.argsort(dim=1)[:, : weight.shape[1] // 4], True)
        agreeing += int(((after == 0) == dropped).sum())
        total += weight.numel()
    assert agreeing / total > 0.9999  # two scores may change places in float32


def test_activations_choose_better_channels_than_weights(make_trial: Any) -> None:
    """A channel with large weights whose input never fires must go first when the text says so."""
    model, _ = tiny_model("opt")
    for mlp in prune.mlps(model):
        mlp.first[0].bias.data[:64] = -1e3  # ReLU never opens
        mlp.first[0].weight.data[:64] *= 10
    before = logits(model)
    errors = []
    for texts in (None, IDS.tolist()):
        changed = copy.deepcopy(model)
        pruned(changed, make_trial, texts, share=0.5)
        errors.append(float((logits(changed) - before).norm() / before.norm()))
    assert errors[1] < 1e-5 < 0.1 < errors[0]


def test_refusals_name_the_cause_and_the_way_out(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    with pytest.raises(UsageError, match="set prune.multiple to 8"):
        pruned(model, make_trial, share=0.1)
    with pytest.raises(UsageError, match="needs calibration text"):
        pruned(model, make_trial, method="wanda")
    model.model.layers[0].mlp.middle_norm = torch.nn.LayerNorm(128)
    with pytest.raises(UsageError, match="middle_norm"):
        pruned(model, make_trial, share=0.5)
    model, _ = tiny_model("llama")
    prune.shrink(model.model.layers[0].mlp.down_proj, torch.arange(96), dim=1)
    with pytest.raises(UsageError, match=r"widths \[96, 128\]"):
        pruned(model, make_trial, share=0.5)


def test_mixtures_are_refused(make_trial: Any) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        num_local_experts=2, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with pytest.raises(UsageError, match="experts of a mixture"):
        pruned(AutoModelForCausalLM.from_config(config), make_trial, share=0.5)


def test_the_plan_says_that_zeros_bring_no_speed() -> None:
    assert "no speed" in prune.configure(options=prune.PruneOptions(method="magnitude")).notes[0]
    assert prune.configure(options=prune.PruneOptions()).adds == {"architecture-changed"}


@pytest.mark.parametrize("wrong", [{"share": 0}, {"share": 1}, {"method": "random"}, {"multiple": 0}])
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="prune|PruneOptions"):
        prune.PruneOptions(**wrong)


def test_the_plan_carries_it_out() -> None:
    import optkit

    model, tokenizer = tiny_model("llama")
    optimized = optkit.optimize(model, tokenizer, plugins=["prune"], set={"prune.share": 0.5})
    assert optimized.model.config.intermediate_size == 64
    assert optimized.proof()["prune"]["facts"]["width"] == 64
    assert len(optimized.engine.generate(ragged_prompts(), new_tokens=3, exact=True)) == 4
    optimized.close()
