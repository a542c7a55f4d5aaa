"""flash: the same attention by another kernel, chosen by measurement, and "no effect" where torch already has it."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from optkit import UnavailableError  # noqa: E402
from optkit.machine import detect  # noqa: E402
from optkit_plugins import flash  # noqa: E402
from tests.plugins.tiny import plain_greedy, ragged_prompts, tiny_model  # noqa: E402

CPU = dataclasses.replace(detect(), device="cpu")
T4 = dataclasses.replace(CPU, device="cuda", name="Tesla T4", compute_capability=(7, 5))


def applied(model, make_trial, backend, task="generate"):
    trial = make_trial("flash", flash.FlashOptions(backend=backend), task=task, machine=CPU)
    flash.transform_model(model=model, trial=trial)
    return trial


def kernels_of(model):
    """Operators that a profiler sees in one forward pass."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    return {event.key: event.count for event in seen.key_averages()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_another_backend_changes_no_greedy_token(kind, make_trial):
    model, _ = tiny_model(kind)
    prompts = ragged_prompts((5, 9))
    expected = plain_greedy(model, prompts, 8)
    trial = applied(model, make_trial, "math")
    assert model.config._attn_implementation == "optkit_sdpa_math"
    assert plain_greedy(model, prompts, 8) == expected
    trial.kernels = kernels_of(model)
    assert flash.prove_effect(model=model, trial=trial)["kernels"] == ["math"]


def test_attention_equals_the_softmax_formula(make_trial):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 12, 16).unbind()
    scores = (query.double() @ key.double().transpose(-1, -2)) / 4
    scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf"))
    expected = scores.softmax(-1) @ value.double()
    for backend in ("sdpa", "flash", "math"):
        assert torch.allclose(flash.attention_of(backend)(query, key, value, True).double(), expected, atol=1e-5)


def test_a_padded_batch_keeps_its_mask(make_trial):
    model, _ = tiny_model("llama")
    ids, mask = torch.tensor([[2, 2, 7, 8], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        applied(model, make_trial, "flash")
        assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()], atol=1e-5)


def test_the_default_is_kept_where_it_wins_and_that_is_no_effect(make_trial):
    model, _ = tiny_model("llama")
    trial = applied(model, make_trial, "sdpa")
    trial.kernels = kernels_of(model)
    assert set(flash.prove_effect(model=model, trial=trial)) == {"summary"}  # no fact to differ from the baseline's
    untouched = make_trial("flash", flash.FlashOptions(), machine=CPU)
    untouched.kernels = trial.kernels
    assert flash.prove_effect(model=model, trial=untouched)["kernels"] == ["flash"]


def test_the_same_kernel_under_another_name_gives_the_baselines_facts(make_trial):
    model, _ = tiny_model("llama")
    baseline = make_trial("flash", flash.FlashOptions(), machine=CPU)
    baseline.kernels = kernels_of(model)
    before = flash.prove_effect(model=model, trial=baseline)
    trial = applied(model, make_trial, "flash")
    trial.kernels = kernels_of(model)
    after = flash.prove_effect(model=model, trial=trial)
    assert {k: v for k, v in after.items() if k != "summary"} == {k: v for k, v in before.items() if k != "summary"}


def test_auto_measures_what_this_device_has(make_trial):
    model, _ = tiny_model("llama")
    trial = applied(model, make_trial, "auto")
    assert set(trial.notes["milliseconds"]) == {"sdpa", "flash", "math"}
    assert trial.notes["backend"] in trial.notes["milliseconds"]


def test_a_candidate_must_win_clearly():
    assert flash.fastest({"sdpa": 1.0, "math": 0.95}) == "sdpa"
    assert flash.fastest({"sdpa": 1.0, "cudnn": 0.6, "math": 0.7}) == "cudnn"


def test_soft_capped_scores_are_refused(make_trial):
    model, _ = tiny_model("gemma2")
    with pytest.raises(UnavailableError, match="soft-caps.*leave out flash"):
        applied(model, make_trial, "math")


def test_what_a_machine_lacks_is_said_with_the_way_out():
    assert "NVIDIA GPU" in flash.what_is_missing("cudnn", CPU)
    assert "8.0" in flash.what_is_missing("flash_attention_2", T4)
    newer = dataclasses.replace(T4, compute_capability=(9, 0))
    if flash.find_spec("flash_attn") is None:
        assert "optkit[flash]" in flash.what_is_missing("flash_attention_2", newer)
    assert flash.what_is_missing("auto", CPU) is None
    with pytest.raises(ValueError, match="backend"):
        flash.FlashOptions(backend="fast")
