"""Techniques on a GPU: one process, many cases, one line an arm, every record as JSON.

    python -m benchmarks.gpu --cases small,8b --config Llama-3.1-8B.json --output benchmarks/results/h200.jsonl

``small`` runs every technique on the bundled model and says which of them work here; the others take random weights of a true shape.
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

ONE_BY_ONE = [
    "flash",
    "compile",
    "nf4",
    "fp4",
    "int8",
    "gqa",
    "precision",
    "kv-cache",
    "sampling",
    "prune",
    "batching",
    "cache",
    "offload",
    "onnx",
]
TOGETHER = ["precision", "gqa", "prune", "kv-cache", "sampling", "batching", "cache", "offload"]
OPTIONS = {
    "kv-cache": {"kv-cache.kind": "static"},
    "sampling": {"sampling.repetition_penalty": 1.2},
    "offload": {"offload.layers": 1},
    "batching": {"batching.kind": "length"},
}


def cases(names: list[str], config: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and request of each case."""
    large = {"model": f"random:{config}", "samples": "random:8x128", "repeats": 2, "set": {"generate.max_new_tokens": 64, "batch.size": 1}}
    table: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "small": [
            (name, {"plugins": [name], "repeats": 1, "limit": 64, "set": {"batch.size": 16} | OPTIONS.get(name, {})}) for name in ONE_BY_ONE
        ],
        "together": [("together", {"plugins": TOGETHER, "each": True, "repeats": 1, "limit": 16,
                                   "set": {"batch.size": 16} | {key: value for name in TOGETHER for key, value in OPTIONS.get(name, {}).items()}})],
        "8b": [("8b, batch 1", large | {"plugins": ["flash", "compile", "nf4"], "each": True})],
        "8b-fused": [("8b, batch 1, fused nf4", large | {"plugins": ["nf4", "compile"], "repeats": 1, "limit": 2,
                                                          "set": {"generate.max_new_tokens": 64, "batch.size": 1, "nf4.kernel": "triton"}})],
        "8b-int8": [("8b int8, batch 1", large | {"plugins": ["int8", "compile"], "each": True})],
        "8b-64": [("8b, batch 64", large | {"plugins": ["compile", "nf4"], "each": True, "samples": "random:64x128",
                                             "set": {"generate.max_new_tokens": 128, "batch.size": 64}})],
        "8b-score": [("8b, scoring", large | {"plugins": ["flash", "compile"], "each": True, "task": "score", "samples": "random:8x2048",
                                               "set": {"batch.size": 4}})],
    }  # fmt: skip
    return [case for name in names for case in table[name]]


def lines(name: str, record: dict[str, Any]) -> None:
    for arm in record["arms"]:
        seconds = median(arm["seconds"]) if arm["seconds"] else None
        share = arm["limit_seconds"] / seconds if seconds and arm.get("limit_seconds") else None
        verdicts = {technique: proof["verdict"] for technique, proof in arm["proof"].items()}
        speed = f"{arm['tokens'] / seconds:9.1f} tok/s" if seconds else "        –      "
        print(
            f"{name:20s} {arm['name']:24s} {arm['state']:8s} {speed} {speed_up_cell(arm, record):34s} "
            f"{f'{share:.1%} of limit' if share else '':16s} cold {arm['cold_seconds'] or 0:.1f} s {verdicts} {arm['reason']}",
            flush=True,
        )
        if arm["state"] != "ok":
            print(arm["log"][-1500:], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="small")
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--config", default="")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500, help="no case begins after this long")
    arguments = parser.parse_args()
    started = time.monotonic()
    with arguments.output.open("a") as output:
        for name, request in cases(arguments.cases.split(","), arguments.config):
            if time.monotonic() - started > arguments.seconds:
                print(f"{name:20s} not run: the time is up", flush=True)
                continue
            begun = time.monotonic()
            try:
                record = optkit.run(profile=arguments.profile, fresh=True, timeout=300.0, warn=print, **request)
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
