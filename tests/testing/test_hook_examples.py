"""Each hook's example in docs/plugins.md, as a plugin at work. A hook without an example or without a test here fails."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optkit import Machine, Sample, hookspecs
from optkit.errors import PlanConflict
from optkit.modules import linears
from optkit.plan import Choice, make_plan
from optkit.testing import plain_greedy, prompts, tiny_model
from optkit.testing.subject import NEW_TOKENS, Subject
from tests.fakes import install, plugin

HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, "optkit_spec")]
PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
SECTIONS = dict(re.findall(r"^### `(\w+)\(.*?\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL))
#: Hook -> what its plugin declares besides.
FACTS = {
    "load_model": {"stage": "'load'", "roles": "{'load'}", "honours": "{'load.*'}"},
    "transform_model": {"stage": "'quantize'", "adds": "{'weights-changed'}", "lossy": "True"},
    "build_engine": {"roles": "{'engine'}", "honours": "{'generate.*', 'batch.*'}"},
    "batch_strategy": {"stage": "'batching'", "roles": "{'batching'}", "honours": "{'batch.size'}"},
    "wrap_engine": {"stage": "'cache'"},
    "build_optimizer": {"roles": "{'optimizer'}"},
    "build_loss": {"roles": "{'loss'}"},
}


@pytest.fixture
def example(monkeypatch, tmp_path):
    """``example(hook)``: the plugin of that hook's example, to be run on tiny models."""
    made = []

    def make(hook):
        (code,) = re.findall(r"^```python\n(.*?)^```$", SECTIONS[hook], re.MULTILINE | re.DOTALL)
        install(monkeypatch, tmp_path / "site", {"example": code + plugin("example", **FACTS.get(hook, {}))})
        made.append(Subject("example", partners={}))
        assert made[-1].row.status == "ready", made[-1].row.cause
        return made[-1]

    yield make
    for one in made:
        one.close()


def called(subject, hook, **arguments):
    return subject.registry.hook("example", hook)(**arguments)


def carried_out(subject):
    return subject.carry_out(subject.plan(), subject.source("llama"), prove=False)


def plain_texts():
    return plain_greedy(tiny_model("llama")[0], prompts(), NEW_TOKENS)


def test_every_hook_has_an_example_and_a_test():
    assert set(SECTIONS) >= set(HOOKS)
    assert [hook for hook in HOOKS if f"test_{hook}" not in globals()] == []


def test_configure(example):
    subject = example("configure")
    settings = subject.plan().settings
    assert (settings["generate.cache"], settings["generate.cache_window"]) == ("sliding", 64)
    assert "older tokens hardly matter" in settings.why("generate.cache_window")
    old = replace(subject.machine, device="cuda", name="Tesla P100", compute_capability=(6, 0))
    assert isinstance(old, Machine)
    with pytest.raises(PlanConflict, match="Tesla P100 is older than compute capability 7.0"):
        make_plan(subject.registry, old, "generate", [Choice("example")])


def test_load_model(example):
    outcome = carried_out(example("load_model"))
    assert outcome.session.plan.owner("load").name == "example"
    assert outcome.tokens == plain_texts()


def test_transform_model(example):
    model = carried_out(example("transform_model")).session.model
    for (name, after), (_, before) in zip(linears(model), linears(tiny_model("llama")[0]), strict=True):
        size = float(before.weight.detach().abs().mean())
        torch.testing.assert_close(after.weight.detach().abs(), torch.full_like(after.weight, size), msg=name)
        assert torch.equal(after.weight > 0, before.weight > 0)


def test_build_engine(example):
    outcome = carried_out(example("build_engine"))
    assert outcome.session.engine.name == "one by one"
    assert outcome.tokens == plain_texts()


def test_batch_strategy(example):
    session = carried_out(example("batch_strategy")).session
    samples = [Sample(id=str(length), prompt="x" * length, answer="y") for length in (9, 2, 30, 4, 1, 7, 8, 5, 3, 6)]
    session.encode(samples)
    batches = session.batches(samples)
    assert [len(batch) for batch in batches] == [8, 2]
    lengths = [len(samples[index]) for batch in batches for index in batch]
    assert lengths == sorted(lengths) and max(lengths) > 30


def test_wrap_engine(example):
    outcome = carried_out(example("wrap_engine"))
    assert outcome.session.engine.prompts == len(prompts()) and outcome.tokens == plain_texts()


def test_evaluate(example):
    outputs = [{"id": "1", "text": "four"}, {"id": "2", "text": "sixsix"}]
    assert called(example("evaluate"), "evaluate", outputs=outputs, samples=[], trial=None) == {"characters": 5}


def test_prove_effect(example):
    model, _ = tiny_model("llama", num_hidden_layers=1)
    for _, module in linears(model):
        module.weight.data.fill_(1.0)
    facts = called(example("prove_effect"), "prove_effect", model=model, trial=None)
    assert facts["values"] == len(list(linears(model))) and "\n" not in facts["summary"]


def test_save_model(example, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = tiny_model("llama")
    assert called(example("save_model"), "save_model", model=model, folder=tmp_path, trial=None) is True
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_prepare_samples(example):
    samples = [Sample(id="1", prompt="a", answer="b"), Sample(id="2", prompt="c")]
    assert called(example("prepare_samples"), "prepare_samples", samples=samples, trial=None) == samples[:1]


def test_build_optimizer(example):
    subject = example("build_optimizer")
    model, _ = tiny_model("llama", num_hidden_layers=1)
    trial = carried_out(subject).session.contexts["example"]
    optimizer = called(subject, "build_optimizer", model=model, trial=trial)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert {id(parameter) for parameter in optimizer.param_groups[0]["params"]} == {id(parameter) for parameter in model.parameters()}


def test_build_loss(example):
    model, _ = tiny_model("llama")
    ids = torch.tensor([prompts([6])[0], prompts([6], seed=1)[0]])
    labels = ids.clone()
    labels[:, :3] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.no_grad():
        loss = called(example("build_loss"), "build_loss", model=model, trial=None)(model, batch)
        found = model(input_ids=ids).logits.double().log_softmax(-1)[:, 2:-1]
    exact = -found.gather(-1, ids[:, 3:, None]).mean()
    assert float(loss) == pytest.approx(float(0.9 * exact - 0.1 * found.mean()), abs=1e-5)
