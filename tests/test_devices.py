"""Plans over several devices in a whole run: their limit in the record, and what ``plan`` estimates for each device."""

from __future__ import annotations

from pathlib import Path

import pytest

from optkit.testing.fixtures import OptkitRun
from tests.fakes import plugin

#: A technique that says that two devices compute together; it changes nothing, so that weights and batches are the baseline's.
TWO = """
from optkit import Devices

@hookimpl
def configure():
    return Claims(devices=Devices(count=2, share="{share}"))

@hookimpl
def transform_model(model):
    if "{share}" == "slices":  # what is left in this process
        model.get_decoder().layers = model.get_decoder().layers[:1]
"""


def test_the_limit_of_a_run_is_that_of_all_devices(tmp_path: Path) -> None:
    optkit = OptkitRun(tmp_path)
    for share in ("rows", "layers", "slices"):
        optkit.plugin(share, plugin(share, TWO.format(share=share), stage="'placement'"))
    record = optkit.run((), "--plan", "rows", "--plan", "layers", "--plan", "slices", "--task", "generate")
    one, rows, layers, slices = (arm["limit_seconds"] for arm in record["arms"])
    assert [arm["state"] for arm in record["arms"]] == ["ok"] * 4
    assert layers == pytest.approx(one) and slices == pytest.approx(one / 2)
    assert one / 2 <= rows < one  # each reads all of its weights for half of the rows
    assert record["arms"][3]["loaded"]["work"] == record["arms"][0]["loaded"]["work"]  # of the whole model
