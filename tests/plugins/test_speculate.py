"""speculate: the same greedy texts in fewer forward passes, drafts that a plain search finds, and off where they do not pay."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from optkit import TransformersEngine, UnavailableError  # noqa: E402
from optkit.errors import PlanConflict  # noqa: E402
from optkit.machine import detect  # noqa: E402
from optkit.plan import Choice, make_plan  # noqa: E402
from optkit.proof import ACTIVE, NO_EFFECT, verdict  # noqa: E402
from optkit.registry import discover  # noqa: E402
from optkit.sources import bundled_folder  # noqa: E402
from optkit_plugins import speculate  # noqa: E402
from optkit_plugins.kernels.decode.loop import Sampler  # noqa: E402
from optkit_plugins.kernels.speculative import engine as speculative_engine  # noqa: E402
from optkit_plugins.kernels.speculative import payoff  # noqa: E402
from optkit_plugins.kernels.speculative.lookup import SpeculativeSlot  # noqa: E402
from optkit_plugins.kernels.speculative.payoff import Payoff  # noqa: E402
from tests.plugins.tiny import KINDS, plain_greedy, ragged_prompts, tiny_model  # noqa: E402

CPU = dataclasses.replace(detect(), device="cpu")
SHARED = Path(os.environ.get("OPTKIT_SHARED", Path(__file__).parents[3] / "shared"))
#: Ragged, and each twice over, so that a draft is found from the first step on.
PROMPTS = [prompt * 2 for prompt in ragged_prompts()]


def engine_of(model, tokenizer, make_trial, values=None, **options):
    """The engine of a plan with these options, and its trial. Drafts stay on, whatever this machine's clock says, unless asked."""
    chosen = speculate.SpeculateOptions(**{"adaptive": False} | options)
    claims = speculate.configure(options=chosen, task="generate", machine=CPU)
    wished = {setting.name: setting.value for setting in claims.settings}
    trial = make_trial("speculate", chosen, wished | (values or {}), tokenizer=tokenizer)
    trial.engine = speculate.wrap_engine(engine=TransformersEngine(model, trial), trial=trial)
    return trial.engine, trial


def plain_engine(model, tokenizer, make_trial, values=None):
    return TransformersEngine(model, make_trial("speculate", None, values, tokenizer=tokenizer))


def without_end(model):
    model.generation_config.eos_token_id = None
    return model


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batches_get_the_tokens_of_a_plain_loop_without_cache(kind, make_trial):
    model, _ = tiny_model(kind)
    expected = plain_greedy(model, PROMPTS, 40)
    engine, _ = engine_of(without_end(model), None, make_trial)
    assert engine.generate(PROMPTS, new_tokens=40) == expected
    assert engine.payoff.accepted > 0
    assert engine.payoff.passes < engine.payoff.plain_passes == 39


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("ngram", [1, 4])
def test_neither_the_draft_s_length_nor_the_match_s_changes_the_text(tokens, ngram, make_trial):
    model, _ = tiny_model("gemma2")  # layers with a window of 8 tokens beside full ones
    expected = plain_greedy(model, PROMPTS, 25)
    engine, _ = engine_of(without_end(model), None, make_trial, tokens=tokens, ngram=ngram)
    assert engine.generate(PROMPTS, new_tokens=25) == expected


def test_eager_attention_gets_an_additive_mask(make_trial):
    model, _ = tiny_model("llama")
    model.set_attn_implementation("eager")
    expected = plain_greedy(model, PROMPTS[:2], 20)
    engine, _ = engine_of(without_end(model), None, make_trial)
    assert engine.generate(PROMPTS[:2], new_tokens=20) == expected


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_a_text_may_end_at_the_model_s_last_position(kind, make_trial):
    """Drafts reach beyond it, where learned positions have no row."""
    model, _ = tiny_model(kind, **({"n_positions": 32} if kind == "gpt2" else {"max_position_embeddings": 32}))
    prompts = [[7, 8, 9] * 4, [5, 6] * 6]
    expected = plain_greedy(model, prompts, 20)
    engine, _ = engine_of(without_end(model), None, make_trial, tokens=8)
    assert engine.generate(prompts, new_tokens=20) == expected


def test_texts_end_where_generate_ends_them_also_inside_a_draft(make_trial):
    model, tokenizer = tiny_model("qwen3", seed=3)
    longest = plain_greedy(model, PROMPTS, 40)
    ends = sorted({longest[0][4], longest[1][9], longest[2][30]})
    model.generation_config.eos_token_id = ends
    expected = plain_engine(model, tokenizer, make_trial).generate(PROMPTS, new_tokens=40)
    engine, _ = engine_of(model, tokenizer, make_trial)
    assert engine.generate(PROMPTS, new_tokens=40) == expected
    assert any(len(row) < 40 for row in expected)
    looping = [PROMPTS[0] + longest[0][:5] * 4]  # the end is in the draft, and what follows it there must not be kept
    expected = plain_engine(model, tokenizer, make_trial).generate(looping, new_tokens=40)
    assert engine.generate(looping, new_tokens=40) == expected


def test_with_exact_no_token_ends_a_text(make_trial):
    model, tokenizer = tiny_model("qwen3", seed=3)
    model.generation_config.eos_token_id = plain_greedy(model, PROMPTS[:2], 4)[0][3]
    expected = plain_engine(model, tokenizer, make_trial).generate(PROMPTS[:2], new_tokens=16, exact=True)
    engine, _ = engine_of(model, tokenizer, make_trial)
    assert engine.generate(PROMPTS[:2], new_tokens=16, exact=True) == expected
    assert [len(row) for row in expected] == [16, 16]
    assert engine.generate(PROMPTS[:2], new_tokens=1, exact=True) == [row[:1] for row in expected]
    assert engine.generate([], new_tokens=4) == []


def test_the_repetition_penalty_counts_drafted_tokens_from_their_place_on(make_trial):
    model, tokenizer = tiny_model("llama")
    values = {"generate.repetition_penalty": 1.2}
    default = plain_engine(without_end(model), tokenizer, make_trial, values)
    alone = [default.generate([prompt], new_tokens=40)[0] for prompt in PROMPTS]  # padding would count as a used token
    engine, _ = engine_of(model, tokenizer, make_trial, values)
    assert engine.generate(PROMPTS, new_tokens=40) == alone
    assert engine.payoff.accepted > 0


def test_drawn_tokens_have_the_model_s_distribution(make_trial):
    """The third token is drawn behind drafts that are sometimes right: its distribution must not know."""
    model, _ = tiny_model("llama", spread=2.0)
    values = {"generate.do_sample": True, "generate.temperature": 0.7, "generate.top_k": 3}
    prompt = ragged_prompts((6,))[0]
    prompt = [*prompt, *plain_greedy(model, [prompt], 60)[0]]  # a loop by now, so that some drafts are right

    def distribution(ids):
        with torch.no_grad():
            top = (model(input_ids=torch.tensor([ids])).logits[0, -1].double() / 0.7).topk(3)
        return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))

    third = {}
    for first, p in distribution(prompt).items():
        for second, q in distribution([*prompt, first]).items():
            for last, r in distribution([*prompt, first, second]).items():
                third[last] = third.get(last, 0.0) + p * q * r
    torch.manual_seed(0)
    engine, _ = engine_of(without_end(model), None, make_trial, values, tokens=2)
    drawn = [row[2] for _ in range(8) for row in engine.generate([prompt] * 512, new_tokens=3)]
    assert set(drawn) <= third.keys()
    assert 0 < engine.payoff.accepted < engine.payoff.drafted
    for token, share in third.items():  # 4096 draws: a standard error is at most 0.008
        assert drawn.count(token) / len(drawn) == pytest.approx(share, abs=0.035)


# ---------------------------------------------------------------- drafts


def plain_lookup(text, drafts, ngram):
    """What followed the last place with the longest match (up to ``ngram`` tokens) of the text's end; a loop goes on."""

    def run(end):
        count = 0
        while count < ngram and count <= end and text[end - count] == text[-1 - count]:
            count += 1
        return count

    best = max(range(len(text) - 1), key=lambda end: (run(end), end))
    following = text[best + 1 :]
    return [following[index % len(following)] for index in range(drafts)], run(best) > 0


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(3, 6), min_size=2, max_size=20), min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 4))
def test_the_draft_is_what_a_plain_search_finds(texts, drafts, ngram):
    width = max(map(len, texts))
    slot = SpeculativeSlot(MODEL, len(texts), width + drafts + 4, Sampler(), (), drafts=drafts, ngram=ngram)
    slot.texts.fill_(5)  # what lies before and behind a text must not be found
    for row, text in enumerate(texts):
        slot.texts[row, width - len(text) : width] = torch.tensor(text)
        slot.start[row], slot.column[row] = width - len(text), width - 1
    draft, found = slot.lookup()
    expected = [plain_lookup(text, drafts, ngram) for text in texts]
    assert found[:, 0].tolist() == [hit for _, hit in expected]
    for row, (ids, hit) in zip(draft.tolist(), expected, strict=True):
        assert not hit or row == ids


MODEL, _ = tiny_model("llama")


# ---------------------------------------------------------------- does it pay?


def steps(chooser, draft, plain, count):
    """``count`` steps that cost and make what is told. :return: how many had a draft."""
    drafted = 0
    for _ in range(count):
        if chooser.wants_draft():
            chooser.draft(*draft)
            drafted += 1
        else:
            chooser.plain(plain)
    return drafted


def test_drafts_stay_on_while_they_make_more_tokens_a_second():
    chooser = Payoff()
    assert steps(chooser, (1.6, 1.5), 1.0, 1000) == 1000 - payoff.PLAIN_STEPS
    assert chooser.switched_off == 0


def test_drafts_go_off_where_they_do_not_pay_and_are_tried_again_more_and_more_rarely():
    chooser = Payoff()
    drafted = steps(chooser, (1.4, 1.5), 1.0, 3970)
    assert chooser.reason == "1.40 tokens a step that costs 1.50 plain ones"
    assert chooser.switched_off == 4  # pauses of 256, 512, 1024 and 2048 steps
    assert drafted == 4 * payoff.TRIAL_STEPS
    chooser.pause = 0
    assert steps(chooser, (3.0, 1.5), 1.0, 500) == 500  # other texts
    assert chooser.next_pause == payoff.PAUSE_STEPS
    assert steps(Payoff(adaptive=False), (1.0, 9.0), 1.0, 100) == 100


def test_the_engine_measures_its_own_steps_and_the_text_stays_the_same(make_trial, monkeypatch):
    model, _ = tiny_model("llama")
    clock = [0.0]

    class Slow(SpeculativeSlot):
        def verify(self, draft):
            clock[0] += 1.0 + 30 * (draft.shape[1] > 0)
            super().verify(draft)

    monkeypatch.setattr(speculative_engine, "SpeculativeSlot", Slow)
    monkeypatch.setattr(speculative_engine.time, "perf_counter", lambda: clock[0])
    expected = plain_greedy(model, PROMPTS, 90)
    engine, trial = engine_of(without_end(model), None, make_trial, adaptive=True)
    assert engine.generate(PROMPTS, new_tokens=90) == expected
    assert engine.payoff.switched_off == 1
    assert "costs 31.00 plain ones" in speculate.prove_effect(trial=trial)["summary"]


# ---------------------------------------------------------------- proof and plan


def test_accepted_tokens_are_proven_and_none_is_no_effect(make_trial):
    model, _ = tiny_model("llama")
    baseline_trial = make_trial("speculate", None)
    baseline_trial.engine = TransformersEngine(model, baseline_trial)
    baseline = speculate.prove_effect(trial=baseline_trial)
    engine, trial = engine_of(without_end(model), None, make_trial)
    engine.generate([[9, 10]], new_tokens=1)
    assert verdict(speculate.prove_effect(trial=trial), {}, baseline)["verdict"] == NO_EFFECT
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    engine.generate(PROMPTS[:1], new_tokens=40)
    handle.remove()
    facts = speculate.prove_effect(trial=trial)
    assert facts["passes"] == len(calls) - 1  # and one for the prompt
    assert facts["passes_saved"] == 39 - facts["passes"] == facts["accepted_tokens"] > 0
    assert verdict(facts, {}, baseline)["verdict"] == ACTIVE


def refusals(*names, **options):
    with pytest.raises(PlanConflict) as refused:
        make_plan(discover(), CPU, "generate", [Choice(name, options.get(name.replace("-", "_"), {})) for name in names])
    return " ".join(refused.value.conflicts)


def test_what_cannot_verify_drafts_is_refused_by_property_or_setting():
    assert "'many-paths'" in refusals("speculate", "sampling", sampling={"num_beams": 3})
    assert "'draft-tokens'" in refusals("speculate", "kv-cache", kv_cache={"kind": "sliding"})
    assert "no_repeat_ngram_size" in refusals("speculate", "sampling", sampling={"no_repeat_ngram_size": 3})
    plan = make_plan(discover(), CPU, "generate", [Choice("speculate", {"tokens": 7, "ngram": 3}), Choice("batching", {})])
    assert (plan.settings["generate.prompt_lookup_tokens"], plan.settings["generate.prompt_lookup_ngram"]) == (7, 3)
    assert not plan.lossy
    for wrong in ({"tokens": 0}, {"ngram": 0}, {"ngram": 99}, {"length": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            speculate.SpeculateOptions(**wrong)


def test_another_engine_and_what_the_loop_cannot_do_are_refused_with_the_way_out(make_trial):
    model, tokenizer = tiny_model("llama")

    class Remote(TransformersEngine):
        name = "remote"

    trial = make_trial("speculate", speculate.SpeculateOptions())
    with pytest.raises(UnavailableError, match="this plan has 'remote'; leave out"):
        speculate.wrap_engine(engine=Remote(model, trial), trial=trial)
    model.generation_config.no_repeat_ngram_size = 2
    engine, _ = engine_of(model, tokenizer, make_trial)
    with pytest.raises(UnavailableError, match="speculate does not do NoRepeatNGram.*leave out speculate"):
        engine.generate(PROMPTS[:1], new_tokens=4)


# ---------------------------------------------------------------- trained models: random ones loop, and say nothing about gain


def trained(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval(), AutoTokenizer.from_pretrained(folder)


def saved(model, tokenizer, prompts, make_trial):
    """Share of the forward passes that are saved, one prompt a batch; the texts must be the default engine's."""
    engine, _ = engine_of(model, tokenizer, make_trial)
    plain = plain_engine(model, tokenizer, make_trial)
    for prompt in prompts:
        assert engine.generate([prompt], new_tokens=96) == plain.generate([prompt], new_tokens=96)
    return 1 - engine.payoff.passes / engine.payoff.plain_passes


def test_the_bundled_model_copies_names_from_its_prompt(make_trial):
    model, tokenizer = trained(bundled_folder())
    lines = (bundled_folder() / "samples" / "names.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    assert 0.15 < saved(model, tokenizer, prompts, make_trial) < 0.8


def test_stories_repeat_themselves_in_part(make_trial):
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    model, tokenizer = trained(folder)
    lines = (SHARED / "data" / "tinystories" / "embed_eval.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    prompts = [tokenizer(json.loads(line)["text"])["input_ids"][:80] for line in lines]
    assert 0.1 < saved(model, tokenizer, prompts, make_trial) < 0.8
