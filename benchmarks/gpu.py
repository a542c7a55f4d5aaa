"""Plans on a GPU beside plain transformers: one process, many cases, one line an arm, every record as JSON.

    python -m benchmarks.gpu --cases small,decode-1,decode-64 --config Llama-3.1-8B.json --output benchmarks/results/h200.jsonl

``small`` runs every technique alone on the bundled model and says which of them work here; the others take random weights of a true shape,
of which quality says nothing. ``python -m benchmarks.table`` makes the tables of README and docs from the output.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

import optkit
from optkit.errors import OptkitError
from optkit.report.rows import speed_up_cell

ONE_BY_ONE = (
    "flash", "compile", "nf4", "fp4", "int8", "gqa", "precision", "kv-cache", "sampling", "prune", "batching", "cache", "offload", "onnx",
    "speculate",
)  # fmt: skip
OPTIONS = {
    "kv-cache": {"kv-cache.kind": "static"},
    "sampling": {"sampling.repetition_penalty": 1.2},
    "offload": {"offload.layers": 1},
    "batching": {"batching.kind": "length"},
}
DECODE = [["flash"], ["compile"], ["nf4"], ["flash", "compile", "nf4"]]


def decode(batch: int, prompt: int = 128, new_tokens: int = 64, plans: list[list[str]] = DECODE) -> dict[str, Any]:
    return {
        "samples": f"random:{batch}x{prompt}", "plans": plans, "task": "generate",
        "set": {"generate.max_new_tokens": new_tokens, "batch.size": batch},
    }  # fmt: skip


def cases(names: list[str], config: str, rounds: int) -> list[tuple[str, dict[str, Any]]]:
    """Name and request of each case."""
    table: dict[str, dict[str, Any]] = {
        **{f"decode-{batch}": decode(batch) for batch in (1, 8, 64, 256)},
        "prefill": decode(4, 4096, 1, [["flash"], ["compile"]]),
        "long": decode(8, 8064, 128, [["compile"], ["nf4", "compile"]]),
        "score": {"samples": "random:4x4096", "plans": [["flash"], ["compile"]], "task": "score", "set": {"batch.size": 4}},
    }
    found = []
    for name in names:
        if name == "small":
            small = {"repeats": 1, "limit": 64}
            found += [
                (one, small | {"plugins": [one], "set": {"batch.size": 1 if one == "speculate" else 16} | OPTIONS.get(one, {})})
                for one in ONE_BY_ONE
            ]
        else:
            found.append((name, {"model": f"random:{config}", "repeats": rounds} | table[name]))
    return found


def lines(name: str, record: dict[str, Any]) -> None:
    for arm in record["arms"]:
        seconds = median(arm["seconds"]) if arm["seconds"] else None
        share = arm["limit_seconds"] / seconds if seconds and arm.get("limit_seconds") else None
        verdicts = {technique: proof["verdict"] for technique, proof in arm["proof"].items()}
        speed = f"{arm['tokens'] / seconds:9.1f} tok/s" if seconds else "        –      "
        print(
            f"{name:20s} {arm['name']:24s} {arm['state']:8s} {speed} {speed_up_cell(arm, record):34s} "
            f"{f'{share:.1%} of limit' if share else '':16s} cold {arm['cold_seconds'] or 0:.1f}, {arm['cold_again_seconds'] or 0:.1f} s "
            f"{verdicts} {arm['reason']}",
            flush=True,
        )
        if arm["state"] != "ok":
            print(arm["log"][-1500:], flush=True)


class Steps:
    """Prints what a run does, with the time, so that a slow step can be seen."""

    def __init__(self) -> None:
        self.begun, self.last = time.monotonic(), ""

    def __call__(self, done: int, total: int, text: str) -> None:
        if text != self.last and not text.startswith("generated"):
            self.last = text
            print(f"    {time.monotonic() - self.begun:6.1f} s {done}/{total} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="small")
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--config", default="")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6, help="process pairs; fewer than 6 give no interval of 95 %%")
    parser.add_argument("--case-seconds", type=float, default=None, help="no further process pair of a case begins after this long")
    parser.add_argument("--seconds", type=float, default=500, help="no case begins after this long")
    arguments = parser.parse_args()
    started = time.monotonic()
    with arguments.output.open("a") as output:
        for name, request in cases(arguments.cases.split(","), arguments.config, arguments.rounds):
            if time.monotonic() - started > arguments.seconds:
                print(f"{name:20s} not run: the time is up", flush=True)
                continue
            begun = time.monotonic()
            try:
                record = optkit.run(
                    profile=arguments.profile,
                    fresh=True,
                    timeout=300.0,
                    warn=print,
                    progress=Steps(),
                    time_limit=arguments.case_seconds,
                    **request,
                )
            except OptkitError as error:
                print(f"{name:20s} refused: {error}", flush=True)
                continue
            except Exception:  # one case's fault must not cost the others on a machine that is lent by the minute
                traceback.print_exc()
                continue
            lines(name, record)
            print(f"{name:20s} took {time.monotonic() - begun:.0f} s", flush=True)
            record.pop("outputs", None)
            output.write(json.dumps({"case": name, **record}, ensure_ascii=True) + "\n")
            output.flush()


if __name__ == "__main__":
    main()
