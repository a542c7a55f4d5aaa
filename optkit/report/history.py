"""Recorded runs, shown again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from rich.console import Group

from optkit.errors import OptkitError, UsageError
from optkit.folders import records_folder
from optkit.report import markdown
from optkit.report.rows import speed_up_cell
from optkit.report.terminal import plain_table, record_view, safe
from optkit.report.text import clean
from optkit.store import RecordStore

Record = dict[str, Any]


def recorded(*, last: int | None, run_id: str | None) -> tuple[list[Record], list[str]]:
    """The newest runs, oldest first, and one line a damaged row."""
    found = RecordStore(records_folder()).read()
    runs = [row for row in found.rows if row.get("kind") == "run" and (run_id is None or row["id"] == run_id)]
    return runs[-last:] if last else runs, found.problems


def view(records: list[Record], list_only: bool) -> Any:
    if list_only:
        return overview(records)
    return Group(*(shown(record, record_view, lambda why: safe(f"! {why}", style="red")) for record in records))


def shown(record: Record, form: Callable[[Record], Any], instead: Callable[[str], Any]) -> Any:
    """The record in a form; or, where it is not what this optkit writes, what ``instead`` makes of the reason."""
    try:
        return form(record)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        return instead(f"run {record['id']} cannot be shown: {clean(what, 200)}; another version of optkit wrote it, or it was edited")


def render(records: list[Record], format: str, list_only: bool) -> str:
    if format == "json":
        return json.dumps(records, indent=2, ensure_ascii=True) + "\n"
    if format == "svg":
        from optkit.report import picture

        return shown(records[-1], picture.render, refuse)
    if format not in ("human", "markdown"):
        raise UsageError(f"--format {format}: choose human, markdown, svg or json")
    if list_only:
        return markdown.table(OVERVIEW, overview_rows(records)) + "\n"
    return "\n".join(shown(record, markdown.render, lambda why: f"{markdown.harmless(why)}\n") for record in records)


def refuse(why: str) -> str:
    raise OptkitError(why)


OVERVIEW = ["id", "when", "model", "task", "profile", "plan", "× baseline"]


def overview_rows(records: list[Record]) -> list[list[str]]:
    return [shown(record, overview_row, lambda why, record=record: [record["id"], why, *["–"] * 5]) for record in records]  # type: ignore[misc]


def overview_row(record: Record) -> list[str]:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["time"]))
    arm = record["arms"][-1]
    speed = speed_up_cell(arm, record) if arm["state"] == "ok" else arm["state"]
    return [str(cell) for cell in (record["id"], when, record["model"]["name"], record["task"], record["profile"], arm["name"], speed)]


def overview(records: list[Record]) -> Any:
    return plain_table("", OVERVIEW, overview_rows(records))
