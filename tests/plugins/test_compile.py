"""compile: the same greedy tokens as a plain loop and as ``generate``, one graph a bucket, and honest facts."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")

from optkit import TransformersEngine, UnavailableError  # noqa: E402
from optkit_plugins import compile as compiling  # noqa: E402
from tests.plugins.tiny import KINDS, plain_greedy, ragged_prompts, tiny_model  # noqa: E402

STATIC = {"generate.cache": "static"}


def engine_of(model, tokenizer, make_trial, settings=None, **options):
    chosen = compiling.CompileOptions(**{"backend": "eager"} | options)
    trial = make_trial("compile", chosen, STATIC | (settings or {}), tokenizer=tokenizer)
    return compiling.build_engine(model=model, trial=trial), trial


def without_end(model):
    """The model, so that no text ends early: every row has all its tokens to compare."""
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batches_get_the_tokens_of_a_plain_loop_without_cache(kind, make_trial):
    model, tokenizer = tiny_model(kind)
    prompts, new_tokens = ragged_prompts(), 20
    expected = plain_greedy(model, prompts, new_tokens)
    engine, trial = engine_of(without_end(model), None, make_trial)
    assert engine.generate(prompts, new_tokens=new_tokens) == expected
    assert engine.generate(prompts[:2], new_tokens=new_tokens) == expected[:2]
    facts = compiling.prove_effect(model=model, trial=trial)
    assert (facts["graphs"], facts["graph_breaks"], facts["recompiles"], facts["buckets"]) == (1, 0, 0, ["4 x 64"])
    assert facts["summary"].startswith("1 graph, 0 breaks, 0 recompiles: 4 x 64; attention: sdpa")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", KINDS)
def test_attention_over_each_rows_own_columns_gives_the_same_tokens(kind, make_trial, monkeypatch):
    """What a GPU does, with the kernel's plain twin: spans instead of masks, and padding behind the prompts."""
    monkeypatch.setattr("optkit_plugins.kernels.attention.interface.runs_on", lambda device: True)
    model, tokenizer = tiny_model(kind)
    prompts, new_tokens = ragged_prompts((5, 37, 3, 40)), 20
    expected = plain_greedy(model, prompts, new_tokens)
    engine, trial = engine_of(without_end(model), None, make_trial)
    assert engine.attention.spans
    engine.records, engine.pool = True, None
    monkeypatch.setattr("optkit_plugins.kernels.decode.engine.Recorded", lambda function, pool: function)
    monkeypatch.setattr(engine, "compiled_step", lambda method, name: method)
    assert engine.generate(prompts, new_tokens=new_tokens) == expected
    assert engine.generate(prompts[1:2], new_tokens=new_tokens) == expected[1:2]
    reads = [key for bucket in engine.slots.values() for key in bucket.reads]
    assert reads == [(4, 63, True), (1, 63, False)]


def test_a_sliding_window_is_kept_by_the_mask(make_trial):
    model, tokenizer = tiny_model("mistral", sliding_window=6)
    prompts = ragged_prompts((9, 2))
    expected = plain_greedy(model, prompts, 16)
    engine, _ = engine_of(without_end(model), None, make_trial)
    assert engine.generate(prompts, new_tokens=16) == expected


def test_eager_attention_gets_an_additive_mask(make_trial):
    model, tokenizer = tiny_model("llama")
    model.set_attn_implementation("eager")
    prompts = ragged_prompts((9, 2))
    expected = plain_greedy(model, prompts, 12)
    engine, _ = engine_of(without_end(model), None, make_trial)
    assert engine.generate(prompts, new_tokens=12) == expected


def test_texts_end_where_generate_ends_them(make_trial):
    model, tokenizer = tiny_model("qwen3", seed=3)
    prompts = ragged_prompts((5, 12, 3, 9, 7))
    longest = plain_greedy(model, prompts, 24)
    ends = sorted({longest[0][4], longest[1][9]})  # ids that really come up, at different steps
    model.generation_config.eos_token_id = ends
    engine, trial = engine_of(model, tokenizer, make_trial)
    expected = TransformersEngine(model, trial).generate(prompts, new_tokens=24)
    assert engine.generate(prompts, new_tokens=24) == expected
    assert any(len(row) < 24 for row in expected)


def test_exact_runs_all_tokens_as_the_default_engine_does(make_trial):
    model, tokenizer = tiny_model("qwen3", seed=3)
    prompts = ragged_prompts((5, 12))
    model.generation_config.eos_token_id = plain_greedy(model, prompts, 4)[0][3]
    engine, trial = engine_of(model, tokenizer, make_trial)
    expected = TransformersEngine(model, trial).generate(prompts, new_tokens=16, exact=True)
    rows = engine.generate(prompts, new_tokens=16, exact=True)
    assert rows == expected
    assert [len(row) for row in rows] == [16, 16]


def test_the_repetition_penalty_counts_the_rows_own_tokens(make_trial):
    model, tokenizer = tiny_model("llama")
    settings = {"generate.repetition_penalty": 1.7}
    prompts = ragged_prompts((6, 11))
    engine, trial = engine_of(without_end(model), tokenizer, make_trial, settings)
    default = TransformersEngine(model, trial)
    alone = [default.generate([prompt], new_tokens=16)[0] for prompt in prompts]  # without padding, which generate would count
    assert engine.generate(prompts, new_tokens=16) == alone
    assert alone != plain_greedy(model, prompts, 16)


def test_defaults_of_the_models_generation_config_are_kept(make_trial):
    model, tokenizer = tiny_model("llama")
    model.generation_config.repetition_penalty = 1.7
    prompts = ragged_prompts((6,))
    engine, trial = engine_of(without_end(model), tokenizer, make_trial)
    assert engine.generate(prompts, new_tokens=12) == TransformersEngine(model, trial).generate(prompts, new_tokens=12)


def test_sampling_draws_from_the_models_distribution(make_trial):
    model, tokenizer = tiny_model("llama", spread=2.0)
    settings = {"generate.do_sample": True, "generate.temperature": 0.7, "generate.top_k": 5}
    engine, _ = engine_of(without_end(model), None, make_trial, settings)
    prompt = ragged_prompts((6,))[0]
    with torch.no_grad():
        top = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 0.7).topk(5)
    expected = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
    torch.manual_seed(0)
    rows = [row[0] for _ in range(16) for row in engine.generate([prompt] * 256, new_tokens=1)]
    assert set(rows) <= expected.keys()
    for token, share in expected.items():  # 4096 draws: a standard error is at most 0.008
        assert rows.count(token) / len(rows) == pytest.approx(share, abs=0.035)
    torch.manual_seed(1)
    first = engine.generate([prompt] * 4, new_tokens=8)
    torch.manual_seed(1)
    assert engine.generate([prompt] * 4, new_tokens=8) == first
    assert len({tuple(row) for row in first}) > 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_scores_are_those_of_the_plain_forward_at_any_length(kind, make_trial):
    model, tokenizer = tiny_model(kind)
    engine, trial = engine_of(model, tokenizer, make_trial, score=True)
    sequences = ragged_prompts((17, 40, 9))

    def reference(sequence, start):
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([sequence])).logits[0].double().log_softmax(-1)
        return rows[start - 1 : len(sequence) - 1]

    for batch in (sequences, sequences[:2], sequences[1:], sequences[:1]):
        starts = [1, 5, 3][: len(batch)]
        for scores, sequence, start in zip(engine.score(batch, starts), batch, starts, strict=True):
            expected = reference(sequence, start).gather(1, torch.tensor(sequence[start:])[:, None])[:, 0]
            assert torch.allclose(scores.double(), expected, atol=1e-5)
    assert engine.tally.recompiles == 0
    layers = 2 if kind == "gemma2" else 1  # Gemma-2 has two kinds of them
    assert engine.tally.graphs == 2 * (layers + 1) + 1  # rows and lengths as symbols, single rows, both with a norm; and the head
    if kind == "llama":
        for rows, sequence in zip(engine.log_probs(sequences, [1, 1, 1]), sequences, strict=True):
            assert torch.allclose(rows.double(), reference(sequence, 1), atol=1e-5)


def test_a_batch_that_fits_reuses_a_bucket_and_a_larger_one_compiles_another(make_trial):
    model, tokenizer = tiny_model("llama")
    expected = plain_greedy(model, ragged_prompts((70, 5)), 8)
    engine, _ = engine_of(without_end(model), None, make_trial)
    engine.generate(ragged_prompts((5, 5)), new_tokens=8)
    assert engine.generate(ragged_prompts((70, 5)), new_tokens=8) == expected
    engine.generate(ragged_prompts((9,)), new_tokens=8)
    assert engine.tally.buckets == ["2 x 64", "2 x 128"]
    assert (engine.tally.graphs, engine.tally.recompiles) == (2, 0)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_tokens(make_trial):
    model, tokenizer = tiny_model("llama")
    prompts = ragged_prompts((5, 12))
    expected = plain_greedy(model, prompts, 12)
    engine, _ = engine_of(without_end(model), None, make_trial, backend="inductor")
    assert engine.generate(prompts, new_tokens=12) == expected


def test_layers_that_read_the_same_input_are_joined(make_trial, monkeypatch):
    model, tokenizer = tiny_model("llama")
    prompts = ragged_prompts((5, 12))
    expected = plain_greedy(model, prompts, 12)
    trial = make_trial("compile", compiling.CompileOptions(backend="eager"), STATIC)
    monkeypatch.setattr(trial, "device", "cuda")  # where it is done by default
    engine = compiling.build_engine(model=without_end(model), trial=trial)
    assert engine.generate(prompts, new_tokens=12) == expected
    facts = compiling.prove_effect(model=model, trial=trial)
    assert facts["fused_groups"] == 4
    assert "4 groups of projections joined" in facts["summary"]


def test_an_untouched_model_has_no_effect_to_show(make_trial):
    model, tokenizer = tiny_model("llama")
    facts = compiling.prove_effect(model=model, trial=make_trial("compile", compiling.CompileOptions()))
    assert facts["graphs"] == 0
    engine, trial = engine_of(model, tokenizer, make_trial, score=False)
    engine.score(ragged_prompts((5,)), [1])
    unused = compiling.prove_effect(model=model, trial=trial)
    assert unused["graphs"] == 0


def test_what_cannot_be_a_graph_is_refused_with_the_way_out(make_trial):
    model, tokenizer = tiny_model("llama")
    model.generation_config.no_repeat_ngram_size = 3
    engine, _ = engine_of(model, tokenizer, make_trial)
    with pytest.raises(UnavailableError, match="NoRepeatNGram.*leave out compile"):
        engine.generate(ragged_prompts((5,)), new_tokens=4)

    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)).eval()
    with pytest.raises(UnavailableError, match="no position_ids"):
        engine_of(bloom, tokenizer, make_trial)


def test_configure_names_what_is_missing(monkeypatch):
    from optkit.machine import detect

    machine = detect()
    claims = compiling.configure(options=compiling.CompileOptions(), task="generate", machine=machine)
    assert [(setting.name, setting.value, setting.strength) for setting in claims.settings] == [("generate.cache", "static", "must")]
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in compiling.what_is_missing(compiling.CompileOptions(), machine)
    assert compiling.what_is_missing(compiling.CompileOptions(backend="aot_eager"), machine) is None
