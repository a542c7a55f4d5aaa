"""Layerdrop takes out the layer that is missed least, keeps caches and saved folders right, and goes together with others."""

import pytest
import torch

import optkit
from optkit.testing import KINDS, TechniqueTests, plain_greedy, plain_scores, prompts, tiny_model


class TestLayerdrop(TechniqueTests):
    plugin = "layerdrop"


def calibration():
    return prompts([24] * 4, seed=7)


def drop(kind, texts, **options):
    model, tokenizer = tiny_model(kind, num_hidden_layers=4)
    chosen = {f"layerdrop.{name}": value for name, value in options.items()}
    return optkit.optimize(model, tokenizer, ["layerdrop"], set=chosen, calibration=texts)


def by_hand(kind, kept):
    """The same model with these layers alone, built from its config and loaded with their weights."""
    whole, _ = tiny_model(kind, num_hidden_layers=4)
    small, _ = tiny_model(kind, num_hidden_layers=len(kept))
    stack = "transformer.h." if kind == "gpt2" else "model.layers."
    state = whole.state_dict()
    for name in list(small.state_dict()):
        if name.startswith(stack):
            number, _, rest = name.removeprefix(stack).partition(".")
            state[name] = whole.state_dict()[f"{stack}{kept[int(number)]}.{rest}"]
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    return small


def loss(model, texts):
    return -float(torch.cat(plain_scores(model, texts)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_that_is_missed_least_goes(kind):
    losses = {gone: loss(by_hand(kind, [n for n in range(4) if n != gone]), calibration()) for gone in range(3)}
    optimized = drop(kind, calibration())
    facts = optimized.proof()["layerdrop"]["facts"]
    assert facts["dropped"] == [min(losses, key=losses.get)]
    assert facts["harm"] == [pytest.approx(min(losses.values()), abs=1e-4)]
    assert facts["measured_by"] == "loss on calibration text"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_answers_as_a_model_built_of_those_layers(kind):
    optimized = drop(kind, calibration(), layers=2)
    kept = [n for n in range(4) if n not in optimized.proof()["layerdrop"]["facts"]["dropped"]]
    reference = by_hand(kind, kept)
    assert optimized.generate(prompts(), new_tokens=8) == plain_greedy(reference, prompts(), 8)  # the first one with a KV cache
    for ours, theirs in zip(optimized.score(prompts()), plain_scores(reference, prompts()), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_without_calibration_text_hidden_states_decide_and_it_says_so():
    model, _ = tiny_model("llama", num_hidden_layers=4)
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.mul_(1e-3)  # this layer now changes next to nothing
    optimized = optkit.optimize(model, tiny_model("llama")[1], ["layerdrop"])
    facts = optimized.proof()["layerdrop"]["facts"]
    assert facts["dropped"] == [1] and "for want of calibration text" in facts["measured_by"]


def test_layers_of_several_types_keep_their_type():
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model, tokenizer = tiny_model("qwen3", num_hidden_layers=4, layer_types=types, use_sliding_window=True, sliding_window=4)
    optimized = optkit.optimize(model, tokenizer, ["layerdrop"], set={"layerdrop.layers": 2}, calibration=calibration())
    kept = [n for n in range(4) if n not in optimized.proof()["layerdrop"]["facts"]["dropped"]]
    assert optimized.model.config.layer_types == [types[n] for n in kept]
    assert optimized.generate(prompts(), new_tokens=8) == plain_greedy(optimized.model, prompts(), 8)


def test_more_layers_than_there_are_is_refused_with_the_limit():
    with pytest.raises(optkit.UsageError, match="set layerdrop.layers to at most 2"):
        drop("llama", calibration(), layers=3)


def test_a_whole_run(optkit_run):
    record = optkit_run.run(["layerdrop"])
    arm = record["arms"][1]
    assert arm["state"] == "ok", arm["reason"]
    assert arm["proof"]["layerdrop"]["verdict"] == "active"
    assert arm["proof"]["layerdrop"]["facts"]["measured_by"] == "loss on calibration text"
