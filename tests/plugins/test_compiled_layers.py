"""Layers compiled once for all of them: the same tokens and scores, one graph a kind of layer, and a way on where none can be made."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")

from optkit_plugins import compile as compiling  # noqa: E402
from optkit_plugins.kernels.decode.layers import CompiledLayers  # noqa: E402
from optkit_plugins.kernels.fused.projections import fuse_projections  # noqa: E402
from tests.plugins.tiny import KINDS, plain_greedy, ragged_prompts, tiny_model  # noqa: E402

STATIC = {"generate.cache": "static"}


def engine_of(model, make_trial, settings=None, **options):
    model.generation_config.eos_token_id = None
    chosen = compiling.CompileOptions(**{"backend": "eager", "prompts": True} | options)
    trial = make_trial("compile", chosen, STATIC | (settings or {}))
    return compiling.build_engine(model=model, trial=trial), trial


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch.compiler.reset()


def layers_of(kind, count):
    return {"n_layer": count} if kind == "gpt2" else {"num_hidden_layers": count}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_steps_and_scores_need_one_graph_a_kind_of_layer(kind, make_trial):
    model, _ = tiny_model(kind, **layers_of(kind, 3))
    engine, trial = engine_of(model, make_trial, steps="layers", score=True)
    for prompts in (ragged_prompts((5, 12, 3)), ragged_prompts((9, 70, 33, 2))):
        assert engine.generate(prompts, new_tokens=4) == plain_greedy(model, prompts, 4)
    for lengths in ((16,) * 16, (17, 40, 9)):
        sequences = ragged_prompts(lengths)
        for scores, sequence in zip(engine.score(sequences, [1] * len(sequences)), sequences, strict=True):
            with torch.inference_mode():
                rows = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
            assert torch.allclose(scores.double(), rows.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0], atol=1e-5)
    layers = 1 + 1 + (2 if kind == "gemma2" else 1)  # prompts, steps, scores: without a mask, every other layer of Gemma-2 differs
    norms, pieces = 3, 3  # what follows the logits in two buckets; the head
    facts = compiling.prove_effect(model=model, trial=trial)
    assert (facts["graphs"], facts["recompiles"], facts["graph_breaks"], facts["not_compiled"]) == (layers + norms + pieces, 0, 0, [])
    assert "ragged prompts" in facts["summary"]
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize(("kind", "spans"), [("llama", False), ("gemma2", True)])
def test_all_shapes_share_the_graphs_of_their_layers(kind, spans, make_trial, monkeypatch):
    monkeypatch.setattr("optkit_plugins.kernels.attention.interface.runs_on", lambda device: spans)
    model, _ = tiny_model(kind, num_hidden_layers=3)
    engine, _ = engine_of(model, make_trial, steps="layers")
    known = {}
    for lengths in ((7,), (80,), (16,) * 16, (30, 30, 30, 30), (70, 70), (5, 12), (9, 70, 33, 2, 9)):
        prompts = ragged_prompts(lengths)
        assert engine.generate(prompts, new_tokens=3) == plain_greedy(model, prompts, 3)
        known[lengths] = engine.tally.graphs
    assert known[(80,)] - known[(7,)] == 1  # a new bucket of known layers: only what follows the logits is compiled
    assert known[(30, 30, 30, 30)] - known[(16,) * 16] == 0  # a known bucket: nothing is
    assert known[(70, 70)] - known[(30, 30, 30, 30)] == 1
    assert engine.tally.recompiles == 0


def test_joined_projections_share_a_graph_although_each_holds_weights_of_its_own(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=9)
    expected = [plain_greedy(model, prompts, 6) for prompts in (ragged_prompts((9, 9)), ragged_prompts((5, 12)))]
    assert fuse_projections(model)["groups_fused"] == 18  # more layers than torch compiles a function for
    engine, _ = engine_of(model, make_trial)
    assert engine.generate(ragged_prompts((9, 9)), new_tokens=6) == expected[0]
    assert engine.generate(ragged_prompts((5, 12)), new_tokens=6) == expected[1]
    assert engine.layers.problem == ""
    assert engine.tally.recompiles == 0


def test_steps_by_layers_honour_sampling_and_the_end_of_texts(make_trial):
    model, _ = tiny_model("llama")
    settings = {"generate.repetition_penalty": 1.7}
    prompts = ragged_prompts((6, 11))
    whole, _ = engine_of(model, make_trial, settings)
    layered, _ = engine_of(model, make_trial, settings, steps="layers")
    assert layered.generate(prompts, new_tokens=16) == whole.generate(prompts, new_tokens=16)
    ends = [whole.generate(prompts, new_tokens=16)[0][5]]
    for engine in (whole, layered):
        engine.eos = set(ends)
        engine.slots.clear()
    found = layered.generate(prompts, new_tokens=16)
    assert found == whole.generate(prompts, new_tokens=16)
    assert len(found[0]) < 16


def test_drafts_begin_behind_prompts_that_compiled_layers_read(make_trial):
    model, _ = tiny_model("llama")
    prompts = ragged_prompts((9, 30, 4))
    expected = plain_greedy(model, prompts, 16)
    engine, _ = engine_of(model, make_trial, {"generate.prompt_lookup_tokens": 3, "generate.prompt_lookup_ngram": 2})
    assert engine.generate(prompts, new_tokens=16) == expected
    assert "ragged prompts" in engine.tally.buckets


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductors_code_of_one_layer_gives_the_values_of_all(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=3)
    engine, _ = engine_of(model, make_trial, score=True, backend="inductor")
    parts = engine._scorer().parts
    for shape in ((2, 40), (5, 17)):
        ids = torch.randint(3, 100, shape)
        with torch.inference_mode():
            expected = parts.hidden(ids, attention_mask=torch.ones_like(ids))
            with engine.layers.use("hidden states"):
                found = parts.hidden(ids, attention_mask=torch.ones_like(ids))
        assert torch.allclose(found, expected, atol=1e-5)


def test_where_a_layer_cannot_be_one_graph_it_runs_as_it_is_and_the_proof_says_why(make_trial, monkeypatch):
    model, _ = tiny_model("llama")
    prompts = ragged_prompts((9, 9))
    expected = plain_greedy(model, prompts, 6)
    block = type(model.model.layers[0])
    plain = block.forward

    def breaking(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(block, "forward", breaking)
    engine, trial = engine_of(model, make_trial)
    monkeypatch.setattr(engine, "compiled_step", lambda method, name: method)  # a step of one graph cannot be had either
    for _ in range(2):
        assert engine.generate(prompts, new_tokens=6) == expected
    facts = compiling.prove_effect(model=model, trial=trial)
    assert "layers are not compiled: " in facts["summary"]
    assert len(facts["not_compiled"]) == 1


def test_where_every_layer_needs_a_graph_of_its_own_none_is_compiled(make_trial, monkeypatch):
    model, _ = tiny_model("llama", num_hidden_layers=6)
    block = type(model.model.layers[0])
    plain = block.forward

    def numbered(self, hidden_states, *args, **kwargs):
        return plain(self, hidden_states * self.number / self.number, *args, **kwargs)

    for number, layer in enumerate(model.model.layers):
        layer.number = 2**number
    monkeypatch.setattr(block, "forward", numbered)
    prompts = ragged_prompts((9, 9))
    expected = plain_greedy(model, prompts, 4)
    engine, _ = engine_of(model, make_trial)
    for _ in range(2):
        assert engine.generate(prompts, new_tokens=4) == expected
    assert "layers are not compiled" in engine.layers.problem
    assert not any("forward" in vars(part) for part in model.modules())


def test_layers_with_a_forward_of_their_own_are_left_alone():
    model, _ = tiny_model("llama")
    arguments = {"backend": "eager", "fullgraph": True}
    assert CompiledLayers(model, arguments).problem == ""
    model.model.layers[1].forward = model.model.layers[1].forward  # as a hook would put it there
    assert "no list of layers" in CompiledLayers(model, arguments).problem
