"""gqa: exact where heads are equal up to what attention cannot see, better than plain pooling where they are noisy copies."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from optkit import UsageError
from optkit_plugins import gqa
from optkit_plugins._head_alignment import group
from tests.plugins.tiny import plain_greedy, ragged_prompts, tiny_model

IDS = torch.tensor([[5, 9, 77, 31, 4, 100, 63, 12, 8, 55]])
RATIO = 2


def grouped(kind: str, **overrides: Any) -> Any:
    """A float64 model with 4 KV heads for 8 query heads, with biases and norms that are not trivial."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8} | overrides
    model, _ = tiny_model(kind, **sizes)
    return model.double()


def complex_turns(heads: int, pairs: int, scaled: bool) -> torch.Tensor:
    """Random complex factors (heads, pairs), of unit length unless ``scaled``."""
    angles = torch.randn(heads, pairs, dtype=torch.float64) * 3
    lengths = torch.rand(heads, pairs, dtype=torch.float64) + 0.5 if scaled else torch.ones(heads, pairs, dtype=torch.float64)
    return torch.polar(lengths, angles)


def turn_halves(rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Multiply the pairs (i, i + d/2) of heads (heads, d, columns) by complex ``factors`` (heads, pairs): written out, not borrowed."""
    first, second = rows.chunk(2, dim=1)
    real, imaginary = factors.real[..., None], factors.imag[..., None]
    return torch.cat([real * first - imaginary * second, imaginary * first + real * second], dim=1)


def expand(model: Any, *, keys: str = "turn", noise: float = 0.0, shuffle: bool = True) -> Any:
    """The same function with twice the KV heads: each head copied under random admissible maps, and the heads shuffled.

    :param keys: ``turn`` (rotation and scale a frequency pair), ``sign`` (one sign a pair: all that an uneven head norm admits),
        ``any`` (an invertible map: layers without positions) or ``same``.
    :param noise: relative noise on each copy, which makes the copies unequal.
    """
    torch.manual_seed(1)
    wide = copy.deepcopy(model)
    config = wide.config
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, wide.model.layers[0].self_attn.head_dim
    copies, more = RATIO, kv * RATIO
    for layer in wide.model.layers:
        part = layer.self_attn
        rows = {name: biased(getattr(part, name)).unflatten(0, (-1, dim)) for name in ("q_proj", "k_proj", "v_proj")}
        columns = part.o_proj.weight.data.T.unflatten(0, (-1, dim))
        key, value = (rows[name].repeat_interleave(copies, 0) for name in ("k_proj", "v_proj"))
        per_head = heads // more
        if keys == "turn":
            turns = complex_turns(more, dim // 2, scaled=True)
            key = turn_halves(key, turns)
            query = turn_halves(rows["q_proj"], (1 / turns.conj()).repeat_interleave(per_head, 0))
        elif keys == "sign":
            signs = torch.complex(torch.randint(0, 2, (more, dim // 2)).double() * 2 - 1, torch.zeros((), dtype=torch.float64))
            key, query = turn_halves(key, signs), turn_halves(rows["q_proj"], signs.repeat_interleave(per_head, 0))
        elif keys == "any":
            maps = torch.randn(more, dim, dim, dtype=torch.float64)
            key = maps @ key
            query = torch.linalg.inv(maps).mT.repeat_interleave(per_head, 0) @ rows["q_proj"]
        else:
            query = rows["q_proj"]
        maps = torch.randn(more, dim, dim, dtype=torch.float64)
        value, columns = maps @ value, torch.linalg.inv(maps).mT.repeat_interleave(per_head, 0) @ columns
        key, value = (part + noise * part.std() * torch.randn_like(part) for part in (key, value))
        order = torch.randperm(more) if shuffle else torch.arange(more)
        queries = (order[:, None] * per_head + torch.arange(per_head)).flatten()
        for name, new in (("q_proj", query[queries]), ("k_proj", key[order]), ("v_proj", value[order])):
            put(getattr(part, name), new.flatten(0, 1))
        part.o_proj.weight.data = columns[queries].flatten(0, 1).T.contiguous()
        part.num_key_value_groups = per_head
    config.num_key_value_heads = more
    return wide


def biased(linear: Any) -> torch.Tensor:
    bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return torch.cat([linear.weight, bias[:, None]], 1).detach()


def put(linear: Any, rows: torch.Tensor) -> None:
    linear.weight.data = rows[:, :-1].contiguous()
    linear.out_features = len(rows)
    if linear.bias is not None:
        linear.bias.data = rows[:, -1].contiguous()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def convert(model: Any, make_trial: Any, calibration: list[list[int]] | None = None, **options: Any) -> Any:
    trial = make_trial("gqa", gqa.GqaOptions(**({"ratio": RATIO} | options)), calibration=calibration or [])
    assert gqa.transform_model(model=model, trial=trial) is None
    return trial


def uneven_norms(model: Any) -> Any:
    """Head norms with another weight in each row, as training leaves them."""
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.data = torch.rand_like(norm.weight) + 0.5
    return model


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2"])
def test_equal_heads_convert_exactly(kind: str, calibrated: bool, make_trial: Any) -> None:
    model = grouped(kind)
    wide = expand(model)
    before = logits(model)
    assert (logits(wide) - before).abs().max() < 1e-9, "the test's own expansion changed the function"
    trial = convert(wide, make_trial, calibration=ragged_prompts((20, 30)) if calibrated else None)
    assert (logits(wide) - before).abs().max() <= 1e-9
    assert wide.config.num_key_value_heads == 4
    assert max(trial.notes["conversion"]["residual_keys"] + trial.notes["conversion"]["residual_values"]) < 1e-6


@pytest.mark.parametrize("keys", ["sign", "same"])
def test_uneven_head_norms_leave_the_sign_free(keys: str, make_trial: Any) -> None:
    model = uneven_norms(grouped("qwen3"))
    wide = expand(model, keys=keys)
    before = logits(model)
    assert (logits(wide) - before).abs().max() < 1e-9
    convert(wide, make_trial)
    assert (logits(wide) - before).abs().max() <= 1e-9


def test_layers_without_positions_admit_any_map(make_trial: Any) -> None:
    """SmolLM3 leaves the rotary embedding out of some layers; here of all."""
    from transformers import AutoModelForCausalLM, SmolLM3Config

    torch.manual_seed(0)
    config = SmolLM3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=128,
        no_rope_layers=[0, 0], pad_token_id=2, bos_token_id=0, eos_token_id=1, layer_types=["full_attention"] * 2, use_sliding_window=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    wide, before = expand(model, keys="any"), logits(model)
    assert (logits(wide) - before).abs().max() < 1e-9
    convert(wide, make_trial)
    assert (logits(wide) - before).abs().max() <= 1e-9


@pytest.mark.parametrize("kind", ["Phi3", "Phi", "Cohere", "StableLm", "Glm"])
def test_other_layouts_convert_equal_heads_exactly(kind: str, make_trial: Any) -> None:
    """Fused rows (Phi-3), partial rotary (Phi, StableLM, GLM) and neighbouring pairs (Cohere, GLM), keys and values merely copied."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=128,
        head_dim=8, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    before = logits(model)
    wide_config = copy.deepcopy(config)
    wide_config.num_key_value_heads = 8
    wide = transformers.AutoModelForCausalLM.from_config(wide_config, attn_implementation="sdpa").double().eval()
    state = model.state_dict()
    for name, tensor in state.items():
        if name.split(".")[-2] in ("k_proj", "v_proj"):
            state[name] = tensor.unflatten(0, (4, 8)).repeat_interleave(2, 0).flatten(0, 1)
        elif name.split(".")[-2] == "qkv_proj":
            query, *others = tensor.split([64, 32, 32])
            state[name] = torch.cat([query, *(part.unflatten(0, (4, 8)).repeat_interleave(2, 0).flatten(0, 1) for part in others)])
    wide.load_state_dict(state)
    assert (logits(wide) - before).abs().max() < 1e-9
    convert(wide, make_trial)
    assert (logits(wide) - before).abs().max() <= 1e-9


def test_aligned_pooling_beats_plain_pooling(make_trial: Any) -> None:
    model = grouped("llama")
    wide = expand(model, noise=0.01)
    before = logits(wide)
    errors = {}
    for name, options in {"plain": {"align": False}, "neighbours": {"regroup": False}, "aligned": {}}.items():
        changed = copy.deepcopy(wide)
        convert(changed, make_trial, **options)
        errors[name] = float((logits(changed) - before).norm() / before.norm())
    assert errors["aligned"] < 0.3 * errors["neighbours"]
    assert errors["aligned"] < 0.3 * errors["plain"]


def test_without_align_groups_are_the_plain_means(make_trial: Any) -> None:
    model = grouped("qwen2")
    part = model.model.layers[1].self_attn
    weight, bias = part.k_proj.weight.detach().clone(), part.v_proj.bias.detach().clone()
    convert(model, make_trial, align=False)
    assert torch.allclose(part.k_proj.weight, (weight.view(4, 8, 64)[::2] + weight.view(4, 8, 64)[1::2]).flatten(0, 1) / 2)
    assert torch.allclose(part.v_proj.bias, (bias.view(4, 8)[::2] + bias.view(4, 8)[1::2]).flatten() / 2)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "mistral"])
def test_a_converted_model_is_an_ordinary_model(kind: str, make_trial: Any, tmp_path: Path) -> None:
    """Shapes, proof, a saved folder with the same logits, and generation with a static cache."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny_model(kind, num_key_value_heads=4)
    untouched = gqa.prove_effect(model=model, trial=make_trial("gqa", gqa.GqaOptions()))
    trial = convert(model, make_trial, ratio=4, calibration=ragged_prompts((15,)))
    facts = gqa.prove_effect(model=model, trial=trial)
    assert (untouched["kv_heads"], facts["kv_heads_before"], facts["kv_heads"]) == (4, 4, 1)
    assert untouched["kv_bytes_a_token"] == facts["kv_bytes_a_token_before"] == 4 * facts["kv_bytes_a_token"]
    assert facts["calibration_tokens"] == 15
    part = model.model.layers[0].self_attn
    assert part.k_proj.weight.shape == (16, 64) and part.k_proj.out_features == 16 and part.num_key_value_groups == 4
    assert part.k_proj.weight.dtype == torch.float32

    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="sdpa")
    assert torch.equal(logits(loaded), logits(model))

    expected = plain_greedy(model, ragged_prompts((7,)), 8)
    for cache in ("dynamic", "static"):
        rows = model.generate(
            torch.tensor(ragged_prompts((7,))), max_new_tokens=8, min_new_tokens=8, do_sample=False, cache_implementation=cache,
            disable_compile=True, eos_token_id=None, pad_token_id=2,
        )  # fmt: skip
        assert rows[:, 7:].tolist() == expected
    # layer 1: Gemma-2 keeps a window only in layer 0
    keys = model(input_ids=IDS, use_cache=True).past_key_values.layers[1].keys
    assert keys.shape == (1, 1, 10, 16)
    assert keys.numel() * 2 * 2 * 4 == 10 * facts["kv_bytes_a_token"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("gpt2", "no num_key_value_heads"), ("gpt_neox", "no num_key_value_heads"), ("opt", "no num_key_value_heads")],
)
def test_models_without_grouped_heads_are_refused_with_the_reason(kind: str, words: str, make_trial: Any) -> None:
    model, _ = tiny_model(kind)
    with pytest.raises(UsageError, match=words):
        convert(model, make_trial)


def test_refusals_name_the_cause_and_the_way_out(make_trial: Any) -> None:
    model = grouped("llama")
    with pytest.raises(UsageError, match="set gqa.ratio to 2 or 4"):
        convert(model, make_trial, ratio=3)
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(8))
    before = model.model.layers[0].self_attn.k_proj.weight.clone()
    with pytest.raises(UsageError, match="sinks"):
        convert(model, make_trial)
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, before), "a refused model must stay as it was"
    model = grouped("llama")
    model.model.layers[0].self_attn.k_proj = torch.nn.Identity()
    with pytest.raises(UsageError, match="plain full-precision"):
        convert(model, make_trial)


def test_an_unknown_rotary_layout_is_refused_only_where_keys_are_aligned(make_trial: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    model = grouped("llama")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * sin))
    with pytest.raises(UsageError, match="set gqa.align to false"):
        convert(model, make_trial)
    convert(model, make_trial, align=False)
    assert model.config.num_key_value_heads == 2


def test_groups_of_similar_heads_are_found() -> None:
    """Six heads of three kinds, interleaved; equal costs keep the checkpoint's order."""
    kinds = torch.tensor([0, 1, 2, 0, 1, 2])
    distance = (kinds[:, None] != kinds[None]).double()
    assert group(distance, 2) == [[0, 3], [1, 4], [2, 5]]
    assert group(torch.ones(6, 6), 3) == [[0, 1, 2], [3, 4, 5]]


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        gqa.GqaOptions(ratio=1)
    with pytest.raises(ValueError, match="Extra inputs"):
        gqa.GqaOptions(groups=4)


def test_the_plan_carries_it_out() -> None:
    import optkit

    model, tokenizer = tiny_model("llama", num_key_value_heads=4)
    optimized = optkit.optimize(model, tokenizer, plugins=["gqa"], set={"gqa.ratio": 2})
    assert optimized.model.config.num_key_value_heads == 2
    assert optimized.proof()["gqa"]["facts"]["kv_heads"] == 2
    prompts = ragged_prompts()
    texts = [list(row) for row in optimized.engine.generate(prompts, new_tokens=6, exact=True)]
    assert texts == plain_greedy(optimized.model, prompts, 6)
    optimized.close()


@pytest.mark.skipif(importlib.util.find_spec("optkit") is None, reason="optkit is not installed")
def test_importing_the_technique_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import optkit_plugins.gqa, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
