"""FP4 against its definition: 15 values of a 4-bit float, one scale a block. What it shares with NF4 is tested there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.plugins.four_bit import check_every_layer, check_saved_folder, plugin, torch
from tests.plugins.tiny import tiny_model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_every_layer_multiplies_with_the_weights_of_the_definition(kind: str, make_trial: Any) -> None:
    check_every_layer("fp4", kind, make_trial)


def test_the_saved_folder_loads_with_the_same_logits(make_trial: Any, tmp_path: Path) -> None:
    check_saved_folder("fp4", "llama", make_trial, tmp_path / "saved")


def test_an_untouched_model_shows_no_effect(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    technique = plugin("fp4")
    facts = technique.prove_effect(model=model, trial=make_trial("fp4", technique.technique.options()))
    assert facts["linears_quantized"] == 0 and facts["bytes_stored"] == facts["bytes_full_precision"]


def test_the_whole_line_generates_scores_and_proves() -> None:
    import optkit

    model, tokenizer = tiny_model("gpt2")
    optimized = optkit.optimize(model, tokenizer, plugins=["fp4"])
    assert len(optimized.generate([[5, 6, 7]], new_tokens=4)[0]) <= 4
    assert torch.isfinite(optimized.score([[5, 6, 7, 8]])[0]).all()
    proof = optimized.proof()["fp4"]
    assert proof["verdict"] == "active" and proof["facts"]["linears_quantized"] == 8
