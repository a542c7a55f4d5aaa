"""batching: every sample exactly once, less padding, and the same loss as in file order."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from optkit import Sample, TransformersEngine, UnavailableError  # noqa: E402
from optkit.machine import detect  # noqa: E402
from optkit_plugins import batching  # noqa: E402
from tests.plugins.tiny import KINDS, ragged_prompts, tiny_model  # noqa: E402

CPU = dataclasses.replace(detect(), device="cpu")
LENGTHS = (30, 4, 17, 9, 41, 4, 22, 12, 3, 28, 8)


def samples_of(lengths=LENGTHS):
    return [Sample(id=str(index), text="", answer_ids=ids) for index, ids in enumerate(ragged_prompts(lengths))]


def trial_of(make_trial, task="score", settings=None, **options):
    chosen = batching.BatchingOptions(**options)
    claims = batching.configure(options=chosen, task=task, machine=CPU)
    assert claims.problem is None
    wished = {setting.name: setting.value for setting in claims.settings}
    return make_trial("batching", chosen, {"batch.size": 4} | (settings or {}) | wished, task=task, machine=CPU)


def scores_of(engine, samples, batches):
    """Sample -> log probabilities, scored in these batches."""
    found = {}
    for batch in batches:
        rows = engine.score([samples[index].answer_ids for index in batch], [1] * len(batch))
        found |= dict(zip(batch, rows, strict=True))
    return [found[index] for index in range(len(samples))]


@pytest.mark.parametrize("kind", ["fixed", "length", "length-size", "packed", "largest"])
def test_the_loss_is_that_of_each_sample_alone(kind, make_trial):
    model, _ = tiny_model("llama")
    samples, trial = samples_of(), trial_of(make_trial, kind=kind)
    engine = TransformersEngine(model, trial)
    trial.engine = batching.wrap_engine(engine=engine, trial=trial) or engine
    batches = batching.batch_strategy(samples=samples, trial=trial)
    assert sorted(index for batch in batches for index in batch) == list(range(len(samples)))
    for scores, sample in zip(scores_of(trial.engine, samples, batches), samples, strict=True):
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([sample.answer_ids])).logits[0, :-1].log_softmax(-1)
        alone = rows.gather(1, torch.tensor(sample.answer_ids[1:])[:, None])[:, 0]
        assert torch.allclose(scores, alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_samples_do_not_see_each_other_in_any_architecture(kind, make_trial):
    model, _ = tiny_model(kind)
    samples, trial = samples_of(), trial_of(make_trial, kind="packed", tokens=64)
    plain = TransformersEngine(model, trial)
    packed = batching.wrap_engine(engine=plain, trial=trial)
    batches = batching.batch_strategy(samples=samples, trial=trial)
    assert max(len(batch) for batch in batches) > 2
    alone = scores_of(plain, samples, [[index] for index in range(len(samples))])
    for got, expected in zip(scores_of(packed, samples, batches), alone, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


def test_packed_rows_work_with_eager_attention(make_trial):
    model, _ = tiny_model("llama")
    model.set_attn_implementation("eager")
    samples, trial = samples_of((9, 5, 7)), trial_of(make_trial, kind="packed")
    plain = TransformersEngine(model, trial)
    packed = batching.wrap_engine(engine=plain, trial=trial)
    together = scores_of(packed, samples, [[0, 1, 2]])
    for got, expected in zip(together, scores_of(plain, samples, [[0], [1], [2]]), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


lengths = st.lists(st.integers(1, 60), max_size=40)


@given(lengths, st.integers(1, 200), st.integers(0, 20))
def test_a_budget_is_kept_and_nothing_is_lost(lengths, budget, new_tokens):
    batches = batching.within_budget(lengths, budget, new_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (max(lengths[index] for index in batch) + new_tokens) <= budget


@given(lengths, st.integers(1, 200))
def test_packed_rows_hold_their_tokens_and_nothing_is_lost(lengths, tokens):
    rows = batching.first_fit(lengths, tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[index] for index in row) <= tokens


@given(lengths, st.integers(1, 9))
def test_whole_batches_by_length_pad_no_more_than_file_order(lengths, size):
    lengths = lengths[: len(lengths) // size * size]  # a last batch of fewer samples may happen to lie better in file order
    by_length = batching.chunks(batching.longest_first(lengths), size)
    assert batching.padding(by_length, lengths) <= batching.padding(batching.chunks(range(len(lengths)), size), lengths)


class Memory:
    """An engine whose batches take a known number of bytes a sample, and which runs out of memory above a limit."""

    name = "memory"

    def __init__(self, limit):
        self.limit, self.sizes = limit, []

    def score(self, sequences, starts):
        self.sizes.append(len(sequences))
        if len(sequences) > self.limit:
            raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(("limit", "free", "expected"), [(5, 10**9, 4), (100, 10**9, 11), (100, 300, 2), (0, 10**9, 1)])
def test_the_largest_batch_is_found_without_running_out_for_good(limit, free, expected, make_trial, monkeypatch):
    trial = trial_of(make_trial, kind="largest")
    trial.engine = engine = Memory(limit)
    measured = batching.bytes_of_batch
    monkeypatch.setattr(batching, "free_memory", lambda trial: free)
    monkeypatch.setattr(batching, "bytes_of_batch", lambda work, device: None if measured(work, device) is None else 100 * engine.sizes[-1])
    batches = batching.batch_strategy(samples=samples_of(), trial=trial)
    assert max(map(len, batches)) == expected
    tries = len(engine.sizes)
    assert batching.batch_strategy(samples=samples_of(), trial=trial) == batches
    assert len(engine.sizes) == tries  # found once


def test_another_runtime_error_is_not_taken_for_memory():
    def broken():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        batching.bytes_of_batch(broken, "cpu")


def test_file_order_is_no_effect_and_another_order_is_proven(make_trial):
    model = None
    untouched = batching.prove_effect(model=model, trial=make_trial("batching", None, {"batch.size": 4}))
    fixed, by_length = trial_of(make_trial, kind="fixed"), trial_of(make_trial, kind="length")
    for trial in (fixed, by_length):
        batching.batch_strategy(samples=samples_of(), trial=trial)
    assert batching.prove_effect(model=model, trial=fixed) == untouched
    facts = batching.prove_effect(model=model, trial=by_length)
    assert facts["padding"] < facts["padding_in_file_order"]


def test_generation_is_sorted_by_prompt(make_trial):
    samples = [Sample(id="a", prompt="", prompt_ids=[3] * 2, answer_ids=[3] * 50), Sample(id="b", prompt="", prompt_ids=[3] * 9)]
    trial = trial_of(make_trial, task="generate", kind="length")
    assert batching.batch_strategy(samples=samples, trial=trial) == [[1, 0]]


class Slots:
    """An engine that decodes in slots and tells what it did."""

    name = "slots"
    slot_facts = {"slots": 4, "refills": 2, "busy": 0.75, "shared_prefix_tokens": 30, "out_of_memory": 1}


def test_continuous_hands_everything_to_an_engine_with_slots_and_shows_what_it_did(make_trial):
    trial = trial_of(make_trial, task="generate", kind="continuous", size=4)
    assert trial.settings["generate.slots"] == 4
    engine = Slots()
    assert batching.wrap_engine(engine=engine, trial=trial) is None
    assert batching.batch_strategy(samples=samples_of(), trial=trial) == [list(range(len(LENGTHS)))]
    assert batching.batch_strategy(samples=[], trial=trial) == []
    facts = batching.prove_effect(model=None, trial=trial)
    assert engine.slot_facts.items() <= facts.items()
    assert (
        facts["summary"]
        == "4 slots, filled again 2 times, 75% of their steps gave a token, 30 prompt tokens copied, memory ran out 1 times"
    )


def test_an_engine_without_slots_is_refused_with_the_way_out(make_trial):
    model, _ = tiny_model("llama")
    trial = trial_of(make_trial, task="generate", kind="continuous")
    assert trial.settings["generate.slots"] == batching.SLOTS["cpu"]
    with pytest.raises(UnavailableError, match="honours generate.slots"):
        batching.wrap_engine(engine=TransformersEngine(model, trial), trial=trial)


def test_a_plan_refuses_slots_that_its_engine_does_not_read():
    from optkit.errors import PlanConflict
    from optkit.plan import Choice, make_plan
    from optkit.registry import discover

    registry = discover()
    choices = [Choice("batching", {"kind": "continuous"})]
    plan = make_plan(registry, CPU, "generate", [*choices, Choice("compile", {"backend": "eager"})])
    assert plan.settings["generate.slots"] == batching.SLOTS["cpu"]
    with pytest.raises(PlanConflict, match=r"'generate.slots' = 16 \(batching\) is not read by onnx.*leave out onnx, or batching"):
        make_plan(registry, CPU, "generate", [*choices, Choice("onnx")])


def test_what_nothing_would_read_is_refused(make_trial):
    def problem(task="score", **options):
        return batching.configure(options=batching.BatchingOptions(**options), task=task, machine=CPU).problem

    assert "batching.kind=length" in problem("generate", kind="packed")
    assert "batching.kind=packed" in problem("score", kind="continuous")
    assert "length-size" in problem("generate", kind="continuous", tokens=100)
    assert "length-size" in problem(kind="length", tokens=100)
    assert "batching.tokens" in problem(kind="packed", size=4)
    with pytest.raises(ValueError, match="size"):
        batching.BatchingOptions(size=0)
    assert batching.configure(options=batching.BatchingOptions(kind="packed"), task="score", machine=CPU).adds == {"positions-restart"}
    trial = trial_of(make_trial, kind="packed")
    with pytest.raises(UnavailableError, match="need the default engine"):
        batching.wrap_engine(engine=Memory(1), trial=trial)
