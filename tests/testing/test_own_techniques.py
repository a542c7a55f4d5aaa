"""Every technique of optkit's own passes the checks that a third party's must pass, or declares the exception.

Pairs are not run here, and ``onnx``, whose exports take a minute, is checked as it is installed: ``tests/plugins`` has both. What needs
an adapter or a second device gets one; what needs a server or a library that is not there is checked as far as that goes, and says so.
"""

import contextlib
from pathlib import Path

import pytest

from optkit.registry import discover
from optkit.report.plugin import set_up_problem
from optkit.testing import tiny_model
from optkit.testing.checking import CHECKS, MODEL_CHECKS, PLUGIN_CHECKS, result_of
from optkit.testing.subject import Subject

OWN = {row.name: row for row in discover() if row.distribution == "optkit"}
#: Options with which a technique does the same sooner.
QUICK = {"compile": {"backend": "aot_eager"}}
SLOW = ("onnx",)


@pytest.mark.parametrize("name", sorted(OWN))
def test_it_passes_every_check_or_declares_why_it_cannot(name):
    subject = Subject(name, QUICK.get(name, {}), partners={})
    try:
        results = [result_of(subject, check) for check in (PLUGIN_CHECKS if name in SLOW else CHECKS)]
    finally:
        subject.close()
    assert [result for result in results if result.state == "failed"] == []
    assert set(PLUGIN_CHECKS) <= {result.check for result in results if result.state == "ok"}
    row = OWN[name]
    undone = [result.detail for result in results if result.check == "runs[llama]" and result.state == "not checked"]
    assert not undone or row.status != "ready" or undone == [f"{name}: {set_up_problem(subject.registry, row, subject.machine)}"]
    idle = name in SLOW or row.status != "ready" or set_up_problem(subject.registry, row, subject.machine)
    assert idle or [result for result in results if result.check.startswith("runs") and result.state == "ok"]


def made_adapter(subject: Subject) -> str:
    """The folder of an adapter with random weights, for the tiny Llama."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'optkit[lora]'")
    model, _ = tiny_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    folder = Path(subject._folder.name) / "adapter"
    adapted.save_pretrained(folder)
    return str(folder)


#: What a technique cannot do without, made for the tiny Llama.
GIVEN = {
    "merge-lora": lambda subject: {"adapter": made_adapter(subject)},
    "parallel": lambda subject: {"devices": "cpu,cpu"},
}


@pytest.mark.parametrize("name", GIVEN)
def test_with_what_it_needs_it_passes_the_checks_on_a_model(name):
    subject = Subject(name, partners={})
    subject.options = GIVEN[name](subject)
    try:
        results = [result_of(subject, f"{check}[llama]") for check in MODEL_CHECKS]
    finally:
        subject.close()
    assert {result.state for result in results} == {"ok"}, results


def test_what_works_in_one_task_alone_is_driven_through_that():
    """``chunked-loss`` scores and generates nothing; packed rows are ``batching`` of the same kind."""
    for name, options, task in (("chunked-loss", {}, "score"), ("batching", {"kind": "packed"}, "score"), ("batching", {}, "generate")):
        with contextlib.closing(Subject(name, options, partners={})) as subject:
            assert subject.task == task
            results = [result_of(subject, f"{check}[llama]") for check in MODEL_CHECKS]
            assert [result for result in results if result.state != "ok"] == []
            assert ("task score" in results[0].detail) == (task == "score")
            assert (subject.outcome("llama").tokens is None) == (task == "score")
