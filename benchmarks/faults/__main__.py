"""``python -m benchmarks.faults``: inject faults, print what came of them, end with 1 where a target is missed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults import Figure, fields, kills, memo, timing, trials
from tests.faults import public_folder

#: how much of each, in full and with ``--quick``.
FULL = {"random faults": 8_000, "hits": 5_000, "trials": 200, "kills": 100, "killed runs": 8}
QUICK = {"random faults": 1_000, "hits": 500, "trials": 24, "kills": 10, "killed runs": 0}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller one, in half a minute; times are shown and not judged")
    parser.add_argument(
        "--timing", type=int, nargs=2, metavar=("EQUAL", "PLANTED"),
        help="instead: so many true comparisons of equal arms, and with a planted slow-down; --output is written after each",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the first comparison of --timing; each further one takes the next")
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="instead: what processes of --timing wrote, as one")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    options = parser.parse_args(arguments)
    begun = round(time.time())
    with tempfile.TemporaryDirectory(prefix="optkit-faults-") as name:
        os.environ |= {"OPTKIT_CACHE_DIR": f"{name}/own-cache", "OPTKIT_RECORDS_DIR": f"{name}/own-records"}
        if options.merge:
            try:
                summary = timing.merged([json.loads(Path(file).read_text(encoding="utf-8")) for file in options.merge])
            except ValueError as error:
                parser.error(f"--merge {' '.join(options.merge)}: {error}")
            figures = timing.figures(summary["runs"])
        elif options.timing:
            figures, summary = timed(Path(name), options, begun)
        else:
            figures = injected(Path(name), options.quick)
            summary = head("--quick" if options.quick else "", begun)
    summary["figures"] = [asdict(figure) for figure in figures]
    print(table(summary))
    if "runs" in summary:
        print(f"\n{timing.sentence(summary)}")
    write(options.output, summary)
    missed = [figure for figure in figures if figure.met is False]
    print(f"{len(missed)} of {len(figures)} targets missed" if missed else "all targets are met")
    return 1 if missed else 0


def head(arguments: str, begun: int) -> dict[str, Any]:
    """What every summary says of its origin."""
    return {
        "command": f"python -m benchmarks.faults {arguments}".rstrip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "seconds": round(time.time()) - begun,
    }


def timed(folder: Path, options: argparse.Namespace, begun: int) -> tuple[list[Figure], dict[str, Any]]:
    """True comparisons; the output holds each as soon as it is made, so that a cut-off loses none."""
    equal, planted = options.timing

    def summary(runs: list[timing.Run]) -> dict[str, Any]:
        own = head(f"--timing {equal} {planted} --seed {options.seed}", begun)
        return own | {"begun": begun, "at_a_time": 1, "runs": runs}

    def keep(runs: list[timing.Run]) -> None:
        print(timing.line(runs[-1]), flush=True)
        write(options.output, summary(runs))

    runs = timing.measure(folder, {"equal": equal, "planted": planted}, options.seed, keep)
    return timing.figures(runs), summary(runs)


def write(output: str | None, summary: dict[str, Any]) -> None:
    """Whole or not at all: what was there before stays until the new one is."""
    if output:
        new = Path(f"{output}.new")
        new.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(output)


def injected(folder: Path, quick: bool) -> list[Figure]:
    much, figures = QUICK if quick else FULL, []
    with public_folder() as memory:  # thousands of writes without waiting for a disk
        figures += memo.inject(memory, much["random faults"])
        figures.append(memo.hit_time(memory, much["hits"], judged=not quick))
        figures += fields.prove(memory)
        figures += kills.kill_runners(memory / "kills", much["kills"])
    figures += trials.sweep(folder, much["trials"])
    if much["killed runs"]:
        figures += kills.kill_runs(folder, much["killed runs"])
    return figures


def machine() -> str:
    from optkit.machine import detect

    here = detect()
    return f"{here.cpu_model}, {here.cpu_cores} cores, {platform.system()}, Python {platform.python_version()}"


def table(summary: dict[str, Any]) -> str:
    """Markdown, as it stands in ``docs/faults.md``."""
    lines = [f"`{summary['command']}`, {summary['date']}, {summary['machine']}; {summary['seconds']} s", ""]
    lines += ["| part | figure | found | target | n |", "|---|---|---|---|---|"]
    for row in summary["figures"]:
        mark = {True: "", False: " **missed**", None: " (not judged)"}[row["met"]]
        lines.append(f"| {row['part']} | {row['name']} | {row['value']}{mark} | {row['target']} | {row['n']:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
