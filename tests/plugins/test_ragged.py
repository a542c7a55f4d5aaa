"""Continuous batching: each prompt's tokens are those of ``model.generate`` for it alone, whatever shares the rows and whenever they are
filled again."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from optkit import TransformersEngine, UnavailableError  # noqa: E402
from optkit_plugins import compile as compiling  # noqa: E402
from optkit_plugins.kernels.attention.interface import by_spans  # noqa: E402
from optkit_plugins.kernels.ragged import engine as ragged_engine  # noqa: E402
from optkit_plugins.kernels.ragged.schedule import Schedule, shared_prefixes  # noqa: E402
from tests.plugins.tiny import KINDS, plain_greedy, ragged_prompts, tiny_model  # noqa: E402

LENGTHS = (5, 12, 3, 30, 1, 9, 7, 22, 6)


def engine_of(model, make_trial, settings=None, *, tokenizer=None, slots=4, wave_tokens=40, backend="eager", **options):
    """An engine with small waves, so that prompts are read in several."""
    chosen = compiling.CompileOptions(backend=backend, **options)
    wanted = {"generate.cache": "static", "generate.slots": slots} | (settings or {})
    trial = make_trial("compile", chosen, wanted, tokenizer=tokenizer)
    engine = compiling.build_engine(model=model, trial=trial)
    engine.wave_tokens = wave_tokens
    return engine, trial


def take_spans(engine):
    """Decode attention over each row's own columns, which a GPU takes, computed by its plain twin."""
    AttentionInterface.register("spans_for_test", by_spans(ALL_ATTENTION_FUNCTIONS["sdpa"], torch.zeros(64, dtype=torch.int32)))
    AttentionMaskInterface.register("spans_for_test", sdpa_mask)
    engine.attention.spans, engine.attention.names["decode"] = True, "spans_for_test"


def alone(model, trial, prompts, new_tokens, **arguments):
    """What ``generate`` answers to each prompt by itself, without padding."""
    default = TransformersEngine(model, trial)
    return [default.generate([prompt], new_tokens=new_tokens, **arguments)[0] for prompt in prompts]


def without_end(model):
    """The model, so that no text ends early: every row has all its tokens to compare."""
    model.generation_config.eos_token_id = None
    return model


def read_tokens(engine, monkeypatch):
    """A list that grows by the packed tokens of each reading."""
    sizes = []
    read = ragged_engine.RaggedSlot.read

    def counted(slot, wave, prompts, limits, by_layers):
        sizes.append(sum(len(prompts[one.index]) - one.shared for one in wave))
        read(slot, wave, prompts, limits, by_layers)

    monkeypatch.setattr(ragged_engine.RaggedSlot, "read", counted)
    return sizes


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch.compiler.reset()


# ---------------------------------------------------------------- the same tokens


@pytest.mark.parametrize(
    ("kind", "attention"), [(kind, "masks") for kind in KINDS] + [(kind, "spans") for kind in ("llama", "gemma2", "gpt2")]
)
def test_more_prompts_than_slots_get_the_tokens_of_a_plain_loop(kind, attention, make_trial):
    model, _ = tiny_model(kind)
    prompts = ragged_prompts(LENGTHS)
    expected = plain_greedy(model, prompts, 12)
    engine, _ = engine_of(without_end(model), make_trial)
    if attention == "spans":
        take_spans(engine)
    assert engine.generate(prompts, new_tokens=12) == expected
    assert engine.generate(prompts[:3], new_tokens=9, exact=True) == [row[:9] for row in expected[:3]]
    assert (engine.tally.graphs, engine.tally.graph_breaks, engine.tally.recompiles) == (1, 0, 0)
    assert engine.slot_facts["refills"] == 2
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2"])
def test_texts_end_where_generate_ends_them(kind, make_trial):
    model, tokenizer = tiny_model(kind, seed=3)
    prompts = ragged_prompts(LENGTHS)
    longest = plain_greedy(model, prompts, 24)
    model.generation_config.eos_token_id = sorted({longest[0][4], longest[1][9], longest[3][0]})  # they really come up, one at once
    engine, trial = engine_of(model, make_trial, tokenizer=tokenizer)
    expected = alone(model, trial, prompts, 24)
    assert engine.generate(prompts, new_tokens=24) == expected
    assert len({len(row) for row in expected}) > 1
    some = prompts[:6]
    assert engine.generate(some, new_tokens=24, exact=True) == alone(model, trial, some, 24, exact=True)
    assert (engine.tally.graphs, engine.tally.recompiles) == (1, 0)


def test_each_prompt_has_a_limit_of_its_own(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    prompts, limits = ragged_prompts(LENGTHS), [1, 17, 3, 8, 25, 2, 2, 9, 1]
    expected = [row[:limit] for row, limit in zip(plain_greedy(model, prompts, max(limits)), limits, strict=True)]
    engine, _ = engine_of(without_end(model), make_trial, slots=3)
    assert engine.generate_up_to(prompts, limits) == expected


def test_a_sliding_window_is_kept_in_long_prompts_too(make_trial):
    model, _ = tiny_model("mistral", sliding_window=6)
    prompts = ragged_prompts((19, 2, 40, 7))
    expected = plain_greedy(model, prompts, 12)
    for spans in (False, True):
        engine, _ = engine_of(without_end(model), make_trial, slots=2)
        if spans:
            take_spans(engine)
        assert engine.generate(prompts, new_tokens=12) == expected


def test_the_repetition_penalty_counts_the_rows_own_tokens(make_trial):
    model, tokenizer = tiny_model("llama", num_hidden_layers=1)
    prompts = ragged_prompts(LENGTHS)
    engine, trial = engine_of(without_end(model), make_trial, {"generate.repetition_penalty": 1.7}, tokenizer=tokenizer)
    expected = alone(model, trial, prompts, 16)
    assert engine.generate(prompts, new_tokens=16) == expected
    assert expected != plain_greedy(model, prompts, 16)


def test_sampling_draws_from_the_models_distribution(make_trial):
    model, _ = tiny_model("llama", spread=2.0, num_hidden_layers=1)
    settings = {"generate.do_sample": True, "generate.temperature": 0.7, "generate.top_k": 5}
    engine, _ = engine_of(without_end(model), make_trial, settings, slots=256, wave_tokens=4096)
    prompt = ragged_prompts((6,))[0]
    with torch.no_grad():
        first = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 0.7).topk(5)
    token = int(first.indices[0])
    with torch.no_grad():
        second = (model(input_ids=torch.tensor([[*prompt, token]])).logits[0, -1].double() / 0.7).topk(5)
    torch.manual_seed(0)
    rows = engine.generate([prompt] * 4096, new_tokens=2)
    follow = [row[1] for row in rows if row[0] == token]
    for drawn, top in (([row[0] for row in rows], first), (follow, second)):
        expected = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
        assert set(drawn) <= expected.keys()
        assert len(drawn) > 800
        for one, share in expected.items():  # 800 draws: a standard error is at most 0.018
            assert drawn.count(one) / len(drawn) == pytest.approx(share, abs=0.075)
    torch.manual_seed(1)
    some = engine.generate([prompt] * 4, new_tokens=8)
    torch.manual_seed(1)
    assert engine.generate([prompt] * 4, new_tokens=8) == some
    assert len({tuple(row) for row in some}) > 1


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_tokens(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    prompts = ragged_prompts(LENGTHS)
    expected = plain_greedy(model, prompts, 12)
    engine, _ = engine_of(without_end(model), make_trial, backend="inductor")
    assert engine.generate(prompts, new_tokens=12) == expected
    assert engine.tally.recompiles == 0


# ---------------------------------------------------------------- shared prefixes


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2"])
def test_a_shared_prefix_is_read_once_and_the_tokens_stay(kind, make_trial, monkeypatch):
    model, _ = tiny_model(kind)
    system, other = ragged_prompts((40, 35), seed=5)
    tails = ragged_prompts((4, 9, 1, 6, 3, 8, 2), seed=6)
    prompts = [system + tail for tail in tails[:5]] + [other + tails[5], other + tails[6]] + ragged_prompts((11,))
    expected = plain_greedy(model, prompts, 10)
    engine, _ = engine_of(without_end(model), make_trial, slots=4, wave_tokens=100)
    read = read_tokens(engine, monkeypatch)
    assert engine.generate(prompts, new_tokens=10) == expected
    assert engine.slot_facts["shared_prefix_tokens"] == 4 * 40 + 35
    assert sum(read) == sum(map(len, prompts)) - 4 * 40 - 35


def test_equal_prompts_share_all_but_their_last_token(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    prompt = ragged_prompts((50,))[0]
    engine, _ = engine_of(without_end(model), make_trial)
    assert engine.generate([prompt] * 6, new_tokens=8) == plain_greedy(model, [prompt], 8) * 6
    assert engine.slot_facts["shared_prefix_tokens"] == 5 * 49


def test_only_long_common_beginnings_are_shared():
    long, short = list(range(40)), list(range(10))
    prompts = [long + [50], long + [51, 52], short + [50], short + [51], long, [7] * 60]
    assert shared_prefixes(prompts) == {0: (0, 39), 1: (0, 39), 4: (0, 39)}  # one token of the shortest is left to be read
    assert shared_prefixes([long]) == shared_prefixes([]) == {}


# ---------------------------------------------------------------- the schedule

jobs = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=40)


@given(jobs, st.integers(1, 9), st.integers(1, 100))
def test_every_prompt_gets_a_row_once_and_copies_only_what_a_row_holds(jobs, rows, tokens):
    lengths, limits = [length + 8 for length, _, _ in jobs], [limit for _, limit, _ in jobs]
    prefixes = {index: (group, 8) for index, (_, _, group) in enumerate(jobs) if group}
    schedule = Schedule(lengths, limits, range(len(jobs)), rows, prefixes)
    holds, seen, finished = [0] * rows, [], []
    while True:
        while schedule.waiting and None in schedule.owner:
            before = list(holds)
            wave = schedule.next_wave(tokens)
            assert wave
            read = [lengths[one.index] - one.shared for one in wave]
            assert len(wave) == 1 or sum(read) <= tokens
            assert len({one.row for one in wave}) == len(wave)
            for one in wave:
                assert one.shared in (0, 8)
                assert not one.shared or before[one.source] == jobs[one.index][2]
                holds[one.row] = jobs[one.index][2]
                seen.append(one.index)
            finished += schedule.finished(lambda row: False)
        if not schedule.active:
            break
        steps = schedule.steps()
        assert steps >= 1
        schedule.ran(steps)
        finished += schedule.finished(lambda row: False)
        assert len(finished) == len(set(finished))
    assert sorted(seen) == sorted(index for _, index in finished) == list(range(len(jobs)))


def test_rows_wait_for_company_before_they_are_filled():
    schedule = Schedule([4] * 40, [1 + index for index in range(40)], range(40), 16, {})
    assert len(schedule.next_wave(1000)) == 16
    schedule.finished(lambda row: False)
    assert not schedule.wants_filling  # one row of 16 is free
    assert schedule.steps() == 1
    schedule.ran(1)
    schedule.finished(lambda row: False)
    assert schedule.wants_filling
    assert len(schedule.next_wave(1000)) == 2


# ---------------------------------------------------------------- memory


def test_running_out_of_memory_halves_the_rows_and_keeps_what_is_finished(make_trial, monkeypatch):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    prompts, limits = ragged_prompts(LENGTHS), [2, 2, 2, 2, 9, 9, 9, 9, 9]
    expected = [row[:limit] for row, limit in zip(plain_greedy(model, prompts, 9), limits, strict=True)]
    engine, _ = engine_of(without_end(model), make_trial, slots=4, wave_tokens=1000)
    reads = []
    read = ragged_engine.RaggedSlot.read

    def short_of_memory(slot, wave, prompts, limits, by_layers):
        reads.append((slot.rows, [one.index for one in wave]))
        if len(reads) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        read(slot, wave, prompts, limits, by_layers)

    monkeypatch.setattr(ragged_engine.RaggedSlot, "read", short_of_memory)
    assert engine.generate_up_to(prompts, limits) == expected
    assert reads[:3] == [(4, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (2, [4, 5])]
    assert {index for _, wave in reads[2:] for index in wave} == set(range(4, 9))  # the first four are not generated again
    assert engine.slot_facts["out_of_memory"] == 1
    assert engine.slot_facts["slots"] == 2
    assert engine.generate_up_to(prompts, limits) == expected
    assert engine.slot_facts["slots"] == 2  # what did not fit is not tried again


def test_memory_that_does_not_hold_one_row_ends_the_call_and_other_errors_are_not_taken_for_it(make_trial, monkeypatch):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    engine, _ = engine_of(model, make_trial)
    tried = []

    def fails(slot, wave, prompts, limits, by_layers):
        tried.append(slot.rows)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ragged_engine.RaggedSlot, "read", fails)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(ragged_prompts(LENGTHS), new_tokens=4)
    assert tried == [4, 2, 1]

    def broken(slot, wave, prompts, limits, by_layers):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(ragged_engine.RaggedSlot, "read", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        engine.generate(ragged_prompts(LENGTHS), new_tokens=4)


def test_as_many_rows_as_85_percent_of_the_free_memory_hold(make_trial, monkeypatch):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    prompts = ragged_prompts(LENGTHS)
    expected = plain_greedy(model, prompts, 8)
    engine, _ = engine_of(without_end(model), make_trial, slots=64)
    token = 2 * 2 * 16 * 4  # keys and values of one layer, two heads of 16, float32
    monkeypatch.setattr(ragged_engine, "free_memory", lambda device: int(3.99 * 64 * token / 0.85))
    assert engine.generate(prompts, new_tokens=8) == expected
    assert engine.slot_facts["slots"] == 3


# ---------------------------------------------------------------- the rest


def test_a_slot_serves_calls_of_like_size_and_another_size_gets_its_own(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    engine, _ = engine_of(without_end(model), make_trial, slots=8)
    engine.generate(ragged_prompts((5,) * 8), new_tokens=8)
    engine.generate(ragged_prompts((40,) * 20), new_tokens=20)
    engine.generate(ragged_prompts((5,) * 3), new_tokens=8)
    long = ragged_prompts((60, 3))
    assert engine.generate(long, new_tokens=10) == plain_greedy(model, long, 10)
    assert engine.tally.buckets == ["8 rows x 64", "2 rows x 128"]
    assert (engine.tally.graphs, engine.tally.recompiles) == (2, 0)
    assert engine.generate([], new_tokens=5) == []
    assert engine.generate([[3, 4]], new_tokens=0) == [[]]


def test_busy_is_the_share_of_computed_steps_that_gave_a_token(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    engine, _ = engine_of(without_end(model), make_trial, slots=2)
    engine.generate_up_to(ragged_prompts((4, 5)), [11, 6])  # 10 steps of 2 rows; 10 + 5 tokens beside the first ones
    assert engine.slot_facts["busy"] == 0.75


def test_everything_at_once_is_scored_in_batches(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    engine, trial = engine_of(model, make_trial, {"batch.size": 4})
    prompts = ragged_prompts((5, 12, 3, 30, 2, 9, 7))
    sizes = []
    log_probs = engine.log_probs
    engine.log_probs = lambda sequences, starts: sizes.append(len(sequences)) or log_probs(sequences, starts)
    for scores, prompt in zip(engine.score(prompts, [1] * 7), prompts, strict=True):
        assert torch.allclose(scores, TransformersEngine(model, trial).score([prompt], [1])[0], atol=1e-5)
    assert sizes == [4, 3]


def test_attention_that_cannot_be_packed_is_refused_with_the_way_out(make_trial):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    model.set_attn_implementation("eager")
    with pytest.raises(UnavailableError, match="load.attention=sdpa"):
        engine_of(model, make_trial)
