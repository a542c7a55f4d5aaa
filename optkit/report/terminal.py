"""Rich tables in the terminal: data to stdout, everything else to stderr; plain and uncut where stdout is no terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from optkit.report.rows import COLUMNS, custom_rows, footnotes, proof_rows, table_rows, used_columns
from optkit.report.text import age, clean

Record = dict[str, Any]
STYLES = {"active": "green", "no effect": "yellow", "not proven": "red"}


def console(*, stderr: bool = False) -> Console:
    """A console that does not cut tables at 80 columns when it is piped, and that respects NO_COLOR."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 200, highlight=False, soft_wrap=False)


def safe(text: object, style: str = "") -> Text:
    """``clean`` text in which Rich sees no markup."""
    return Text(clean(text), style=style)


def record_view(record: Record, show: int = 0) -> Group:
    """The whole answer to ``optkit run``."""
    parts: list[Any] = [safe(heading(record), style="bold"), results(record)]
    if any(proof_rows(record)):
        parts.append(proofs(record))
    extra = custom_rows(record)
    if extra:
        parts.append(plain_table("further metrics", ["plan", "metric", "value"], extra))
    parts += [safe(f"· {note}", style="dim") for note in [*footnotes(record), *origin(record)]]
    parts += [
        safe(f"! {arm['name']}: {arm['state']}: {clean(arm['reason'], 300)}", style="red") for arm in record["arms"] if arm["state"] != "ok"
    ]
    if show:
        parts.append(outputs(record, show))
    return Group(*parts)


def heading(record: Record) -> str:
    machine = record["machine"]
    what = machine["name"] if machine["device"] == "cuda" else f"{machine['cpu_model']}, {machine['cpu_cores']} cores"
    dtype = record["arms"][0]["loaded"].get("dtype", "")
    shrunk = " (two layers)" if record["model"]["shrink"] else ""
    return f"{clean(record['model']['name'])}{shrunk} · {record['task']} · {dtype} · {clean(what)} · profile {record['profile']}"


def results(record: Record) -> Table:
    table = Table(header_style="bold", pad_edge=False)
    columns = used_columns(record)
    for index in columns:
        table.add_column(COLUMNS[index], justify="left" if index == 0 else "right", no_wrap=index == 0, overflow="fold")
    for arm, row in zip(record["arms"], table_rows(record), strict=True):
        found = arm.get("speed_up") or {}
        style = "red" if arm["state"] != "ok" else ""
        cells = [Text(clean(row[index], 300)) for index in columns]
        if found.get("differs") and 2 in columns:
            cells[columns.index(2)].stylize("green" if found["ratio"] > 1 else "red")
        table.add_row(*cells, style=style)
    return table


def proofs(record: Record) -> Table:
    table = Table(header_style="bold", pad_edge=False)
    for name in ("plan", "technique", "verdict", "evidence"):
        table.add_column(name, overflow="fold")
    for plan, technique, verdict, evidence in proof_rows(record):
        table.add_row(safe(plan), safe(technique), safe(verdict, style=STYLES.get(verdict, "")), Text(clean(evidence, 300)))
    return table


def plain_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=safe(title) if title else None, header_style="bold", pad_edge=False, title_justify="left")
    for name in columns:
        table.add_column(safe(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell, 1000)) for cell in row))
    return table


def origin(record: Record) -> list[str]:
    """Where the figures come from: this run, or a record with its age; the memo, and the time it saved."""
    notes = []
    if record.get("measured_now"):
        notes.append(f"timings measured in this run, {record['seconds']:.0f} s")
    else:
        notes.append(f"timings from the record of {age(record['time'])} ago ({record['id']}); --fresh measures again")
    sources = [arm.get("predictions_from") for arm in record["arms"] if "predictions_from" in arm]
    kept = sources.count("memo")
    if kept:
        notes.append(
            f"predictions of {kept} of {len(sources)} plans from the memo, {record['saved_seconds']:.1f} s saved; --force-recompute computes them again"
        )
    return notes


def outputs(record: Record, show: int) -> Table:
    """Texts of baseline and optimized side by side."""
    texts = {name: rows for name, rows in record.get("outputs", {}).items() if any(rows)}
    rows = [list(row) for row in zip(*(values[:show] for values in texts.values()), strict=False)]
    share = f"first {len(rows)} outputs"
    return plain_table(share, list(texts), [["–" if cell is None else clean(cell, 400) for cell in row] for row in rows])
