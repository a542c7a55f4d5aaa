"""Each check of the kit finds the fault that it is for, and passes the plugin that is well."""

import contextlib

import pytest

from optkit.errors import UsageError
from optkit.testing import KINDS, check_technique, plain_greedy, plain_scores, prompts, tiny_model
from optkit.testing.checking import CHECKS, result_of
from optkit.testing.subject import Subject
from tests.fakes import install, plugin

LOUDER = "@hookimpl\ndef transform_model(model): model.lm_head.weight.data.mul_(1.5)\n"
QUANTIZE = {"stage": "'quantize'", "lossy": "True", "adds": "{'weights-changed'}"}


def well(body=LOUDER, **facts):
    return plugin("subject", body, **(QUANTIZE | facts))


def transform(*lines):
    return "@hookimpl\ndef transform_model(model, trial):\n" + "".join(f"    {line}\n" for line in lines)


def prove(text):
    return LOUDER + f"@hookimpl\ndef prove_effect(model, trial):\n    return {text}\n"


UNSAVED = """
import torch
class Twice(torch.nn.Linear):
    def forward(self, x): return 2 * super().forward(x)
model.lm_head.__class__ = Twice
""".strip().splitlines()

#: An engine whose second answer is another one, as where a cache is not emptied.
STALE = """
from optkit import Engine
class Stale(Engine):
    def __init__(self, inner):
        self.inner, self.calls = inner, 0
    def generate(self, prompts, *, new_tokens, exact=False):
        self.calls += 1
        return [[token + self.calls for token in row] for row in self.inner.generate(prompts, new_tokens=new_tokens, exact=exact)]
    def log_probs(self, sequences, starts): return self.inner.log_probs(sequences, starts)
@hookimpl
def wrap_engine(engine): return Stale(engine)
"""
#: Engines of the task ``score``: one that remembers, one whose two answers speak of different models, one that leaves out a token.
SCORED = """
from optkit import TransformersEngine
class Own(TransformersEngine):
    calls = 0
    def score(self, sequences, starts):
        self.calls += 1
        return [row %s for row in super().score(sequences, starts)]
@hookimpl
def build_engine(model, trial): return Own(model, trial)
"""
SCORES = {"stage": "'engine'", "roles": "{'engine'}", "tasks": "{'score'}", "adds": "set()"}
OPTIONS = "from optkit import Options\nclass O(Options): x: int = 1\n"
SLOW = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
REFUSES = ("from optkit import UsageError", "raise UsageError('no room')")
KEEPS_NOTES = ("trial.notes['x'] = 1", "model.lm_head.weight.data.mul_(1.5)")
RANDOM = ("import random", "model.lm_head.weight.data.mul_(1 + random.SystemRandom().random())")
TIMED = "{'seconds': __import__('time').perf_counter(), 'summary': 's'}"
#: fault -> source, the check that must find it, words of what it says.
FAULTS = {
    "no description": (OPTIONS + well(options="O"), "manifest", "option 'x' has no description"),
    "unknown property": (well(adds="{'weights-quantised'}"), "manifest", "did you mean 'weights-quantized'"),
    "unknown setting": (well(honours="{'generate.cash'}"), "manifest", "which is no setting"),
    "broken": ("import nowhere", "manifest", "ModuleNotFoundError"),
    "unknown extra": (well(extra="'fast'"), "manifest", "the extra 'fast' is not one of optkit-subject's"),
    "no docstring": (well(), "manifest", "no docstring"),
    "private names": (well(LOUDER + "def f():\n    from optkit.session import Session\n"), "imports", "optkit.session.Session"),
    "undeclared import": (well(LOUDER + "def f():\n    import hypothesis\n"), "imports", "it imports hypothesis"),
    "heavy import": ("import numpy\n" + well(), "import-time", "it imports numpy"),
    "printing import": ("print('hello')\n" + well(), "import-time", "prints 'hello'"),
    "import that changes the process": ("import os\nos.environ['OMP_NUM_THREADS'] = '1234'\n" + well(), "import-time", "os.environ"),
    "slow import": (SLOW + well(), "import-time", "ms of CPU time"),
    "role without its hook": (well(roles="{'engine'}"), "hooks", "does not answer build_engine (role 'engine')"),
    "nothing to show for it": (well(""), "hooks", "nothing can show that it was at work"),
    "async hook": (well("@hookimpl\nasync def transform_model(model): ..."), "hooks", "async"),
    "dependency at the top": ("import hypothesis\n" + well(requires="('hypothesis>=1',)"), "dependency", "without hypothesis it is broken"),
    "not finite": (well(transform("model.lm_head.weight.data.fill_(float('nan'))")), "runs[llama]", "not finite"),
    "not repeatable": (well(transform(*RANDOM)), "runs[llama]", "two runs with one seed differ"),
    "something left behind": (well(STALE), "runs[llama]", "asked for the same texts twice"),
    "something left behind in scores": (well(SCORED % "- self.calls", **SCORES), "runs[llama]", "asked for the same scores twice"),
    "two distributions": (well(SCORED % "- 1", **SCORES), "runs[llama]", "score and log_probs speak of different distributions"),
    "a token not scored": (well(SCORED % "[1:]", **SCORES), "runs[llama]", "scores of [4, 11, 2, 8] tokens were asked for"),
    "texts not given": (well(STALE.replace("row]", "row][:0]")), "runs[llama]", "it gave [0, 0, 0, 0]"),
    "not declared lossy": (well(lossy="False"), "runs[llama]", "not declared lossy"),
    "raises": (well(transform("raise KeyError('q_proj')")), "runs[llama]", "KeyError"),
    "refuses": (well(transform(*REFUSES)), "runs[gpt2]", "it refuses a gpt2 model: no room"),
    "no effect": (well("@hookimpl\ndef prove_effect(): return {'layers': 2}"), "effect[llama]", "no effect"),
    "timings": (well(prove(TIMED)), "effect[llama]", "seconds; leave out timings"),
    "facts that are no JSON": (well(prove("{'model': object(), 'summary': 's'}")), "effect[llama]", "are no JSON"),
    "fails on the untouched": (
        well(transform(*KEEPS_NOTES) + "@hookimpl\ndef prove_effect(trial): return {'x': trial.notes['x']}"),
        "effect[llama]", "prove_effect fails on the untouched model: KeyError",
    ),
    "wrong bytes": (well(prove("{'bytes_stored': 7, 'summary': 's'}")), "bytes[llama]", "bytes_stored is 7"),
    "wrong bits": (well(LOUDER + "@hookimpl\ndef configure(): return Claims(weight_bits=4)"), "bytes[llama]", "claims 4 bits"),
    "not saved": (well(transform(*UNSAVED)), "saves[llama]", "loaded again, it scores differently"),
    "refuses to be saved": (
        well(LOUDER + "@hookimpl\ndef save_model():\n    from optkit import UsageError\n    raise UsageError('packed')"),
        "saves[gpt2]", "it refuses to save a gpt2 model: UsageError: packed",
    ),
    "exception that is not needed": (well(exceptions="{'llama': 'has no such layer'}"), "exceptions", "'llama' is declared and passes"),
    "exception for nothing": (well(exceptions="{'lama': 'x'}"), "exceptions", "'lama' is no check and no model"),
}  # fmt: skip


@pytest.fixture
def subject(monkeypatch, tmp_path):
    made = []

    def make(source, **more):
        install(monkeypatch, tmp_path / "site", {"subject": source}, name="optkit-subject")
        made.append(Subject("subject", **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_found(fault, subject):
    source, check, words = FAULTS[fault]
    result = result_of(subject(source), check)
    assert result.state == "failed" and words in result.detail, result


def test_a_plugin_that_is_well_passes_every_check(subject, monkeypatch, tmp_path):
    one = subject('"""Louder: for tests."""\n' + well(), partners={})
    results = [result_of(one, check) for check in CHECKS]
    assert [result for result in results if result.state not in ("ok", "not checked")] == []
    refused = [f"{check}[gpt2]" for check in ("runs", "effect", "bytes", "saves")]
    assert [result.check for result in results if result.state == "not checked"] == []
    assert set(refused) <= {result.check for result in results if result.state == "ok"}


def test_a_partner_that_cannot_be_borne_is_found(subject):
    body = transform("assert str(model.dtype) == 'torch.float32', 'only float32'", "model.lm_head.weight.data.mul_(1.5)")
    result = result_of(subject(well(body), partners={"precision": {"dtype": "bfloat16"}}), "combines")
    assert (
        result.state == "failed"
        and "with precision: the plan allows it, and the run does not: AssertionError: only float32" in result.detail
    )


def test_a_declared_exception_is_shown_with_its_reason_and_hides_nothing_else(subject):
    body = transform(
        "from optkit import UsageError",
        "if model.config.model_type == 'gpt2': raise UsageError('no rotary positions')",
        "model.lm_head.weight.data.mul_(1.5)",
    )
    one = subject(well(body, exceptions="{'gpt2': 'it turns rotary positions'}"))
    found = result_of(one, "runs[gpt2]")
    assert found.state == "exception" and found.detail.startswith("it turns rotary positions (it refuses a gpt2 model")
    assert result_of(one, "effect[gpt2]").state == "not checked" and result_of(one, "runs[llama]").state == "ok"
    assert result_of(one, "exceptions").state == "ok"


def test_exceptions_speak_of_the_default_options(subject):
    body = "@hookimpl\ndef transform_model(model, trial): model.lm_head.weight.data.mul_(trial.options.x)\n"
    source = "from optkit import Options\nclass O(Options): x: float = 1.0\n" + well(body, options="O", exceptions="{'effect': 'times 1'}")
    one = subject(source)
    assert result_of(one, "effect[llama]").state == "exception" and result_of(one, "exceptions").state == "ok"
    with contextlib.closing(Subject("subject", {"x": 2.0})) as other:
        assert result_of(other, "effect[llama]").state == "ok" and result_of(other, "exceptions").state == "ok"


def test_what_is_missing_here_is_not_checked_and_says_what_installs_it(subject):
    one = subject(well(requires="('no-such-library>=2',)"))
    result = result_of(one, "runs[llama]")
    assert result.state == "not checked" and "pip install 'no-such-library>=2'" in result.detail
    assert result_of(one, "dependency").state == "ok"


def test_an_unknown_name_is_the_callers_mistake():
    with pytest.raises(UsageError, match="did you mean 'flash'"):
        check_technique("flsh")


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_models_are_the_same_each_time_and_not_flat(kind):
    first, second = (plain_scores(tiny_model(kind)[0], prompts()) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert max(float(row.std()) for row in first) > 0.3
    texts = plain_greedy(tiny_model(kind)[0], prompts(), 8)
    model = tiny_model(kind)[0]
    import torch

    ids = torch.tensor([prompts()[0]])
    own = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    assert own[0, ids.shape[1] :].tolist() == texts[0]
