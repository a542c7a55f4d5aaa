"""One model with one plan in this process: transformers' own results are the reference."""

import pytest
import torch

import optkit
from optkit.engine import pad_left, pad_right, trim
from optkit.errors import OptkitError, UsageError
from optkit.loading import byte_tokenizer, encode, random_model, shrink
from optkit.proof import verdict
from optkit.samples import Sample
from optkit.snapshot import Snapshot, difference
from tests.fakes import install, plugin
from tests.plugins.tiny import tiny_model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


def test_the_default_engine_is_generate():
    model, tokenizer = tiny_model("llama")
    optimized = optkit.optimize(model, tokenizer)
    for prompt, row in zip(PROMPTS, optimized.generate(PROMPTS, new_tokens=8), strict=True):
        alone = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=8, do_sample=False
        )
        assert row == trim(alone[0, len(prompt) :].tolist(), frozenset({1}), False)


def test_scores_are_log_softmax_of_the_forward_pass():
    model, tokenizer = tiny_model("llama")
    optimized = optkit.optimize(model, tokenizer)
    for sequence, score in zip(PROMPTS[:2], optimized.score(PROMPTS[:2]), strict=True):
        logits = model(torch.tensor([sequence])).logits[0].double()
        expected = torch.stack([logits[i - 1].log_softmax(-1)[sequence[i]] for i in range(1, len(sequence))])
        assert torch.allclose(score.double(), expected, atol=1e-5)


def test_exact_work_ignores_the_end_of_text():
    model, tokenizer = tiny_model("llama")
    engine = optkit.optimize(model, tokenizer).engine
    assert [len(row) for row in engine.generate(PROMPTS, new_tokens=20, exact=True)] == [20] * 3


def test_padding_keeps_order_and_masks():
    ids, mask = pad_left(PROMPTS, 0, "cpu")
    assert ids.tolist()[2] == [0, 0, 0, 0, 13] and mask.tolist()[0] == [0, 0, 1, 1, 1]
    ids, mask = pad_right(PROMPTS, 0, "cpu")
    assert ids.tolist()[2] == [13, 0, 0, 0, 0] and mask.tolist()[0] == [1, 1, 1, 0, 0]


def test_the_byte_tokenizer_keeps_every_byte():
    tokenizer = byte_tokenizer()
    text = "naïve → 価格 \n\t x"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


def test_encoding_cuts_prompts_from_the_left_and_texts_from_the_right():
    tokenizer = byte_tokenizer()
    prompt, text = Sample("p", prompt="abcdef", answer="yz"), Sample("t", text="abcdef")
    encode([prompt, text], tokenizer, eos=1, max_length=5, vocabulary=256, seed=0)
    assert tokenizer.decode(prompt.prompt_ids) == "ef" and tokenizer.decode(prompt.answer_ids[:-1]) == "yz" and prompt.answer_ids[-1] == 1
    assert tokenizer.decode(text.prompt_ids + text.answer_ids) == "abcde" and text.start == 1


def test_messages_without_a_chat_template_say_so():
    sample = Sample("m", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(UsageError, match="no chat template"):
        encode([sample], byte_tokenizer(), eos=1, max_length=50, vocabulary=256, seed=0)


def test_random_tokens_are_the_same_for_the_same_seed():
    def ids(seed):
        sample = Sample("r", prompt="", extra={"random_tokens": 9})
        encode([sample], byte_tokenizer(), eos=1, max_length=50, vocabulary=100, seed=seed)
        return sample.prompt_ids

    assert ids(1) == ids(1) != ids(2)
    assert max(ids(1)) < 100


def test_snapshots_see_values_shapes_types_and_bytes():
    model, _ = tiny_model("llama")
    before = Snapshot.of(model)
    assert difference(before, Snapshot.of(model)) == {}
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
    assert difference(before, Snapshot.of(model)) == {"values_changed": True}
    model.model.layers[0].mlp.down_proj = torch.nn.Identity()
    changes = difference(before, Snapshot.of(model))
    assert changes["modules_replaced"] == {"Linear → Identity": 1}
    assert changes["bytes"][0] - changes["bytes"][1] == 128 * 64 * 4


@pytest.mark.parametrize(
    ("facts", "changes", "baseline", "expected"),
    [
        ({"kernel": "a"}, {}, {"kernel": "b"}, "active"),
        ({"kernel": "a", "summary": "x"}, {}, {"kernel": "a", "summary": "y"}, "no effect"),
        ({}, {"values_changed": True}, {}, "active"),
        ({}, {}, {}, "no effect"),
        ({"kernel": "a"}, {}, None, "not proven"),
        ({"error": "ValueError: x"}, {}, {"kernel": "b"}, "not proven"),
    ],
)
def test_verdicts(facts, changes, baseline, expected):
    assert verdict(facts, changes, baseline)["verdict"] == expected


def test_a_batch_strategy_that_loses_a_sample_is_refused(monkeypatch, tmp_path):
    body = "@hookimpl\ndef batch_strategy(samples, trial): return [[0]]"
    install(monkeypatch, tmp_path, {"loser": plugin("loser", body, stage="'batching'", roles="{'batching'}")})
    model, tokenizer = tiny_model("llama")
    optimized = optkit.optimize(model, tokenizer, ["loser"])
    with pytest.raises(OptkitError, match="loser: its batches do not hold each of the 2 samples"):
        optimized._session.batches([Sample("a", prompt_ids=[1]), Sample("b", prompt_ids=[2])])


def test_without_a_strategy_batches_hold_every_sample_in_file_order_or_by_length():
    model, tokenizer = tiny_model("llama")
    session = optkit.optimize(model, tokenizer)._session
    size = session.plan.settings["batch.size"]
    samples = [Sample(str(index), prompt_ids=[1] * (1 + 7 * index % 11)) for index in range(2 * size + 1)]
    flat = [index for batch in session.batches(samples) for index in batch]
    assert flat == list(range(len(samples)))
    batches = session.batches(samples, by_length=True)
    assert [len(batch) for batch in batches] == [size, size, 1]
    sorted_lengths = sorted(len(sample) for sample in samples)
    assert [len(samples[index]) for batch in batches for index in batch] == sorted_lengths
    assert sorted(index for batch in batches for index in batch) == flat


def test_an_engine_of_a_plugin_is_used_and_wrapped_in_plan_order(monkeypatch, tmp_path):
    engine = """
        class Fixed(__import__('optkit').Engine):
            def generate(self, prompts, *, new_tokens, exact=False): return [[1]] * len(prompts)
        @hookimpl
        def build_engine(model, trial): return Fixed()
    """
    wrap = """
        class Twice(__import__('optkit').Engine):
            def __init__(self, inner): self.inner = inner
            def generate(self, prompts, **more): return [row * 2 for row in self.inner.generate(prompts, **more)]
        @hookimpl
        def wrap_engine(engine, trial): return Twice(engine)
    """
    install(monkeypatch, tmp_path, {"fixed": plugin("fixed", engine, roles="{'engine'}"), "twice": plugin("twice", wrap, stage="'cache'")})
    model, tokenizer = tiny_model("llama")
    assert optkit.optimize(model, tokenizer, ["twice", "fixed"]).generate([[3]], new_tokens=4) == [[1, 1]]


def test_optimize_refuses_options_of_techniques_that_are_not_there():
    model, tokenizer = tiny_model("llama")
    with pytest.raises(UsageError, match="'nf4'"):
        optkit.optimize(model, tokenizer, [], set={"nf4.blocksize": 64})


def test_shrinking_keeps_the_architecture(make_trial):
    from tests.plugins.tiny import tiny_config

    config = tiny_config("gemma2", num_hidden_layers=6)
    shrink(config)
    assert config.num_hidden_layers == 2 and len(config.layer_types) == 2
    config._attn_implementation = "sdpa"
    model = random_model(config, make_trial("core", None, {"load.dtype": "float32"}))
    assert len(model.model.layers) == 2


@pytest.fixture
def make_trial(tmp_path):
    from optkit.context import TrialContext
    from optkit.settings import Setting, Settings
    from optkit.sources import ModelSource

    def make(name, options, settings):
        resolved = {key: Setting(name=key, value=value, because="test") for key, value in settings.items()}
        return TrialContext(name, options, Settings(resolved), "generate", "cpu", 0, None, ModelSource("t", "random", "t.json"), tmp_path)

    return make
