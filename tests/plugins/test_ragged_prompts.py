"""Packed prompts with layers compiled once: the tokens of a plain loop, no recompile for other waves, and attention beside float64."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")

from optkit_plugins.kernels.ragged import attention as packed  # noqa: E402
from optkit_plugins.kernels.ragged.engine import RaggedEngine  # noqa: E402
from tests.plugins.test_ragged import LENGTHS, engine_of, forget_graphs, read_tokens, take_spans, without_end  # noqa: E402, F401
from tests.plugins.tiny import plain_greedy, ragged_prompts, tiny_model  # noqa: E402


def counted_kinds(engine: RaggedEngine) -> dict[str, int]:
    """Kind of compiled prompts -> calls of each, filled while the engine works."""
    calls: dict[str, int] = {}
    by_layers = engine._by_layers

    def counted(work, kind, caches=()):
        calls[kind] = calls.get(kind, 0) + 1
        return by_layers(work, kind, caches)

    engine._by_layers = counted
    return calls


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt"])
def test_compiled_layers_read_packed_prompts_to_the_same_tokens(kind, make_trial):
    model, _ = tiny_model(kind, **({"n_layer": 3} if kind == "gpt2" else {"num_hidden_layers": 3}))
    prompts = ragged_prompts(LENGTHS)
    expected = plain_greedy(model, prompts, 8)
    engine, _ = engine_of(without_end(model), make_trial, backend="aot_eager", prompts=True)
    if kind == "gemma2":
        take_spans(engine)
    calls = counted_kinds(engine)
    assert engine.generate(prompts, new_tokens=8) == expected
    assert engine.layers.problem == "" and calls.keys() == {"packed prompts"} and calls["packed prompts"] >= 3
    graphs = engine.tally.graphs
    assert graphs == 3  # a step, a layer, the norm behind the last
    others = ragged_prompts((17, 33, 2, 2, 8, 40, 16, 16, 16, 16), seed=3)
    assert engine.generate(others, new_tokens=8) == plain_greedy(model, others, 8)
    assert (engine.tally.graphs, engine.tally.recompiles, engine.tally.graph_breaks) == (graphs, 0, 0)
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_prefixes_one_row_and_one_token_are_read_to_the_same_tokens(kind, make_trial, monkeypatch):
    model, _ = tiny_model(kind)
    system, *tails = ragged_prompts((40, 4, 9, 1, 6, 3), seed=5)
    prompts = [system + tail for tail in tails] + [system] + ragged_prompts((11,))
    expected = plain_greedy(model, prompts, 6)
    engine, _ = engine_of(without_end(model), make_trial, backend="aot_eager", prompts=True, wave_tokens=100)
    read, calls = read_tokens(engine, monkeypatch), counted_kinds(engine)
    assert engine.generate(prompts, new_tokens=6) == expected
    assert engine.slot_facts["shared_prefix_tokens"] > 0
    assert calls.keys() == {"packed prompts", "packed prompts behind prefixes"}
    graphs = engine.tally.graphs
    assert engine.generate(prompts[::-1], new_tokens=6) == expected[::-1]
    assert (engine.tally.graphs, engine.tally.recompiles) == (graphs, 0)
    read.clear()
    alone = [prompts[0], prompts[0], [5], [7, 9]]  # all in one row: the second is but one token behind its prefix
    engine, _ = engine_of(model, make_trial, backend="aot_eager", prompts=True, slots=1)
    calls = counted_kinds(engine)
    assert engine.generate(alone, new_tokens=6) == plain_greedy(model, alone, 6)
    assert 1 in read and calls.keys() == {"packed prompts, one row"}
    assert engine.tally.recompiles == 0 and engine.layers.problem == ""


def test_slots_of_other_sizes_share_the_graphs_of_prompts(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=2)
    engine, _ = engine_of(without_end(model), make_trial, backend="aot_eager", prompts=True, slots=8, wave_tokens=300)
    known = []
    for lengths in ((5,) * 8, (40,) * 20, (100, 90), (200, 4, 3, 9, 70)):
        prompts = ragged_prompts(lengths)
        assert engine.generate(prompts, new_tokens=5) == plain_greedy(model, prompts, 5)
        known.append(engine.tally.graphs)
    assert known == [3, 3, 4, 5] and len(engine.ragged) == 3  # only the step of each new slot
    assert engine.tally.recompiles == 0


def test_layers_that_cannot_be_compiled_are_read_as_they_are(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    prompts = ragged_prompts(LENGTHS)
    engine, _ = engine_of(without_end(model), make_trial, prompts=True)
    engine.layers.problem = "no list of layers"
    assert engine.generate(prompts, new_tokens=4) == plain_greedy(model, prompts, 4)
    assert "packed prompts" not in engine.layers.compiled


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_reads_packed_prompts_to_the_same_tokens(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    system = ragged_prompts((40,), seed=5)[0]
    prompts = [*ragged_prompts(LENGTHS), *(system + tail for tail in ragged_prompts((4, 9, 6)))]
    engine, _ = engine_of(without_end(model), make_trial, backend="inductor", prompts=True)
    calls = counted_kinds(engine)
    assert engine.generate(prompts, new_tokens=6) == plain_greedy(model, prompts, 6)
    assert len(calls) == 2 and engine.layers.problem == "" and engine.tally.recompiles == 0


# ---------------------------------------------------------------- the operator

#: (queries, keys) of prompts; keys beyond the queries are a prefix that was cached before.
SPANS = [(5, 5), (1, 1), (7, 40), (1, 33), (12, 12)]


def plain_packed(query, key, value, spans, window, scale):
    """Each query by itself over the keys that it may see, in float64: (1, queries, heads, size)."""
    query, key, value = query.double(), key.double(), value.double()
    groups, rows, begin, key_begin = query.shape[1] // key.shape[1], [], 0, 0
    for queries, keys in spans:
        for at in range(queries):
            last = keys - queries + at
            seen = slice(key_begin + max(0, last - window + 1 if window else 0), key_begin + last + 1)
            k, v = (states[0, :, seen].repeat_interleave(groups, 0) for states in (key, value))
            weights = (torch.einsum("hd,hkd->hk", query[0, :, begin + at], k) * scale).softmax(-1)
            rows.append(torch.einsum("hk,hkd->hd", weights, v))
        begin, key_begin = begin + queries, key_begin + keys
    return torch.stack(rows)[None]


DEVICES = [("cpu", torch.float32, 1e-6)] + [("cuda", dtype, error) for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2))]


@pytest.mark.parametrize(("device", "dtype", "error"), DEVICES)
@pytest.mark.parametrize(("window", "scale", "kv_heads"), [(0, None, 2), (6, 0.3, 4)])
def test_packed_attention_is_that_of_each_prompt_alone(device, dtype, error, window, scale, kv_heads):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    queries, keys = (sum(counts) for counts in zip(*SPANS, strict=True))
    query = torch.randn(1, queries, 4, 16, device=device, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(1, keys, kv_heads, 16, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    mask = packed.packed_mask(*map(list, zip(*SPANS, strict=True)), window)
    found = packed.packed_attention(query, key, value, mask, "sdpa", 4 // kv_heads, scale)
    expected = plain_packed(query, key, value, SPANS, window, scale or 16**-0.5)
    assert found.shape == (1, queries, 4, 16)
    assert float((found.double() - expected).norm() / expected.norm()) < error
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0):
        assert packed.at_once(query, key, value)  # one kernel for all prompts


def test_the_operator_is_what_it_says_to_a_compiler():
    query, key, value = (torch.randn(1, 2, tokens, 8) for tokens in (6, 9, 9))
    mask = packed.packed_mask([2, 4], [5, 4], None)
    torch.library.opcheck(packed.packed_attention, (query, key, value, mask, "sdpa", 1, None))
