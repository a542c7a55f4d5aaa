"""Layers spread over devices. ``cpu`` and ``cpu:0`` are the same memory under two names, so hooks run without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optkit import UnavailableError
from optkit_plugins import parallel
from optkit_plugins.kernels.parallel.layers import Copies, balanced, decoder_layers, spread
from tests.plugins.tiny import plain_greedy, ragged_prompts, tiny_model

PROMPTS = ragged_prompts((5, 12, 3))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neox", "opt"])
def test_spread_models_give_the_plain_tokens(kind: str) -> None:
    plain, _ = tiny_model(kind)
    model, _ = tiny_model(kind)
    assert spread(model, ["cpu", "cpu:0"]) == ["cpu", "cpu:0"]
    hooked = [bool(layer._forward_pre_hooks) for layer in decoder_layers(model)]
    assert hooked == sorted(hooked) and any(hooked), "the last layers are elsewhere"
    assert sum(bool(module._forward_pre_hooks or module._forward_hooks) for module in model.modules()) == sum(hooked), "no other hooks"
    assert plain_greedy(model, PROMPTS, 6) == plain_greedy(plain, PROMPTS, 6)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_layers_are_spread_evenly_and_in_order(count: int) -> None:
    model, _ = tiny_model("llama", num_hidden_layers=12)
    places = balanced(model, count)
    assert places == sorted(places) and set(places) == set(range(count))
    assert max(places.count(at) for at in range(count)) <= 12 / count + 1


def test_a_large_embedding_leaves_fewer_layers_to_the_first_device() -> None:
    model, _ = tiny_model("llama", num_hidden_layers=12, vocab_size=4096)  # 2 x 262,144 of 1,007,168 parameters are no layers
    assert balanced(model, 2).count(0) == 0 and balanced(model, 2).count(1) == 12


def test_what_layers_share_is_copied_once_a_step() -> None:
    first, second = torch.nn.Identity(), torch.nn.Identity()
    copies = Copies(torch.device("meta"), first)
    hidden, rotary, mask = torch.zeros(2), (torch.zeros(2), torch.ones(2)), None
    cache = object()

    def bring(layer: torch.nn.Module, hidden: Any) -> Any:
        (hidden,), named = copies.bring(layer, (hidden,), {"rotary": rotary, "mask": mask, "cache": cache})
        return hidden, named

    moved, named = bring(first, hidden)
    assert moved.device.type == "meta" and named["rotary"][0].device.type == "meta"
    assert named["mask"] is None and named["cache"] is cache
    again, later = bring(second, moved)
    assert again is moved and later["rotary"] is named["rotary"]
    _, next_step = bring(first, hidden)
    assert next_step["rotary"] is not named["rotary"], "buffers may have changed in place"


def test_a_model_without_layers_is_refused() -> None:
    model, _ = tiny_model("llama")
    model._no_split_modules = None
    with pytest.raises(UnavailableError, match="LlamaForCausalLM has no list of decoder layers that could be spread; set parallel.mode"):
        parallel.spread_layers(model, ["cpu", "cpu:0"])
