"""From a record to the cells of its table: one place decides what is shown, in whatever form it is then printed."""

from __future__ import annotations

from statistics import median
from typing import Any

from optkit.machine import QUIET_CORES
from optkit.report.text import megabytes, number, percent, signed

#: A host whose slowest moment is slower than its fastest by more than this factor is told of.
STEADY_HOST = 1.25

Record = dict[str, Any]

COLUMNS = (
    "plan",
    "tokens/s",
    "× baseline [95 %]",
    "of limit",
    "weights",
    "peak",
    "J/token",
    "perplexity",
    "exact match",
    "agreement",
    "KL",
)


def table_rows(record: Record) -> list[list[str]]:
    """The cells of every arm. A figure that was not measured is a dash, a failed arm shows its state and reason."""
    return [_row(arm, record) for arm in record["arms"]]


def used_columns(record: Record) -> list[int]:
    """Columns that hold anything."""
    rows = table_rows(record)
    return [index for index in range(len(COLUMNS)) if index == 0 or any(row[index] not in ("", "–") for row in rows)]


def _row(arm: Record, record: Record) -> list[str]:
    if arm["state"] != "ok":
        return [arm["name"], arm["state"], arm["reason"], *["–"] * (len(COLUMNS) - 3)]
    quality = arm.get("quality", {})
    seconds = median(arm["seconds"]) if arm["seconds"] else None
    limit = arm.get("limit_seconds")
    return [
        arm["name"],
        number(arm["tokens"] / seconds) if seconds else "–",
        speed_up_cell(arm, record),
        percent(limit / seconds) if limit and seconds else "–",
        megabytes(arm["loaded"].get("bytes")),
        megabytes(arm["peak_bytes"]),
        number(arm["joules_per_token"]) if arm.get("joules_per_token") else "–",
        quality_cell(quality.get("perplexity"), perplexity_text, 6 if quality.get("perplexity", {}).get("value", 2) < 1.01 else 3),
        quality_cell(quality.get("exact_match"), lambda value: percent(value, 1), 1, scale=100),
        percent(quality["agreement"]["value"], 1) if "agreement" in quality else "–",
        f"{quality['kl']['value']:.2g}" if "kl" in quality else "–",
    ]


def perplexity_text(value: float) -> str:
    """Digits enough to tell apart answers that are nearly certain (perplexity 1), and no more where it is large."""
    if value < 1.01:
        return f"{value:.6f}"
    return f"{value:.3f}" if value < 100 else f"{value:.5g}" if value < 1e5 else f"{value:.3g}"


def speed_up_cell(arm: Record, record: Record) -> str:
    """``1.94 [1.90, 1.99]``, and in words where no difference may be claimed. A dash where what it is claimed against was not measured."""
    found = arm.get("speed_up")
    if arm["name"] == record.get("reference"):
        return "1"
    reference: Record = next((other for other in record["arms"] if other["name"] == record.get("reference")), {"state": "absent"})
    if not found or reference["state"] != "ok" or not len(reference["seconds"]) == len(arm["seconds"]) == found["n"] > 0:
        return "–"
    text = f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
    if found["coverage"] < 0.95:
        return f"{text} too few pairs"
    return text if found["differs"] else f"{text} no difference"


def quality_cell(metric: Record | None, show: Any, digits: int, scale: float = 1) -> str:
    """The value, and its difference from the baseline: a star where the difference is beyond chance."""
    if not metric:
        return "–"
    if metric.get("value") is None:
        return "not finite"
    text = show(metric["value"])
    if metric.get("difference") is not None:
        text += f" ({signed(metric['difference'] * scale, digits)}{'*' if metric.get('differs') else ''})"
    return text


def proof_rows(record: Record) -> list[list[str]]:
    """Plan, technique, verdict and evidence of every technique in every arm."""
    return [
        [arm["name"], name, proof["verdict"], str(proof["summary"])]
        for arm in record["arms"]
        for name, proof in arm.get("proof", {}).items()
    ]


def custom_rows(record: Record) -> list[list[str]]:
    """Plan, metric and value of metrics that are not in the table."""
    known = {"perplexity", "exact_match", "agreement", "kl"}
    return [
        [arm["name"], name, f"{value['value']:.4g}" if "value" in value else value["error"]]
        for arm in record["arms"]
        for name, value in arm.get("quality", {}).items()
        if name not in known
    ]


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def footnotes(record: Record) -> list[str]:
    """What a sceptic asks first: how often, against what, how noisy, from when."""
    protocol, timed = record["protocol"], record["timed"]
    work = count(timed["samples"], "sample") + (f" × {timed['tokens']} new tokens" if timed["tokens"] else "")
    notes = [
        f"n = {count(protocol['rounds'], 'process pair')} × {count(protocol['turns'], 'turn')} of {protocol['repeat']} × ({work}), "
        + ("taking turns in random order" if protocol["interleaved"] else "whole processes alternating, not interleaved")
        + "; median of the paired ratios, order-statistic interval"
    ]
    again = record.get("baseline_again")
    if again:
        verdict = "differs" if again["differs"] else "no difference"
        notes.append(f"a second untouched baseline reads {again['ratio']:.3f} [{again['low']:.3f}, {again['high']:.3f}]: {verdict}")
    ratios = [arm["speed_up"]["coverage"] for arm in record["arms"] if arm.get("speed_up")]
    if ratios and min(ratios) < 0.95:
        pairs = count(protocol["rounds"], "pair")
        notes.append(f"an interval of {pairs} covers {percent(min(ratios))} only; no difference is claimed below 6, --repeats 6 or more")
    peaks = record.get("peaks")
    if peaks:
        notes.append(
            f"limit: {peaks['read_bandwidth'] / 1e9:,.0f} GB/s read and {peaks['flops'] / 1e12:.3g} TFLOP/s {peaks['dtype']}, measured in this run"
        )
    crowded = [busy for busy in record["busy_cores"] if busy > QUIET_CORES]
    if crowded:
        notes.append(
            f"others kept up to {max(crowded):.1f} cores busy in {len(crowded)} of {len(record['busy_cores'])} rounds: threads slept while waiting "
            "there (OMP_WAIT_POLICY=passive), and times are longer than on a quiet machine"
        )
    notes += host_note(record.get("host_seconds")) + cold_note(record)
    quality = record["arms"][0].get("quality", {})
    counts = {name: value["n"] for name, value in quality.items() if "n" in value}
    if counts:
        notes.append(", ".join(f"{name.replace('_', ' ')} over {n} samples" for name, n in counts.items()) + "; * beyond chance (p < 0.05)")
    return notes


def host_note(seconds: dict[str, float] | None) -> list[str]:
    """That the host's own speed changed while it waited for a GPU, if it did. :param seconds: ``fastest`` and ``slowest``, of the same work."""
    if seconds is None or seconds["slowest"] <= STEADY_HOST * seconds["fastest"]:
        return []
    return [
        f"the host's speed changed while this was measured: a fixed piece of Python took {1000 * seconds['fastest']:.1f} to "
        f"{1000 * seconds['slowest']:.1f} ms. What waits for Python, as generate on a GPU does, changed with it, and so did speed-ups over "
        "it: other work on this host or its neighbours, probably; repeat when it is quiet"
    ]


def cold_note(record: Record) -> list[str]:
    """What plans that compile or start a server take before they are fast, where that is a second more than the baseline takes."""
    usual = record["arms"][0].get("cold_seconds") or 0.0
    slow = []
    for arm in record["arms"]:
        if (arm.get("cold_seconds") or 0.0) > usual + 1:
            again = arm.get("cold_again_seconds")
            slow.append(
                f"{arm['name']} {arm['cold_seconds']:.1f} s" + (f" ({again:.1f} s in later processes)" if again is not None else "")
            )
    return [f"the first batch took {', '.join(slow)}; baseline {usual:.1f} s"] if slow else []
