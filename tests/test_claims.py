"""What a table may say: units that belong together, failures as failures, and no ratio without what it is a ratio to."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from optkit import measure
from optkit.report import history
from optkit.report.rows import COLUMNS, speed_up_cell, table_rows
from optkit.report.terminal import record_view
from optkit.report.text import megabytes, number, percent

RECORD = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "cpu-bundled.json").read_text())
STATES = ("failed", "oom", "crashed", "timeout", "killed", "unavailable", "skipped")


def shown(record: dict[str, Any], form: str) -> str:
    if form != "terminal":
        return history.render([record], form, False)
    stream = io.StringIO()
    Console(file=stream, width=400).print(record_view(record))
    return stream.getvalue()


def value(cell: str) -> float:
    return float(cell.replace(",", "").split()[0])


# ------------------------------------------------------------ units

positive = st.floats(1e-6, 1e6)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 10**7), st.lists(positive, min_size=1, max_size=9), st.floats(1e-3, 1.0))
def test_tokens_a_second_times_seconds_are_tokens_and_the_limit_is_a_share(tokens: int, seconds: list[float], share: float) -> None:
    middle = sorted(seconds)[len(seconds) // 2] if len(seconds) % 2 else sum(sorted(seconds)[len(seconds) // 2 - 1 :][:2]) / 2
    arm = copy.deepcopy(RECORD["arms"][0]) | {"tokens": tokens, "seconds": seconds, "limit_seconds": middle * share}
    row = dict(zip(COLUMNS, table_rows(RECORD | {"arms": [arm]})[0], strict=True))
    rate = value(row["tokens/s"])
    assert abs(rate * middle - tokens) <= max(0.006 * tokens, 0.51 * middle)  # three digits, whole numbers above 1,000
    assert abs(value(row["of limit"]) / 100 - share) <= 0.00501


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(1, 1e13))
def test_sizes_keep_their_value_whatever_their_unit(size: float) -> None:
    cell = megabytes(size)
    factor = {"MB": 1e6, "GB": 1e9}[cell.split()[1]]
    assert abs(value(cell) * factor - size) <= max(0.006 * size, 0.051 * 1e6)
    assert abs(value(percent(size / 1e13)) / 100 - size / 1e13) <= 0.00501
    assert abs(value(number(size)) - size) <= max(0.006 * size, 0.51)


# ------------------------------------------------------------ warm-up and synchronization


def test_a_clock_waits_for_the_device_before_it_reads_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on a GPU goes on after the call that started it: here it ends when somebody waits for it, and takes an hour."""
    now = [0.0]
    under_way = [7200.0]  # what was started before the clock

    def wait(device: str) -> None:
        assert device == "cuda"
        now[0] += under_way.pop() if under_way else 0.0

    monkeypatch.setattr(measure, "synchronize", wait)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    with measure.Clock("cuda") as clock:
        under_way.append(3600.0)
    assert clock.seconds == 3600.0


# ------------------------------------------------------------ failures


@pytest.mark.parametrize("form", ["terminal", "markdown", "svg"])
@pytest.mark.parametrize("state", STATES)
def test_a_failed_cell_is_shown_as_failed_with_its_reason(form: str, state: str) -> None:
    record = copy.deepcopy(RECORD)
    failed = record["arms"][1]
    failed |= {"state": state, "reason": "it met a wall", "seconds": [], "tokens": 0}
    name = failed["name"]
    text = shown(record, form)
    assert state in text and "it" in text and "wall" in text and name in text
    assert len(table_rows(record)) == len(RECORD["arms"])  # never dropped
    row = table_rows(record)[1]
    assert row[:3] == [name, state, "it met a wall"] and set(row[3:]) == {"–"}
    assert not re.search(r"\d", " ".join(row[3:]))  # and never as a figure
    others = [row for index, row in enumerate(table_rows(record)) if index != 1]
    assert others == [row for index, row in enumerate(table_rows(RECORD)) if index != 1]


# ------------------------------------------------------------ claims


def ratios(record: dict[str, Any]) -> list[str]:
    return [speed_up_cell(arm, record) for arm in record["arms"]]


def without_baseline(record: dict[str, Any]) -> None:
    del record["arms"][0]


def failed_baseline(record: dict[str, Any]) -> None:
    record["arms"][0] |= {"state": "oom", "reason": "too large", "seconds": []}


def no_reference(record: dict[str, Any]) -> None:
    record["reference"] = None


def fewer_rounds(record: dict[str, Any]) -> None:
    record["arms"][0]["seconds"].pop()


def another_n(record: dict[str, Any]) -> None:
    for arm in record["arms"][1:]:
        arm["speed_up"]["n"] = 1000


@pytest.mark.parametrize("spoil", [without_baseline, failed_baseline, no_reference, fewer_rounds, another_n])
def test_no_ratio_is_shown_without_a_baseline_measured_as_often(spoil: Any) -> None:
    assert sum("[" in cell for cell in ratios(RECORD)) == len(RECORD["arms"]) - 1
    record = copy.deepcopy(RECORD)
    spoil(record)
    assert not [cell for cell in ratios(record) if "[" in cell]
    for form in ("terminal", "markdown"):
        text = shown(record, form)
        for cell in ratios(RECORD)[1:]:
            assert cell not in text


@pytest.mark.parametrize("field", ["ratio", "low", "high", "n", "coverage", "differs"])
def test_a_ratio_without_its_interval_or_its_n_cannot_be_rendered(field: str) -> None:
    record = copy.deepcopy(RECORD)
    del record["arms"][1]["speed_up"][field]
    with pytest.raises(KeyError):
        ratios(record)


def test_every_table_says_how_often_and_against_what() -> None:
    for form in ("terminal", "markdown"):
        text = shown(RECORD, form)
        assert f"n = {RECORD['protocol']['rounds']} process pairs" in text
        assert "a second untouched baseline reads" in text
