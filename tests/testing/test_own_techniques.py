"""Every technique of optkit's own passes the checks that a third party's must pass, or declares the exception.

Pairs are not run here, and ``onnx``, whose exports take a minute, is checked as it is installed: ``tests/plugins`` has both. What needs
an address, an adapter or a program is checked as far as that goes.
"""

import pytest

from optkit.registry import discover
from optkit.report.plugin import set_up_problem
from optkit.testing.checking import CHECKS, PLUGIN_CHECKS, result_of
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
    idle = name in SLOW or row.status != "ready" or set_up_problem(subject.registry, row, subject.machine)
    idle = idle or "generate" not in row.technique.tasks  # the kit generates and scores, and trains nothing
    assert idle or [result for result in results if result.check.startswith("runs") and result.state == "ok"]
