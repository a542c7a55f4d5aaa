"""precision: the dtype and its reason by hardware, and bytes as proof."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from optkit.machine import detect  # noqa: E402
from optkit_plugins import precision  # noqa: E402
from tests.plugins.tiny import tiny_model  # noqa: E402

CPU = dataclasses.replace(detect(), device="cpu", cpu_features=("avx2",))
GPU = dataclasses.replace(CPU, device="cuda", name="a GPU", compute_capability=(9, 0))


@pytest.mark.parametrize(
    ("machine", "dtype", "reason"),
    [
        (GPU, "bfloat16", "9.0"),
        (dataclasses.replace(GPU, compute_capability=(7, 5)), "float16", "7.5"),
        (dataclasses.replace(GPU, compute_capability=(6, 1)), "float32", "no tensor cores"),
        (dataclasses.replace(CPU, cpu_features=("avx2", "avx512_bf16")), "bfloat16", "avx512_bf16"),
        (dataclasses.replace(CPU, cpu_features=("amx_bf16",)), "bfloat16", "amx_bf16"),
        (CPU, "float32", "neither avx512_bf16 nor amx_bf16"),
    ],
)
def test_auto_is_by_hardware_and_says_why(machine, dtype, reason):
    (setting,) = precision.configure(options=precision.PrecisionOptions(), task="score", machine=machine).settings
    assert (setting.name, setting.value, setting.strength) == ("load.dtype", dtype, "must")
    assert reason in setting.because


def test_what_the_hardware_lacks_is_refused_with_the_way_out():
    t4 = dataclasses.replace(GPU, name="Tesla T4", compute_capability=(7, 5))
    claims = precision.configure(options=precision.PrecisionOptions(dtype="bfloat16"), task="score", machine=t4)
    assert "precision.dtype=float16" in claims.problem
    claims = precision.configure(options=precision.PrecisionOptions(tf32=True), task="score", machine=CPU)
    assert "precision.tf32=false" in claims.problem
    with pytest.raises(ValueError, match="dtype"):
        precision.PrecisionOptions(dtype="int8")


def test_a_model_that_somebody_holds_is_converted_and_proven(make_trial):
    model, _ = tiny_model("llama")
    count = sum(parameter.numel() for parameter in model.parameters())
    untouched = precision.prove_effect(model=model, trial=make_trial("precision", precision.PrecisionOptions()))
    assert untouched["bytes"] == {"float32": 4 * count}
    trial = make_trial("precision", precision.PrecisionOptions(dtype="bfloat16"), {"load.dtype": "bfloat16"})
    precision.transform_model(model=model, trial=trial)
    assert precision.prove_effect(model=model, trial=trial)["bytes"] == {"bfloat16": 2 * count}


def test_float32_on_a_float32_model_is_no_effect(make_trial):
    model, _ = tiny_model("gpt2")
    untouched = precision.prove_effect(model=model, trial=make_trial("precision", precision.PrecisionOptions()))
    trial = make_trial("precision", precision.PrecisionOptions(dtype="float32"), {"load.dtype": "float32"})
    precision.transform_model(model=model, trial=trial)
    model.half()  # a later technique
    assert precision.prove_effect(model=model, trial=trial) == untouched


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_bfloat16_logits_stay_within_its_rounding(kind, make_trial):
    model, _ = tiny_model(kind, spread=2.0)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        exact = model.double()(input_ids=ids).logits
        model.float()
        trial = make_trial("precision", precision.PrecisionOptions(), {"load.dtype": "bfloat16"})
        precision.transform_model(model=model, trial=trial)
        rounded = model(input_ids=ids).logits.double()
    assert (rounded - exact).norm() / exact.norm() < 0.03  # 8 bits of mantissa through two layers
