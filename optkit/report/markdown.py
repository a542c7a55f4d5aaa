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
        f"## {harmless(heading(record))}",
        table([COLUMNS[index] for index in columns], [[row[index] for index in columns] for row in table_rows(record)]),
    ]
    proofs = proof_rows(record)
    if proofs:
        parts.append(table(["plan", "technique", "verdict", "evidence"], proofs))
    parts.append("\n".join(f"- {harmless(note)}" for note in [*footnotes(record), *origin(record)]))
    return "\n\n".join(parts) + "\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(harmless(cell) for cell in line) + " |" for line in lines)


#: As entities, which no reader takes for Markdown: a backslash before a bar would end the cell, brackets would make links and pictures.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "\\": "&#92;", "](": "]&#40;", "][": "]&#91;", "]:": "]&#58;"}


def harmless(text: str) -> str:
    """Harmless in Markdown and in the HTML that it becomes."""
    escaped = clean(text, 500)
    for raw, entity in _ENTITIES.items():
        escaped = escaped.replace(raw, entity)
    return escaped.replace("\n", " ").replace("`", "'")
