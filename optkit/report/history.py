"""Recorded runs, shown again."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Group

from optkit.errors import UsageError
from optkit.folders import records_folder
from optkit.report import markdown
from optkit.report.rows import speed_up_cell
from optkit.report.terminal import plain_table, record_view
from optkit.store import RecordStore

Record = dict[str, Any]


def recorded(*, last: int | None, run_id: str | None) -> tuple[list[Record], list[str]]:
    """The newest runs, oldest first, and one line a damaged row."""
    found = RecordStore(records_folder()).read()
    runs = [row for row in found.rows if row.get("kind") == "run" and (run_id is None or row["id"] == run_id)]
    return runs[-last:] if last else runs, found.problems


def view(records: list[Record], list_only: bool) -> Any:
    return overview(records) if list_only else Group(*(record_view(record) for record in records))


def render(records: list[Record], format: str, list_only: bool) -> str:
    if format == "json":
        return json.dumps(records, indent=2, ensure_ascii=True) + "\n"
    if format == "svg":
        from optkit.report import picture

        return picture.render(records[-1])
    if format not in ("human", "markdown"):
        raise UsageError(f"--format {format}: choose human, markdown, svg or json")
    if list_only:
        return markdown.table(OVERVIEW, overview_rows(records)) + "\n"
    return "\n".join(markdown.render(record) for record in records)


OVERVIEW = ["id", "when", "model", "task", "profile", "plan", "× baseline"]


def overview_rows(records: list[Record]) -> list[list[str]]:
    rows = []
    for record in records:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["time"]))
        arm = record["arms"][-1]
        speed = speed_up_cell(arm, record) if arm["state"] == "ok" else arm["state"]
        rows.append([record["id"], when, record["model"]["name"], record["task"], record["profile"], arm["name"], speed])
    return rows


def overview(records: list[Record]) -> Any:
    return plain_table("", OVERVIEW, overview_rows(records))
