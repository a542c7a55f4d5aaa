"""cache: the same answers, repeats not computed, timed units cold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from optkit import TransformersEngine
from optkit.errors import PlanConflict
from optkit_plugins import cache
from tests.plugins.tiny import plain_greedy, ragged_prompts, tiny_model


class Recorder(TransformersEngine):
    """The default engine, noting what it was asked."""

    def __init__(self, model: Any, trial: Any):
        super().__init__(model, trial)
        self.asked: list[Any] = []
        self.begun = 0

    def begin_unit(self) -> None:
        self.begun += 1

    def generate(self, prompts: Any, *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        self.asked.append([list(prompt) for prompt in prompts])
        return super().generate(prompts, new_tokens=new_tokens, exact=exact)

    def score(self, sequences: Any, starts: Any) -> list[torch.Tensor]:
        self.asked.append([list(sequence) for sequence in sequences])
        return super().score(sequences, starts)


@pytest.fixture
def setup(make_trial: Any) -> Any:
    model, tokenizer = tiny_model("llama")

    def build(entries: int = 100) -> tuple[Any, Recorder, Any]:
        trial = make_trial("cache", cache.CacheOptions(entries=entries), tokenizer=tokenizer)
        inner = Recorder(model, trial)
        return cache.wrap_engine(engine=inner, trial=trial), inner, trial

    return build


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_texts_are_those_of_the_plain_loop(kind: str, make_trial: Any) -> None:
    model, tokenizer = tiny_model(kind)
    trial = make_trial("cache", cache.CacheOptions(), tokenizer=tokenizer)
    engine = cache.wrap_engine(engine=TransformersEngine(model, trial), trial=trial)
    one, two, three, four = ragged_prompts()
    expected = dict(zip("abcd", plain_greedy(model, [one, two, three, four], 6), strict=True))
    assert engine.generate([one, two, one], new_tokens=6, exact=True) == [expected["a"], expected["b"], expected["a"]]
    assert engine.generate([three, two, four], new_tokens=6, exact=True) == [expected["c"], expected["b"], expected["d"]]
    assert (engine.lookups, engine.hits) == (6, 2)


def test_only_unknown_requests_are_computed(setup: Any) -> None:
    engine, inner, _ = setup()
    one, two, three, _ = ragged_prompts()
    engine.generate([one, two, one], new_tokens=3)
    engine.generate([two, three], new_tokens=3)
    engine.generate([one, three], new_tokens=3)
    assert inner.asked == [[one, two], [three]]


def test_every_argument_is_part_of_the_request(setup: Any) -> None:
    engine, inner, _ = setup()
    prompt = ragged_prompts()[0]
    engine.generate([prompt], new_tokens=3)
    engine.generate([prompt], new_tokens=4)
    engine.generate([prompt], new_tokens=4, exact=True)
    engine.score([prompt], [1])
    engine.score([prompt], [2])
    assert len(inner.asked) == 5 and engine.hits == 0


def test_scores_are_remembered_and_cannot_be_spoilt(setup: Any) -> None:
    engine, inner, _ = setup()
    sequences = ragged_prompts()
    plain = TransformersEngine.score(copy.copy(inner), sequences, [1, 2, 1, 3])
    for _ in range(2):
        found = engine.score(sequences, [1, 2, 1, 3])
        assert all(torch.equal(new, old) for new, old in zip(found, plain, strict=True))
        found[0].zero_()  # the caller's copy, not the cache's
    assert len(inner.asked) == 1
    engine.generate(sequences[:1], new_tokens=3)[0].append(7)
    assert len(engine.generate(sequences[:1], new_tokens=3, exact=True)[0]) == 3


def test_the_least_recently_used_answer_goes_first(setup: Any) -> None:
    engine, inner, _ = setup(entries=2)
    one, two, three, _ = ragged_prompts()
    engine.generate([one, two], new_tokens=2)
    engine.generate([one], new_tokens=2)
    engine.generate([three], new_tokens=2)  # two goes
    engine.generate([one], new_tokens=2)
    engine.generate([two], new_tokens=2)
    assert inner.asked == [[one, two], [three], [two]]


def test_a_batch_larger_than_the_cache_is_answered_whole(setup: Any) -> None:
    engine, _, _ = setup(entries=1)
    prompts = ragged_prompts()
    engine.generate(prompts[:1], new_tokens=2)
    assert engine.generate(prompts, new_tokens=2) == setup()[0].generate(prompts, new_tokens=2)


def test_a_timed_unit_starts_cold(setup: Any) -> None:
    engine, inner, trial = setup()
    prompts = ragged_prompts()
    for _ in range(2):
        engine.begin_unit()
        engine.generate([*prompts, prompts[0]], new_tokens=2)
    assert inner.asked == [prompts, prompts] and inner.begun == 2
    facts = cache.prove_effect(trial=trial)
    assert (facts["lookups"], facts["hits"]) == (5, 1)


def test_without_repeats_the_facts_are_the_untouched_models(setup: Any, make_trial: Any) -> None:
    engine, _, trial = setup()
    engine.generate(ragged_prompts(), new_tokens=2)
    facts, untouched = cache.prove_effect(trial=trial), cache.prove_effect(trial=make_trial("cache", cache.CacheOptions()))
    assert facts.pop("summary") == "none of 4 requests came twice"
    untouched.pop("summary")
    assert facts == untouched


def test_the_wrapper_is_transparent(setup: Any) -> None:
    engine, inner, _ = setup()
    assert engine.name == "transformers" and engine.model is inner.model and engine.cannot_score is None
    rows = list(engine.log_probs([ragged_prompts()[0]], [1]))
    assert rows[0].shape == (4, 128)
    copy.copy(engine)
    engine.close()


def test_the_plan_applies_it() -> None:
    import optkit

    model, tokenizer = tiny_model("llama")
    optimized = optkit.optimize(model, tokenizer, plugins=["cache"])
    prompt = ragged_prompts()[0]
    first, second = optimized.generate([prompt, prompt], new_tokens=4)
    assert first == second and optimized.proof()["cache"]["facts"]["hits"] == 1
    optimized.close()


def test_random_output_is_refused() -> None:
    import optkit

    model, tokenizer = tiny_model("llama")
    with pytest.raises(PlanConflict, match="equal prompts are meant to get different texts"):
        optkit.optimize(model, tokenizer, plugins=["cache"], set={"generate.do_sample": True})
    assert "random-output" in cache.technique.refuses


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        cache.CacheOptions(entries=0)
