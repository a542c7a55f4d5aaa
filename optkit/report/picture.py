"""A record's table as an SVG picture, drawn by Rich from the same view that the terminal shows."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from optkit.report.terminal import record_view

WIDTH = 164


def render(record: dict[str, Any], command: str = "optkit run") -> str:
    """The SVG text, with fonts that every viewer has: nothing is fetched when it is looked at."""
    import re

    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False)
    console.print(record_view(record))
    svg = console.export_svg(title=command)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
