"""Tables of README and docs from recorded cases, so that no figure in them is typed by hand.

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

from optkit.report.rows import speed_up_cell
from optkit.report.text import megabytes, number, percent

Record = dict[str, Any]
HEAD = ("plan", "tokens/s", "× plain transformers [95 %]", "of its limit", "weights", "J/token", "first batch, again")
PLACE = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(path: Path) -> dict[str, Record]:
    """Case -> its latest record."""
    return {row["case"]: row for row in map(json.loads, path.read_text().splitlines())}


def table(record: Record) -> str:
    rows = [HEAD, tuple("---" for _ in HEAD), *(cells(arm, record) for arm in record["arms"])]
    machine, libraries, protocol = record["machine"], record["identity"]["libraries"], record["protocol"]
    same = record["baseline_again"]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += [
        "",
        f"{record['model']['name']}, {record['samples']['name']}, {record['timed']['samples']} at once"
        + (f", {record['timed']['tokens']} new tokens each" if record["timed"]["tokens"] else ", scored")
        + f"; {machine['name']}, driver {machine['driver'] or '–'}, torch {libraries['torch']}, transformers {libraries['transformers']}; "
        f"n = {protocol['rounds']} process pairs"
        + (f"; a second untouched baseline reads {same['ratio']:.3f} [{same['low']:.3f}, {same['high']:.3f}]." if same else "."),
        "",
    ]
    return "\n".join(lines)


def cells(arm: Record, record: Record) -> tuple[str, ...]:
    if arm["state"] != "ok":
        return (f"`{arm['name']}`", arm["state"], arm["reason"], "–", "–", "–", "–")
    seconds = median(arm["seconds"])
    again = arm.get("cold_again_seconds")
    return (
        f"`{arm['name']}`",
        number(arm["tokens"] / seconds),
        speed_up_cell(arm, record),
        percent(arm["limit_seconds"] / seconds, 1) if arm["limit_seconds"] else "–",
        megabytes(arm["loaded"].get("bytes")),
        number(arm["joules_per_token"]) if arm["joules_per_token"] else "–",
        f"{arm['cold_seconds']:.1f} s" + (f", {again:.1f} s" if again is not None else ""),
    )


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
