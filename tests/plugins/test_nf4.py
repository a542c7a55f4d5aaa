"""NF4 against its definition: the 16 values of the paper, one scale a block, computed here in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optkit.machine import detect
from tests.plugins.four_bit import NF4, apply, by_definition, check_every_layer, check_saved_folder, plugin, seen_weight, torch, weights
from tests.plugins.tiny import tiny_model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "opt", "gpt_neox"])
def test_every_layer_multiplies_with_the_weights_of_the_definition(kind: str, make_trial: Any) -> None:
    check_every_layer("nf4", kind, make_trial)


@pytest.mark.parametrize("width", [44, 48, 64, 80, 96, 172, 192])
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_widths_that_a_block_does_not_divide_are_right_or_left_alone(width: int, blocksize: int, make_trial: Any) -> None:
    """bitsandbytes 0.50 on AVX512 takes scales of the wrong block for widths such as 96 with blocks of 64."""
    model, _ = tiny_model("llama", intermediate_size=width, num_hidden_layers=1)
    before = weights(model)
    trial = apply("nf4", model, make_trial, blocksize=blocksize)
    facts = plugin("nf4").prove_effect(model=model, trial=trial)
    left = facts.get("left_in_full_precision", {})
    assert facts["linears_quantized"] + len(left) == 7
    assert all("down_proj" in layer for layer in left), "widths of 64 always fit"
    if width % 32 == 0:
        assert not left
    for layer in set(before) - set(left) - {"lm_head"}:
        module = model.get_submodule(layer)
        expected = by_definition(before[layer], module.weight.quant_state.blocksize, NF4)
        torch.testing.assert_close(seen_weight(module).double(), expected, rtol=1e-5, atol=1e-6)


def test_an_odd_width_is_left_alone_with_the_reason(make_trial: Any) -> None:
    model, _ = tiny_model("llama", intermediate_size=43, num_hidden_layers=1)
    trial = apply("nf4", model, make_trial)
    left = plugin("nf4").prove_effect(model=model, trial=trial)["left_in_full_precision"]
    assert list(left) == ["model.layers.0.mlp.down_proj"] and "odd input width 43" in left["model.layers.0.mlp.down_proj"]


def test_double_quantization_costs_less_memory_and_little_exactness(make_trial: Any) -> None:
    single, _ = tiny_model("llama", hidden_size=256, intermediate_size=512)
    double, _ = tiny_model("llama", hidden_size=256, intermediate_size=512)
    before = weights(single)
    facts = [
        plugin("nf4").prove_effect(model=model, trial=apply("nf4", model, make_trial, double_quant=option))
        for model, option in ((single, False), (double, True))
    ]
    assert facts[1]["bytes_stored"] < facts[0]["bytes_stored"]
    layer = "model.layers.0.mlp.down_proj"
    expected = by_definition(before[layer], 64, NF4)
    worst = (seen_weight(double.get_submodule(layer)).double() - expected).abs().max()
    assert 0 < worst < 0.05 * before[layer].abs().max()


def test_error_is_smaller_than_fp4s_on_normal_weights(make_trial: Any) -> None:
    errors = {}
    for name in ("nf4", "fp4"):
        model, _ = tiny_model("llama")
        before = weights(model)
        apply(name, model, make_trial)
        layer = "model.layers.0.mlp.up_proj"
        errors[name] = float((seen_weight(model.get_submodule(layer)) - before[layer]).pow(2).mean())
    assert 0 < errors["nf4"] < errors["fp4"]


def test_proof_counts_layers_and_bytes_and_says_nothing_of_an_untouched_model(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    technique = plugin("nf4")
    untouched = technique.prove_effect(model=model, trial=make_trial("nf4", technique.technique.options()))
    assert untouched["linears_quantized"] == 0 and untouched["bytes_stored"] == untouched["bytes_full_precision"]
    facts = technique.prove_effect(model=model, trial=apply("nf4", model, make_trial))
    values = sum(weight.numel() for name, weight in weights(tiny_model("llama")[0]).items() if name != "lm_head")
    saved = untouched["bytes_stored"] - facts["bytes_stored"]
    code_tables = 14 * 16 * 4
    assert saved == values * 4 - (values // 2 + values // 64 * 4 + code_tables)
    assert facts["bytes_full_precision"] == untouched["bytes_stored"]
    assert facts["quantized_share_of_parameter_bytes"] == pytest.approx(values * 4 / untouched["bytes_stored"], abs=1e-4)
    assert facts["summary"].startswith("14 of 15 linears")


def test_options_choose_the_layers(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    apply("nf4", model, make_trial, head=True, skip=("*.layers.0.*", "*down_proj"))
    from bitsandbytes.nn import Linear4bit

    packed = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert "lm_head" in packed and len(packed) == 7
    assert not any("layers.0." in name or name.endswith("down_proj") for name in packed)


def test_a_tied_head_stays_tied(make_trial: Any) -> None:
    model, _ = tiny_model("llama", tie_word_embeddings=True)
    apply("nf4", model, make_trial, head=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_experts_that_stay_are_told_with_their_share(make_trial: Any) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    facts = plugin("nf4").prove_effect(model=model, trial=apply("nf4", model, make_trial))
    assert facts["experts_share_of_parameter_bytes"] > 0.5
    assert "experts stay in full precision" in facts["summary"]


@pytest.mark.parametrize("options", [{"blocksize": 48}, {"compute_dtype": "int8"}, {"min_parameters": -1}, {"block_size": 64}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        plugin("nf4").technique.options(**options)


def test_training_needs_an_adapter() -> None:
    technique = plugin("nf4")
    assert technique.configure(options=technique.technique.options(), task="train", machine=detect()).needs == {"adapter"}
    claims = technique.configure(options=technique.technique.options(), task="generate", machine=detect())
    assert not claims.needs and claims.weight_bits == 4.5


GPU = replace(detect(), device="cuda", compute_capability=(9, 0))


@pytest.mark.parametrize(
    ("options", "task", "machine", "message"),
    [
        ({}, "generate", replace(GPU, compute_capability=(7, 5)), "from sm_80 on; use kernel=library"),
        ({}, "train", GPU, "no backward pass; use kernel=library"),
        ({"double_quant": True}, "generate", GPU, "leave out double_quant"),
    ],
)
def test_the_fused_kernel_is_refused_where_it_cannot_run(options: dict[str, Any], task: str, machine: Any, message: str) -> None:
    technique = plugin("nf4")
    claims = technique.configure(options=technique.technique.options(kernel="triton", **options), task=task, machine=machine)
    assert message in claims.problem


def test_auto_takes_the_fused_kernel_where_a_gpu_generates() -> None:
    from optkit_plugins._fused_kernels import wanted

    cpu = replace(GPU, device="cpu", compute_capability=None)
    assert wanted("auto", "generate", GPU) and wanted("triton", "score", GPU)
    assert not any(wanted("auto", *case) for case in (("score", GPU), ("train", GPU), ("generate", cpu), ("generate", None)))
    assert not wanted("library", "generate", GPU)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, "16 bits, not float32"), ({"double_quant": True}, "double_quant"), ({"compute_dtype": "bfloat16"}, "compute_dtype is bfloat16")],
)
def test_auto_says_why_the_library_multiplies(
    options: dict[str, Any], reason: str, make_trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optkit_plugins.kernels.packed.linear.has_triton", lambda: True)
    model, _ = tiny_model("llama")
    technique = plugin("nf4")
    trial = make_trial("nf4", technique.technique.options(**options), machine=GPU)
    technique.transform_model(model=model, trial=trial)
    assert reason in technique.prove_effect(model=model, trial=trial)["kernel"]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_fused_kernels_layers_are_told_and_saved_as_bitsandbytes(name: str, make_trial: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sizes: dict[str, Any] = {"intermediate_size": 160, "num_hidden_layers": 1}
    library, model = tiny_model("qwen2", **sizes)[0], tiny_model("qwen2", **sizes)[0]
    apply(name, library, make_trial)
    trial = apply(name, model, make_trial, kernel="triton")
    trial.kernels = {"weight_only_product_0d1d": 12}
    facts = plugin(name).prove_effect(model=model, trial=trial)
    assert facts["kernel"] == "optkit's fused kernel in 6 layers" and facts["fused_formats"] == [f"{name}, group 64"]
    assert facts["linears_quantized"] == 7 and facts["fused_kernel_calls"] == 12
    assert "no multiple of 64" in facts["layers_left_with_the_library"]["model.layers.0.mlp.down_proj"]
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = library(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    plugin(name).save_model(model=model)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, expected)


def test_a_quantized_model_is_refused(make_trial: Any) -> None:
    from optkit import UsageError

    model, _ = tiny_model("llama")
    apply("nf4", model, make_trial)
    with pytest.raises(UsageError, match="quantized already.*leave fp4 out"):
        apply("fp4", model, make_trial)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_saved_folder_loads_with_the_same_logits(kind: str, double_quant: bool, make_trial: Any, tmp_path: Path) -> None:
    check_saved_folder("nf4", kind, make_trial, tmp_path / "saved", double_quant=double_quant, skip=("*0*fc1",))


def test_names_that_are_prefixes_of_quantized_layers_are_anchored() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    from optkit_plugins._bitsandbytes import skip_list

    plain, packed = ["h.0.fc", "lm_head"], ["h.0.fc2", "h.1.fc"]
    skipped = skip_list(plain, packed)
    assert all(should_convert_module(name, skipped) for name in packed)
    assert not any(should_convert_module(name, skipped) for name in plain)


def test_it_compiles_without_a_graph_break(make_trial: Any) -> None:
    model, _ = tiny_model("qwen2", num_hidden_layers=1)
    apply("nf4", model, make_trial)
    ids = torch.arange(3, 40)[None]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    torch._dynamo.reset()


def test_peft_takes_its_4_bit_path(make_trial: Any) -> None:
    peft = pytest.importorskip("peft")
    model, _ = tiny_model("llama")
    apply("nf4", model, make_trial)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    kinds = {type(module).__name__ for name, module in adapted.named_modules() if name.endswith("q_proj")}
    assert kinds == {"Linear4bit"} and model.is_loaded_in_4bit


def test_importing_bitsandbytes_asks_the_hub_for_nothing(tmp_path: Path) -> None:
    """A stand-in for the package through which bitsandbytes downloads a kernel notes whether it was asked."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes looks for that kernel on CPUs with AVX512-BF16 only")
    asked = tmp_path / "asked"
    body = f"    open({str(asked)!r}, 'w').close()\n    raise OSError('no network')\n"
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n" + body)
    code = (
        "from optkit_plugins._bitsandbytes import load_bitsandbytes\n"
        "load_bitsandbytes()\n"
        "import kernels; print(kernels.get_kernel.__name__)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "get_kernel", "the package is there again afterwards"
    assert not asked.exists()
    assert "gemm_4bit_forward" not in run.stderr


def test_the_whole_line_generates_scores_and_proves() -> None:
    import optkit

    model, tokenizer = tiny_model("llama")
    optimized = optkit.optimize(model, tokenizer, plugins=["nf4"], set={"nf4.blocksize": 32})
    assert len(optimized.generate([[5, 6, 7]], new_tokens=4)[0]) <= 4
    assert torch.isfinite(optimized.score([[5, 6, 7, 8]])[0]).all()
    proof = optimized.proof()["nf4"]
    assert proof["verdict"] == "active" and proof["facts"]["blocksizes"] == {"32": 14}
