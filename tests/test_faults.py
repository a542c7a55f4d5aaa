"""The fault table in ``docs/faults.md`` names a test that exists for every row, and ``make faults`` does what it says."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import Figure
from benchmarks.faults import __main__ as command

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+) \|(.*)\|(.*)\|(.*)\|$", re.M)
#: Rows on checkpoints, which come with training.
LATER = {39, 40, 41}


def named_tests() -> list[str]:
    return sorted({test for _, _, _, tests in ROW.findall(PAGE) for test in re.findall(r"`(tests/[^`]+)`", tests)})


def test_every_row_has_a_test():
    rows = {int(number): tests for number, _, _, tests in ROW.findall(PAGE)}
    assert set(rows) == set(range(1, 51)) - LATER
    assert [number for number, tests in rows.items() if not re.search(r"`tests/\S+\.py::test_\w+`", tests)] == []
    assert "Rows 39 to 41" in PAGE


@pytest.mark.parametrize("name", named_tests())
def test_the_test_exists(name):
    path, _, function = name.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_command_meets_its_targets(tmp_path):
    output = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--quick", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(output.read_text())
    found = {figure["name"]: figure for figure in summary["figures"]}
    assert found["wrong values"]["n"] > 4000 and found["changed fields of a run's spec that still hit"]["n"] > 200
    assert {figure["part"] for figure in summary["figures"]} == {"memo", "trials", "kills"}
    assert "all targets are met" in done.stdout and summary["date"] in done.stdout and summary["machine"] in done.stdout


def test_a_missed_target_ends_with_1(monkeypatch, capsys):
    missed = Figure.none_of("memo", "wrong values", 1, 10_000)
    fine = Figure("memo", "median of a hit", "0.1 ms", "≤ 0.2 ms", True, 5)
    monkeypatch.setattr(command, "injected", lambda folder, quick: [fine, missed])
    assert command.main(["--quick"]) == 1
    shown = capsys.readouterr().out
    assert "| memo | wrong values | 1 **missed** | 0 | 10,000 |" in shown and "1 of 2 targets missed" in shown
    monkeypatch.setattr(command, "injected", lambda folder, quick: [fine])
    assert command.main(["--quick"]) == 0
