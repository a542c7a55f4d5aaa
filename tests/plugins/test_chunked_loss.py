"""chunked-loss: the values of the plain pass, without a tensor of (all tokens × vocabulary); and so for packed and compiled scoring."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from optkit import TransformersEngine, UnavailableError  # noqa: E402
from optkit.errors import PlanConflict  # noqa: E402
from optkit.machine import detect  # noqa: E402
from optkit.plan import Choice, make_plan  # noqa: E402
from optkit.proof import ACTIVE, verdict  # noqa: E402
from optkit.registry import discover  # noqa: E402
from optkit_plugins import chunked_loss  # noqa: E402
from optkit_plugins.kernels.attention.interface import EngineAttention  # noqa: E402
from optkit_plugins.kernels.scoring.compiled import CompiledScorer  # noqa: E402
from optkit_plugins.kernels.scoring.packed_rows import PackedEngine  # noqa: E402
from optkit_plugins.kernels.scoring.positions import BodyAndHead  # noqa: E402
from tests.plugins.tiny import KINDS, VOCAB, ragged_prompts, tiny_model  # noqa: E402

CPU = dataclasses.replace(detect(), device="cpu")
#: A vocabulary whose size no other dimension has.
WORDS = 131
SEQUENCES, STARTS = ragged_prompts((17, 40, 9, 2)), [1, 30, 8, 1]


class Largest(TorchDispatchMode):
    """The most positions for which a tensor over the whole vocabulary was made, parameters aside."""

    def __init__(self, model):
        super().__init__()
        self.positions, self.weights = 0, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, torch.Tensor) and WORDS in tensor.shape and tensor.untyped_storage().data_ptr() not in self.weights:
                self.positions = max(self.positions, tensor.numel() // WORDS)
        return answer


def engine_of(model, make_trial, **options):
    trial = make_trial("chunked-loss", chunked_loss.ChunkedLossOptions(**options), task="score")
    trial.engine = chunked_loss.build_engine(model=model, trial=trial)
    return trial.engine, trial


def alone(model, sequence, start):
    """Log probabilities of a sequence's tokens, in float64, from the plain logits."""
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([sequence])).logits[0].double().log_softmax(-1)
    return rows[start - 1 : len(sequence) - 1]


def expected_scores(model):
    return [
        alone(model, ids, start).gather(1, torch.tensor(ids[start:])[:, None])[:, 0] for ids, start in zip(SEQUENCES, STARTS, strict=True)
    ]


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_plain_logits(kind, chunk, make_trial):
    model, _ = tiny_model(kind)
    engine, _ = engine_of(model, make_trial, chunk=chunk)
    for got, expected in zip(engine.score(SEQUENCES, STARTS), expected_scores(model), strict=True):
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), expected, atol=1e-5)
    for rows, ids, start in zip(engine.log_probs(SEQUENCES, STARTS), SEQUENCES, STARTS, strict=True):
        assert torch.allclose(rows.double(), alone(model, ids, start), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_in_float64_nothing_but_the_last_bits_differs(kind, make_trial):
    model, _ = tiny_model(kind)
    engine, _ = engine_of(model.double(), make_trial, chunk=7)
    for got, expected in zip(engine.score(SEQUENCES, STARTS), expected_scores(model), strict=True):
        assert torch.allclose(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "scale"), [("CohereConfig", {"logit_scale": 0.3}), ("GraniteConfig", {"logits_scaling": 4.0})])
def test_scaled_logits_go_through_the_models_own_head(name, scale, make_trial):
    import transformers

    config = getattr(transformers, name)(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, **scale,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    engine, _ = engine_of(model, make_trial, chunk=7)
    for got, expected in zip(engine.score(SEQUENCES, STARTS), expected_scores(model), strict=True):
        assert torch.allclose(got.double(), expected, atol=1e-5)


def scorer_of(name, model, make_trial):
    if name == "chunked":
        return engine_of(model, make_trial)[0]
    if name == "packed":
        return PackedEngine(model, make_trial("batching", None, task="score"))
    return CompiledScorer(model, EngineAttention(model), 0, {}, lambda method, name, arguments, *tensors: method(*tensors))


@pytest.mark.parametrize("name", ["chunked", "packed", "compiled"])
def test_no_more_logits_are_made_than_are_asked_for(name, make_trial, monkeypatch):
    model, _ = tiny_model("llama", vocab_size=WORDS)
    scorer = scorer_of(name, model, make_trial)
    monkeypatch.setattr("optkit_plugins.kernels.scoring.positions.CHUNK", {"cpu": 16})
    plain = TransformersEngine(model, make_trial("batching", None, task="score"))
    with Largest(model) as seen:
        plain.score(SEQUENCES, STARTS)
    assert seen.positions == 4 * 40  # rows × columns: the measure sees them
    with Largest(model) as seen:
        scores = scorer.score(SEQUENCES, STARTS)
    assert 0 < seen.positions <= 16
    for got, expected in zip(scores, expected_scores(model), strict=True):
        assert torch.allclose(got.double(), expected, atol=1e-5)


def test_the_proof_counts_positions(make_trial):
    model, _ = tiny_model("llama")
    untouched = make_trial("chunked-loss", chunked_loss.ChunkedLossOptions(), task="score")
    baseline = chunked_loss.prove_effect(trial=untouched)
    engine, trial = engine_of(model, make_trial, chunk=8)
    assert chunked_loss.prove_effect(trial=trial) == baseline
    engine.score(SEQUENCES, STARTS)
    facts = chunked_loss.prove_effect(trial=trial)
    asked = sum(len(ids) - start for ids, start in zip(SEQUENCES, STARTS, strict=True))
    assert (facts["positions_computed"], facts["positions_through_head"], facts["positions_at_a_time"]) == (4 * 40, asked, 8)
    assert verdict(facts, {}, baseline)["verdict"] == ACTIVE


def test_a_model_that_does_not_come_apart_is_refused(make_trial, monkeypatch):
    model, _ = tiny_model("llama")
    forward = type(model).forward

    def with_memory(self, *args, **kwargs):  # a head that looks at the ids
        output = forward(self, *args, **kwargs)
        if kwargs.get("input_ids") is not None:
            output.logits = output.logits + kwargs["input_ids"][..., None]
        return output

    monkeypatch.setattr(type(model), "forward", with_memory)
    with pytest.raises(UnavailableError, match="more than a body and a head.*leave out chunked-loss"):
        engine_of(model, make_trial)
    headless, _ = tiny_model("llama")
    monkeypatch.setattr(type(headless), "get_decoder", lambda self: self)
    with pytest.raises(ValueError, match="no body beside its head"):
        BodyAndHead(headless)


def test_it_owns_the_engine_and_refuses_rows_with_several_samples():
    def refusals(task, *choices):
        with pytest.raises(PlanConflict) as refused:
            make_plan(discover(), CPU, task, choices)
        return " ".join(refused.value.conflicts)

    own = Choice("chunked-loss", {})
    assert "role 'engine'" in refusals("score", own, Choice("compile", {"backend": "eager"}))
    assert "'positions-restart'" in refusals("score", own, Choice("batching", {"kind": "packed"}))
    assert "does nothing in the task 'generate'" in refusals("generate", own)
    assert [step.name for step in make_plan(discover(), CPU, "score", [own, Choice("batching", {})]).steps] == ["chunked-loss", "batching"]
    with pytest.raises(ValueError, match="chunk"):
        chunked_loss.ChunkedLossOptions(chunk=0)
