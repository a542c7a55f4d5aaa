"""NF4 against its definition: the 16 values of the paper, one scale a block, computed here in float64."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.tiny import tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

#: QLoRA, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: One sign, two exponent bits, one mantissa bit; divided by the largest (12), as bitsandbytes documents its FP4.
FP4 = tuple(sorted({sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)}))
VALUES = {"nf4": NF4, "fp4": FP4}


def plugin(name: str) -> Any:
    return importlib.import_module(f"optkit_plugins.{name}")


def by_definition(weight: Any, blocksize: int, values: tuple[float, ...]) -> Any:
    """Each block of the flattened weight, divided by its largest magnitude, rounded to the nearest value; float64."""
    flat = weight.double().reshape(-1)
    table = torch.tensor(values, dtype=torch.float64)
    blocks = []
    for block in flat.split(blocksize):
        scale = block.abs().max()
        nearest = (block[:, None] / scale - table).abs().argmin(1)
        blocks.append(table[nearest] * scale)
    return torch.cat(blocks).reshape(weight.shape)


def weights(model: Any) -> dict[str, Any]:
    """Name -> weight (out × in) of every linear layer that is no tied head."""
    from optkit.modules import as_linear, linears

    return {name: as_linear(module).weight.detach().clone() for name, module in linears(model, min_parameters=0, head=True)}


def seen_weight(layer: Any) -> Any:
    """The weight (out × in) that a layer really multiplies with, through its forward pass."""
    with torch.inference_mode():
        rows = layer(torch.eye(layer.in_features))
    return (rows - layer.bias if layer.bias is not None else rows).T


def apply(name: str, model: Any, make_trial: Any, **options: Any) -> Any:
    technique = plugin(name)
    trial = make_trial(name, technique.technique.options(**options))
    result = technique.transform_model(model=model, trial=trial)
    assert result is None, "changed in place"
    return trial


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "opt", "gpt_neox"])
def test_every_layer_multiplies_with_the_weights_of_the_definition(name: str, kind: str, make_trial: Any) -> None:
    model, _ = tiny_model(kind)
    before = weights(model)
    trial = apply(name, model, make_trial)
    facts = plugin(name).prove_effect(model=model, trial=trial)
    head = [layer for layer in before if "head" in layer or "embed_out" in layer]
    assert facts["linears_quantized"] == len(before) - len(head)
    for layer in set(before) - set(head):
        expected = by_definition(before[layer], 64, VALUES[name])
        torch.testing.assert_close(seen_weight(model.get_submodule(layer)).double(), expected, rtol=1e-5, atol=1e-6)


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
    assert technique.configure(options=technique.technique.options(), task="train").needs == {"adapter"}
    claims = technique.configure(options=technique.technique.options(), task="generate")
    assert not claims.needs and claims.weight_bits == 4.5


def test_a_quantized_model_is_refused(make_trial: Any) -> None:
    from optkit import UsageError

    model, _ = tiny_model("llama")
    apply("nf4", model, make_trial)
    with pytest.raises(UsageError, match="quantized already.*leave fp4 out"):
        apply("fp4", model, make_trial)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_saved_folder_loads_with_the_same_logits(kind: str, double_quant: bool, make_trial: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = tiny_model(kind)
    apply("nf4", model, make_trial, double_quant=double_quant, skip=("*0*fc1",))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else bitsandbytes computes in bfloat16 on some CPUs
    ids = torch.arange(3, 40)[None]
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_names_that_are_prefixes_of_quantized_layers_are_anchored() -> None:
    from optkit_plugins._bitsandbytes import skip_list
    from transformers.quantizers.quantizers_utils import should_convert_module

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
    asked = tmp_path / "asked"
    (tmp_path / "kernels.py").write_text(f"def get_kernel(*a, **k):\n    open({str(asked)!r}, 'w').close()\n    raise OSError('no network')\n")
    code = (
        "import torch, sys, types\n"
        "torch.cpu._is_avx512_bf16_supported = lambda: True\n"
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


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_whole_line_generates_scores_and_proves(name: str) -> None:
    import optkit

    model, tokenizer = tiny_model("llama")
    optimized = optkit.optimize(model, tokenizer, plugins=[name], set={f"{name}.blocksize": 32})
    assert len(optimized.generate([[5, 6, 7]], new_tokens=4)[0]) <= 4
    assert torch.isfinite(optimized.score([[5, 6, 7, 8]])[0]).all()
    proof = optimized.proof()[name]
    assert proof["verdict"] == "active" and proof["facts"]["blocksizes"] == {"32": 14}
