"""sampling: options become settings with their properties, and the proof shows what generation really used."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from optkit import TransformersEngine  # noqa: E402
from optkit.machine import detect  # noqa: E402
from optkit_plugins import sampling  # noqa: E402
from tests.plugins.tiny import ragged_prompts, tiny_model  # noqa: E402


def claims_of(**options):
    return sampling.configure(options=sampling.SamplingOptions(**options), task="generate", machine=detect())


def settings_of(claims):
    return {setting.name.removeprefix("generate."): setting.value for setting in claims.settings}


def trial_of(model, make_trial, **options):
    claims = claims_of(**options)
    settings = {setting.name: setting.value for setting in claims.settings}
    trial = make_trial("sampling", sampling.SamplingOptions(**options), settings)
    trial.engine = TransformersEngine(model, trial)
    return trial


@pytest.mark.parametrize(
    ("options", "drawn", "properties"),
    [
        ({}, True, {"random-output"}),
        ({"temperature": 0.7}, True, {"random-output"}),
        ({"top_p": 0.9, "repetition_penalty": 1.2}, True, {"random-output"}),
        ({"repetition_penalty": 1.2}, False, set()),
        ({"num_beams": 4}, False, {"many-paths"}),
        ({"num_beams": 4, "top_k": 5}, True, {"random-output", "many-paths"}),
        ({"num_beams": 1}, False, set()),
    ],
)
def test_options_say_whether_tokens_are_drawn_and_which_properties_follow(options, drawn, properties):
    claims = claims_of(**options)
    assert settings_of(claims) == options | {"do_sample": drawn}
    assert claims.adds == properties
    assert claims.problem is None
    assert {setting.strength for setting in claims.settings} == {"must"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"do_sample": False, "temperature": 0.5}, "do_sample=true"), ({"length_penalty": 2.0}, "num_beams to 2")],
)
def test_what_nothing_would_read_is_refused(options, message):
    assert message in claims_of(**options).problem


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 1.5}, {"top_k": 0}, {"num_beams": 0}, {"tempreature": 1}])
def test_options_are_validated(options):
    with pytest.raises(ValueError):
        sampling.SamplingOptions(**options)


def test_structured_answers_are_warned_about():
    assert "JSON" in claims_of(no_repeat_ngram_size=3).notes[0]


def test_the_proof_shows_the_values_in_use_beside_greedy_ones(make_trial):
    model, _ = tiny_model("llama")
    baseline = make_trial("sampling", sampling.SamplingOptions())
    baseline.engine = TransformersEngine(model, baseline)
    untouched = sampling.prove_effect(model=model, trial=baseline)
    assert (untouched["do_sample"], untouched["summary"]) == (False, "greedy")
    facts = sampling.prove_effect(model=model, trial=trial_of(model, make_trial, temperature=0.7, top_k=5))
    assert (facts["do_sample"], facts["temperature"], facts["top_k"]) == (True, 0.7, 5)
    neutral = sampling.prove_effect(model=model, trial=trial_of(model, make_trial, num_beams=1))
    assert neutral == untouched


def test_a_draw_among_one_token_is_the_greedy_text_and_beams_are_more_probable(make_trial):
    model, _ = tiny_model("qwen3")
    model.generation_config.eos_token_id = None
    prompts = ragged_prompts((6, 9))
    greedy = TransformersEngine(model, make_trial("sampling", None)).generate(prompts, new_tokens=6)
    assert trial_of(model, make_trial, top_k=1).engine.generate(prompts, new_tokens=6) == greedy
    scorer = TransformersEngine(model, make_trial("sampling", None))

    def probability(rows):
        sequences = [prompt + row for prompt, row in zip(prompts, rows, strict=True)]
        return sum(float(scores.sum()) for scores in scorer.score(sequences, [len(prompt) for prompt in prompts]))

    beams = trial_of(model, make_trial, num_beams=8).engine.generate(prompts, new_tokens=6)
    assert probability(beams) > probability(greedy)
