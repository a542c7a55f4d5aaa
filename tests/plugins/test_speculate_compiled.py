"""speculate under compile: draft, verification and acceptance in one graph, with the tokens of a plain loop."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from optkit import TransformersEngine, UsageError  # noqa: E402
from optkit_plugins import compile as compiling  # noqa: E402
from optkit_plugins import speculate  # noqa: E402
from optkit_plugins.kernels.attention.interface import by_spans  # noqa: E402
from tests.plugins.tiny import KINDS, plain_greedy, ragged_prompts, tiny_model  # noqa: E402

#: Ragged, and each twice over, so that a draft is found from the first step on.
PROMPTS = [prompt * 2 for prompt in ragged_prompts()]


def plain_engine(model, tokenizer, make_trial):
    return TransformersEngine(model, make_trial("speculate", None, tokenizer=tokenizer))


def without_end(model):
    model.generation_config.eos_token_id = None
    return model


def compiled_engine_of(model, tokenizer, make_trial, values=None, **options):
    chosen = compiling.CompileOptions(**{"backend": "eager"} | options)
    wished = {"generate.cache": "static", "generate.prompt_lookup_tokens": 5, "generate.prompt_lookup_ngram": 2}
    trial = make_trial("compile", chosen, wished | (values or {}), tokenizer=tokenizer)
    engine = compiling.build_engine(model=model, trial=trial)
    own = make_trial("speculate", speculate.SpeculateOptions(adaptive=False), engine=engine)
    assert speculate.wrap_engine(engine=engine, trial=own) is None  # it drafts by itself
    return engine, own


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_with_drafts_get_the_tokens_of_a_plain_loop(kind, make_trial):
    model, _ = tiny_model(kind)
    expected = plain_greedy(model, PROMPTS, 30)
    engine, trial = compiled_engine_of(without_end(model), None, make_trial)
    assert engine.generate(PROMPTS, new_tokens=30) == expected
    assert engine.generate(PROMPTS[:3], new_tokens=30) == expected[:3]  # a row of the bucket stays empty
    assert (engine.tally.graphs, engine.tally.graph_breaks, engine.tally.recompiles) == (1, 0, 0)
    assert engine.payoff.passes < engine.payoff.plain_passes
    assert speculate.prove_effect(trial=trial)["accepted_tokens"] > 0


def test_compiled_drafts_and_plain_steps_take_turns_on_the_same_text(make_trial, monkeypatch):
    model, tokenizer = tiny_model("qwen3", seed=3)
    longest = plain_greedy(model, PROMPTS, 40)
    model.generation_config.eos_token_id = [longest[0][14], longest[1][29]]
    expected = plain_engine(model, tokenizer, make_trial).generate(PROMPTS, new_tokens=60)
    engine, _ = compiled_engine_of(model, tokenizer, make_trial)
    turns = iter([True, False, False] * 100)
    monkeypatch.setattr(engine.payoff, "wants_draft", lambda: next(turns))
    assert engine.generate(PROMPTS, new_tokens=60) == expected
    assert engine.tally.graphs == 2
    exact = plain_engine(model, tokenizer, make_trial).generate(PROMPTS[:1], new_tokens=24, exact=True)
    assert engine.generate(PROMPTS[:1], new_tokens=24, exact=True) == exact
    assert engine.generate(PROMPTS[:1], new_tokens=1, exact=True) == [exact[0][:1]]


def test_continuous_batching_and_drafts_are_not_read_together(make_trial):
    model, tokenizer = tiny_model("llama")
    with pytest.raises(UsageError, match="leave one of them out"):
        compiled_engine_of(model, tokenizer, make_trial, {"generate.slots": 2})


@pytest.mark.parametrize("rows", [1, 3])
def test_several_queries_of_a_row_attend_by_their_own_spans(rows):
    """What the step with a draft gives to the kernel for true lengths, against a mask and SDPA."""
    torch.manual_seed(0)
    length, columns = 4, 24
    query, keys, values = torch.randn(rows, 8, length, 16), torch.randn(rows, 2, columns, 16), torch.randn(rows, 2, columns, 16)
    last = torch.tensor([5, 19, 9])[:rows, None] + torch.arange(length)
    first = torch.tensor([2, 0, 7])[:rows, None].expand_as(last)
    attend = by_spans(lambda *_, **__: pytest.fail("the spans were not used"), None)
    got, _ = attend(torch.nn.Module(), query, keys, values, torch.stack([first, last])[..., None])
    at = torch.arange(columns)
    mask = (at >= first[..., None]) & (at <= last[..., None])
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask[:, None], enable_gqa=True)
    assert torch.allclose(got, expected.transpose(1, 2), atol=1e-5)
