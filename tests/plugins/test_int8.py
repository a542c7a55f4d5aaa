"""INT8 against its definition, computed in float64: one scale a row (or group), and for ``dynamic`` one a token."""

from __future__ import annotations

import importlib
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from optkit.machine import detect
from tests.plugins.tiny import tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")

MODES = ("weight-only", "dynamic")


def plugin() -> Any:
    return importlib.import_module("optkit_plugins.int8")


def apply(model: Any, make_trial: Any, **options: Any) -> Any:
    trial = make_trial("int8", plugin().technique.options(**options))
    assert plugin().transform_model(model=model, trial=trial) is None, "changed in place"
    return trial


def weights(model: Any) -> dict[str, Any]:
    """Name -> weight (out × in, float64) of every linear layer that is no tied head."""
    from optkit.modules import as_linear, linears

    return {name: as_linear(module).weight.detach().double() for name, module in linears(model, min_parameters=0, head=True)}


def rounded(values: Any) -> tuple[Any, Any]:
    """Integers of -128 to 127 and the scale of each row: the largest magnitude lies at 127.5."""
    scale = values.abs().amax(-1, keepdim=True) / 127.5
    return (values / scale).round().clamp(-128, 127), scale


def assert_rounded(seen: Any, values: Any) -> None:
    """``seen`` are the values on their grid; one halfway between two integers (each row's largest is) may go either way."""
    integers, scale = rounded(values)
    steps = values / scale
    halfway = (steps - steps.floor() - 0.5).abs() < 1e-3
    off = seen / scale - integers
    assert off[~halfway].abs().max() < 1e-3
    assert off[halfway].abs().max() < 1 + 1e-3 and halfway.double().mean() < 0.05


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "opt", "gpt_neox"])
def test_every_layer_multiplies_with_rounded_weights(kind: str, make_trial: Any) -> None:
    model, _ = tiny_model(kind)
    before = weights(model)
    facts = plugin().prove_effect(model=model, trial=apply(model, make_trial))
    wanted = {name for name in before if "head" not in name and "embed_out" not in name}
    assert facts["linears_quantized"] == len(wanted) and facts["mode"] == "weight-only"
    for name in wanted:
        layer = model.get_submodule(name)
        with torch.inference_mode():
            seen = layer(torch.eye(layer.in_features))
        seen = (seen - layer.bias if layer.bias is not None else seen).T.double()
        assert_rounded(seen, before[name])


def test_a_group_has_a_scale_of_its_own(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    name = "model.layers.0.mlp.down_proj"
    before = weights(model)[name]
    apply(model, make_trial, group=32)
    layer = model.get_submodule(name)
    with torch.inference_mode():
        seen = layer(torch.eye(layer.in_features)).T.double()
    assert_rounded(seen.reshape(64, 4, 32), before.reshape(64, 4, 32))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dynamic_multiplies_integers(kind: str, make_trial: Any) -> None:
    model, _ = tiny_model(kind)
    before = weights(model)
    facts = plugin().prove_effect(model=model, trial=apply(model, make_trial, mode="dynamic"))
    assert facts["mode"] == "dynamic"
    torch.manual_seed(0)
    for name in list(before)[:4]:
        layer = model.get_submodule(name)
        tokens = torch.randn(2, 5, layer.in_features)
        with torch.inference_mode():
            seen = layer(tokens).double()
        (weight, row), (token, column) = rounded(before[name]), rounded(tokens.double())
        expected = (token @ weight.T) * column * row.T + (layer.bias.double() if layer.bias is not None else 0)
        # A value on the edge between two integers may fall either way in float32: one step of one input at most.
        step = (column * before[name].abs().max()).max()
        assert (seen - expected).abs().max() <= step
        assert (seen - expected).abs().median() < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_logits_stay_within_the_error_of_eight_bits(mode: str, make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        plain = model(ids, use_cache=False).logits.double()
        apply(model, make_trial, mode=mode)
        error = model(ids, use_cache=False).logits.double() - plain
    assert 0 < error.pow(2).mean() < (0.05 if mode == "weight-only" else 0.1) ** 2 * plain.var()


def test_proof_counts_bytes_and_says_nothing_of_an_untouched_model(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    untouched = plugin().prove_effect(model=model, trial=make_trial("int8", plugin().technique.options()))
    assert untouched["linears_quantized"] == 0 and untouched["bytes_stored"] == untouched["bytes_full_precision"]
    rows = {name: weight.shape[0] for name, weight in weights(model).items() if name != "lm_head"}
    values = sum(weight.numel() for name, weight in weights(model).items() if name != "lm_head")
    facts = plugin().prove_effect(model=model, trial=apply(model, make_trial))
    scale_and_zero_point = 4 + 1
    assert untouched["bytes_stored"] - facts["bytes_stored"] == 3 * values - scale_and_zero_point * sum(rows.values())
    assert facts["bytes_full_precision"] == untouched["bytes_stored"]
    assert facts["summary"].startswith("14 of 15 linears")


def test_a_width_that_the_group_does_not_divide_is_left_with_the_reason(make_trial: Any) -> None:
    model, _ = tiny_model("llama", intermediate_size=172, num_hidden_layers=1)
    facts = plugin().prove_effect(model=model, trial=apply(model, make_trial, group=32))
    assert list(facts["left_in_full_precision"]) == ["model.layers.0.mlp.down_proj"]
    assert "172 is not divided by the group of 32" in facts["left_in_full_precision"]["model.layers.0.mlp.down_proj"]


def test_options_choose_the_layers(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    apply(model, make_trial, head=True, skip=("*.layers.0.*",))
    names = {name for name, _ in plugin().int8_layers(model)}
    assert "lm_head" in names and len(names) == 8 and not any("layers.0." in name for name in names)


@pytest.mark.parametrize(
    "options", [{"mode": "static"}, {"group": 4}, {"group": 64, "mode": "dynamic"}, {"groups": 64}, {"kernel": "triton", "group": 64}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        plugin().technique.options(**options)


def test_training_needs_an_adapter() -> None:
    options = plugin().technique.options()
    assert plugin().configure(options=options, task="train", machine=detect()).needs == {"adapter"}
    assert not plugin().configure(options=options, task="score", machine=detect()).needs


def test_a_quantized_model_can_be_sent_to_another_process(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    apply(model, make_trial)
    layers = dict(plugin().int8_layers(model))
    assert layers
    for layer in layers.values():
        again = pickle.loads(pickle.dumps(layer))
        assert torch.equal(again.weight.qdata, layer.weight.qdata) and torch.equal(again.weight.scale, layer.weight.scale)


def test_a_quantized_model_is_refused(make_trial: Any) -> None:
    from optkit import UsageError

    model, _ = tiny_model("llama")
    apply(model, make_trial)
    with pytest.raises(UsageError, match="quantized already.*torchao"):
        apply(model, make_trial)


@pytest.mark.filterwarnings("ignore:Stored version is not the same:UserWarning")  # torchao 0.17, reading what it wrote
@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("qwen2", {"mode": "dynamic"}), ("llama", {"group": 32, "head": True})])
def test_the_saved_folder_loads_with_the_same_logits(kind: str, options: dict[str, Any], make_trial: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = tiny_model(kind)
    apply(model, make_trial, **options)
    assert plugin().save_model(model=model) is None, "transformers saves it"
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    assert len(dict(plugin().int8_layers(loaded))) == len(dict(plugin().int8_layers(model)))
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_fused_kernels_layers_are_told_and_saved_as_torchaos(make_trial: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from optkit_plugins.kernels.packed.linear import WeightOnlyLinear

    library, _ = tiny_model("llama", hidden_size=128, num_hidden_layers=1, intermediate_size=160)
    model, _ = tiny_model("llama", hidden_size=128, num_hidden_layers=1, intermediate_size=160)
    apply(library, make_trial)
    trial = apply(model, make_trial, kernel="triton")
    facts = plugin().prove_effect(model=model, trial=trial)
    assert facts["linears_quantized"] == 7 and facts["mode"] == "weight-only"
    assert facts["kernel"] == "optkit's fused kernel in 6 layers" and facts["fused_formats"] == ["int8, group 128"]
    assert list(facts["layers_left_with_the_library"]) == ["model.layers.0.mlp.down_proj"], "160 is no multiple of 64"
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = library(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected)
    assert "save_pretrained" not in vars(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Stored version is not the same")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, expected)
    assert not any(isinstance(module, WeightOnlyLinear) for module in model.modules())


def test_gpt2_is_not_saved_in_a_form_that_nothing_reads(make_trial: Any, tmp_path: Path) -> None:
    from optkit import UsageError

    model, _ = tiny_model("gpt2")
    apply(model, make_trial)
    with pytest.raises(UsageError, match="Conv1D"):
        plugin().save_model(model=model)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("mode", MODES)
def test_it_compiles_without_a_graph_break(mode: str, make_trial: Any) -> None:
    model, _ = tiny_model("qwen2", num_hidden_layers=1)
    apply(model, make_trial, mode=mode)
    ids = torch.arange(3, 40)[None]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    torch._dynamo.reset()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_inductor_computes_the_same(mode: str, make_trial: Any) -> None:
    model, _ = tiny_model("llama", num_hidden_layers=1)
    apply(model, make_trial, mode=mode)
    mlp = model.model.layers[0].mlp
    tokens = torch.randn(1, 8, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(mlp)(tokens), mlp(tokens), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_the_whole_line_generates_scores_and_proves() -> None:
    import optkit

    model, tokenizer = tiny_model("gpt2")
    optimized = optkit.optimize(model, tokenizer, plugins=["int8"])
    assert len(optimized.generate([[5, 6, 7]], new_tokens=4)[0]) <= 4
    assert torch.isfinite(optimized.score([[5, 6, 7, 8]])[0]).all()
    proof = optimized.proof()["int8"]
    assert proof["verdict"] == "active" and proof["facts"]["linears_quantized"] == 8
