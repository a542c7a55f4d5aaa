"""A record as Markdown."""

from __future__ import annotations

from typing import Any

from optkit.report.rows import COLUMNS, footnotes, proof_rows, table_rows, used_columns
from optkit.report.terminal import heading, origin
from optkit.report.text import clean


def render(record: dict[str, Any]) -> str:
    """Heading, results, proof and footnotes."""
    columns = used_columns(record)
    parts = [
        f"## {_cell(heading(record))}",
        table([COLUMNS[index] for index in columns], [[row[index] for index in columns] for row in table_rows(record)]),
    ]
    proofs = proof_rows(record)
    if proofs:
        parts.append(table(["plan", "technique", "verdict", "evidence"], proofs))
    parts.append("\n".join(f"- {_cell(note)}" for note in [*footnotes(record), *origin(record)]))
    return "\n\n".join(parts) + "\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Harmless in Markdown and in the HTML that it becomes."""
    escaped = clean(text, 500).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("|", "\\|").replace("\n", " ").replace("`", "'")
