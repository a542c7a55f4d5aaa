"""kv-cache: static changes no token, quantized stays inside the rounding bound, sliding keeps its window, and proof tells which ran."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from optkit import TransformersEngine, UnavailableError  # noqa: E402
from optkit.machine import detect  # noqa: E402
from optkit_plugins import kv_cache  # noqa: E402
from optkit_plugins.kernels.memory.quantized_cache import Packed, QuantizedBlockCache, value_group  # noqa: E402
from tests.plugins.tiny import plain_greedy, ragged_prompts, tiny_model  # noqa: E402

CPU = dataclasses.replace(detect(), device="cpu")


def engine_of(model, make_trial, **options):
    """The engine that a plan with these options would have, and its trial."""
    chosen = kv_cache.KvCacheOptions(**options)
    claims = kv_cache.configure(options=chosen, task="generate", machine=CPU)
    assert claims.problem is None
    model.generation_config.eos_token_id = None
    trial = make_trial("kv-cache", chosen, {setting.name: setting.value for setting in claims.settings})
    kv_cache.transform_model(model=model, trial=trial)
    engine = TransformersEngine(model, trial)
    trial.engine = kv_cache.wrap_engine(engine=engine, trial=trial) or engine
    return trial.engine, trial


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2"])
def test_a_static_cache_changes_no_greedy_token(kind, make_trial):
    model, _ = tiny_model(kind)
    prompts = ragged_prompts((5, 12, 3))
    expected = plain_greedy(model, prompts, 12)
    engine, trial = engine_of(model, make_trial, kind="static")
    assert engine.generate(prompts, new_tokens=12) == expected
    assert any("Static" in layer for layer in kv_cache.prove_effect(model=model, trial=trial)["layers"])


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dim", [2, 3])
def test_codes_are_within_half_a_step_of_the_values(bits, dim):
    torch.manual_seed(0)
    tensor = torch.randn(2, 3, 32, 16, dtype=torch.float64).float()
    packed = Packed.of(tensor, bits, dim)
    exact = tensor.double()
    step = (exact.amax(dim, keepdim=True) - exact.amin(dim, keepdim=True)) / (2**bits - 1)
    assert ((packed.unpack().double() - exact).abs() <= step * 0.5 + 1e-6).all()
    assert packed.codes.numel() == tensor.numel() * bits // 8
    assert (Packed.of(torch.full((1, 8), 3.5), bits, 1).unpack() == 3.5).all()


def test_a_long_text_is_kept_in_order_and_only_older_tokens_are_rounded():
    model, _ = tiny_model("llama")
    cache, layer = QuantizedBlockCache(model, 8), 0
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 200, 16).unbind()
    first = cache.update(keys[:, :, :70], values[:, :, :70], layer)
    assert torch.equal(first[0], keys[:, :, :70])  # a prompt attends to its exact keys
    for column in range(70, 200):
        seen = cache.update(keys[:, :, column : column + 1], values[:, :, column : column + 1], layer)
    assert cache.get_seq_length() == 200
    assert [part.shape for part in seen] == [keys.shape, values.shape]
    for got, exact in zip(seen, (keys, values), strict=True):
        assert torch.equal(got[:, :, -33:], exact[:, :, -33:])
        assert 0 < (got - exact).abs().max() < 0.03  # a range of about 7 in 255 steps, half a step
    picked = torch.tensor([1, 1, 0])
    cache.reorder_cache(picked)
    again = cache.update(keys[picked][:, :, -1:], values[picked][:, :, -1:], layer)
    assert torch.equal(again[0][:, :, :200], seen[0][picked])


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.2), (2, 1.0)])
def test_logits_after_a_quantized_prompt_stay_near_the_exact_ones(bits, bound):
    model, _ = tiny_model("llama", spread=2.0)
    ids = torch.tensor(ragged_prompts((150,)))
    with torch.no_grad():
        exact = model.double()(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)
        model.float()
        cache = QuantizedBlockCache(model, bits)
        model(input_ids=ids[:, :-1], past_key_values=cache)
        rounded = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1].double().log_softmax(-1)
    divergence = (exact.exp() * (exact - rounded)).sum()
    assert 0 < divergence < bound**2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_runs_on_a_quantized_cache_and_the_proof_shows_fewer_bytes(kind, make_trial):
    model, _ = tiny_model(kind)
    prompts = ragged_prompts((100, 60))
    expected = plain_greedy(model, prompts, 6)
    engine, trial = engine_of(model, make_trial, kind="quantized", bits=8)
    assert engine.generate(prompts, new_tokens=6) == expected  # 8 bits: no token tips over on this model
    facts = kv_cache.prove_effect(model=model, trial=trial)
    baseline_trial = make_trial("kv-cache", kv_cache.KvCacheOptions())
    baseline_trial.engine = TransformersEngine(model, baseline_trial)
    baseline = kv_cache.prove_effect(model=model, trial=baseline_trial)
    assert facts["layers"] == ["QuantizedBlockLayer"]
    assert baseline["layers"] == ["DynamicLayer"]
    assert facts["bytes"] < 0.75 * baseline["bytes"]


def test_beams_follow_their_rows_in_a_quantized_cache(make_trial):
    model, _ = tiny_model("llama")
    engine, trial = engine_of(model, make_trial, kind="quantized", bits=8)
    prompts = ragged_prompts((80,))
    plain = make_trial("kv-cache", kv_cache.KvCacheOptions(), {"generate.num_beams": 3})
    expected = TransformersEngine(model, plain).generate(prompts, new_tokens=6)
    beams = make_trial("kv-cache", trial.options, {"generate.num_beams": 3, "generate.cache": "quantized", "generate.cache_bits": 8})
    engine = kv_cache.wrap_engine(engine=TransformersEngine(model, beams), trial=beams)
    assert engine.generate(prompts, new_tokens=6) == expected


def test_a_sliding_cache_keeps_the_last_tokens_and_changes_nothing_while_all_fit(make_trial):
    model, _ = tiny_model("llama")
    prompts = ragged_prompts((20,))
    expected = plain_greedy(model, prompts, 10)
    wide, _ = engine_of(model, make_trial, kind="sliding", window=64)
    assert wide.generate(prompts, new_tokens=10) == expected
    narrow, trial = engine_of(model, make_trial, kind="sliding", window=4)
    assert narrow.generate(prompts, new_tokens=10) != expected
    facts = kv_cache.prove_effect(model=model, trial=trial)
    assert (facts["layers"], facts["windows"]) == (["DynamicSlidingWindowLayer"], [4])
    per_token = 2 * 2 * 2 * 16 * 4  # layers x (key, value) x heads x size x bytes
    assert facts["bytes"] <= 4 * per_token


def test_layers_with_a_window_of_their_own_are_refused_for_quantizing(make_trial):
    model, _ = tiny_model("gemma2")
    with pytest.raises(UnavailableError, match="sliding_attention.*leave out kv-cache"):
        engine_of(model, make_trial, kind="quantized")


def test_options_are_validated_and_claims_are_musts():
    with pytest.raises(ValueError, match="kind"):
        kv_cache.KvCacheOptions(kind="off")
    with pytest.raises(ValueError, match="bits"):
        kv_cache.KvCacheOptions(bits=3)
    claims = kv_cache.configure(options=kv_cache.KvCacheOptions(kind="sliding", window=64), task="generate", machine=CPU)
    assert {setting.name: (setting.value, setting.strength) for setting in claims.settings} == {
        "generate.cache": ("sliding", "must"),
        "generate.cache_window": (64, "must"),
    }
    offloaded = kv_cache.configure(options=kv_cache.KvCacheOptions(kind="offloaded"), task="generate", machine=CPU)
    assert "leave out kv-cache" in offloaded.problem


def test_a_values_group_divides_its_head():
    assert [value_group(size) for size in (128, 80, 16, 64)] == [64, 16, 16, 64]
