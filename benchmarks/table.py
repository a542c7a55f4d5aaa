"""Tables for README and docs from recorded cases, so that no figure in them need be typed by hand.

    python -m benchmarks.table benchmarks/results/h200.jsonl [--into README.md docs/results.md]

Without ``--into`` the tables are printed. A document says where a case's table goes with ``<!-- table CASE -->`` … ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from optkit.report import markdown
from optkit.report.rows import speed_up_cell
from optkit.report.text import megabytes, number, percent

Record = dict[str, Any]
HEAD = ("plan", "tokens/s", "× plain transformers [95 %]", "of its limit", "weights", "J/token", "first batch, again")
PLACE = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(path: Path) -> dict[str, Record]:
    """Case -> its latest record."""
    return {row["case"]: row for row in map(json.loads, path.read_text().splitlines())}


def table(record: Record) -> str:
    machine, libraries, protocol, timed = record["machine"], record["identity"]["libraries"], record["protocol"], record["timed"]
    same = record["baseline_again"]
    origin = [
        f"{record['model']['name']}, {record['samples']['name']}: {timed['samples']} at once, "
        + (f"{timed['tokens']} new tokens each" if timed["tokens"] else "scored"),
        f"{machine['name']}, driver {machine['driver'] or 'none'}, torch {libraries['torch']}, transformers {libraries['transformers']}",
        f"n = {protocol['rounds']} process pairs",
    ]
    if same:
        origin.append(f"a second untouched baseline reads {same['ratio']:.3f} [{same['low']:.3f}, {same['high']:.3f}]")
    return markdown.table(list(HEAD), [cells(arm, record) for arm in record["arms"]]) + f"\n\n{'; '.join(origin)}.\n\n"


def cells(arm: Record, record: Record) -> list[str]:
    if arm["state"] != "ok":
        return [arm["name"], arm["state"], arm["reason"], *["–"] * (len(HEAD) - 3)]
    seconds = median(arm["seconds"])
    again = arm.get("cold_again_seconds")
    return [
        arm["name"],
        number(arm["tokens"] / seconds),
        speed_up_cell(arm, record),
        percent(arm["limit_seconds"] / seconds, 1) if arm["limit_seconds"] else "–",
        megabytes(arm["loaded"].get("bytes")),
        number(arm["joules_per_token"]) if arm["joules_per_token"] else "–",
        f"{arm['cold_seconds']:.1f} s" + (f", {again:.1f} s" if again is not None else ""),
    ]


def filled(document: str, records: dict[str, Record]) -> str:
    """The document with the tables of the cases that it names. :raises KeyError: for a case that was not recorded."""
    return PLACE.sub(lambda place: place[1] + table(records[place[2]]) + place[3], document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    records = read(arguments.results)
    for path in arguments.into:
        path.write_text(filled(path.read_text(), records))
    if not arguments.into:
        for name, record in records.items():
            print(f"## {name}\n\n{table(record)}")


if __name__ == "__main__":
    main()
