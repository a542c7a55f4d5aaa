"""The figures in docs/results.md and README are those of the raw results beside them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.table import filled, read
from optkit.report.rows import speed_up_cell

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "results.md").read_text()


def raw(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def line(beginning: str, section: str = "Llama-3.1-8B") -> str:
    """The one table row of a section that begins so."""
    rows = TEXT[TEXT.index(f"\n## {section}") + 1 :].partition("\n## ")[0].splitlines()
    found = [row for row in rows if row.startswith(f"| {beginning} |")]
    assert len(found) == 1, (beginning, found)
    return found[0]


def three(value: float) -> str:
    """Three significant digits, with thousands separated."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def compared(section: str, file: str, names: dict[str, str]) -> None:
    """Speed and ratio of every arm of a record."""
    record = raw(file)
    assert {arm["name"] for arm in record["arms"]} == names.keys()
    for arm in record["arms"]:
        shown = line(names[arm["name"]], section)
        assert f"| {three(arm['tokens'] / median(arm['seconds']))} |" in shown
        if arm["name"] != "baseline":
            assert f"| {speed_up_cell(arm, record).replace('] no', '], no')} |" in shown
    again = record["baseline_again"]
    assert f"{again['ratio']:.2f}"[:4] in line("baseline", section) and not again["differs"]


def test_techniques_on_a_cpu():
    both = {"baseline": "baseline", "int8": "`int8`"}
    bundled = both | {"compile": "`compile`", "precision": "`precision` (bfloat16)", "int8+compile": "`int8` + `compile`"}
    compared("The bundled model", "cpu-bundled.json", bundled)
    compared(
        "SmolLM2-135M", "cpu-smollm2-135m.json", both | {"precision": "`precision` (bfloat16)", "precision+int8": "`precision` + `int8`"}
    )
    assert raw("cpu-bundled.json")["command"] in TEXT


def test_decoding_one_prompt():
    result = raw("decode_h200.json")
    rows = {row["name"]: row for row in result["rows"]}
    shown = {
        "generate": "`generate`, SDPA",
        "compile, SDPA": "one compiled step as a CUDA graph, SDPA",
        "compile, kernel": "+ attention over the true length",
        "compile, kernel, fused": "+ q/k/v and gate/up as one product each",
        "compile, kernel, fused, 8192 columns": "the same, with a cache of 8192 columns",
        "compile, SDPA, fused, 8192 columns": "the same cache, SDPA",
    }
    assert rows.keys() == shown.keys()
    for name, row in rows.items():
        text, seconds = line(shown[name]), median(one["seconds"] for one in row["repeats"])
        assert len(row["repeats"]) == 6
        assert f"| {three(64 / seconds)} |" in text
        assert f"| {row['limit_seconds'] / seconds:.1%} |".replace("%", " %") in text
        if "step" in row["median"]:
            assert f"| {row['median']['step']:.2f} |" in text


def test_one_row_and_what_is_fused_into_its_products():
    rows = {row["name"]: row for row in raw("decode_one_row_h200.json")["rows"]}
    shown = {
        "generate": "plain `generate`",
        "+ matvec": "compiled step, our one-row products and attention",
        "+ fused steps (compile)": "norms, gates, residuals, rotary embedding and cache writes inside them",
    }
    assert rows.keys() == shown.keys()
    for name, row in rows.items():
        text, seconds = line(shown[name]), median(one["seconds"] for one in row["repeats"])
        assert len(row["repeats"]) == 8
        assert f"| {three(64 / seconds)} |" in text and f"| {row['limit_seconds'] / seconds:.1%} |".replace("%", " %") in text
        if "step" in row["median"]:
            assert f"| {row['median']['step']:.3f} | {row['step_kernels']['launches']} |" in text
    readme = (ROOT / "README.md").read_text()
    assert all(f"{64 / row['median']['seconds']:.3g}" in readme for name, row in rows.items() if name != "+ matvec")


def test_slices_of_a_model_on_two_gpus():
    rows = {(row["case"], row["arm"]): row for row in raw("parallel_tensor_h200x2.json")["rows"] if "arm" in row and "value" in row}
    for arm, shown in {
        "compile": "`compile` on one GPU",
        "compile+tensor": "`compile` + `parallel` (`tensor`)",
        "plain": "`generate` on one GPU",
        "layers": "`parallel` (`layers`)",
    }.items():
        speed, step = rows["generate 1x128+64", arm], rows["a step of one prompt", arm]
        cells = [cell.strip() for cell in line(shown).strip("|").split("|")]
        assert speed["n"] == 5 and float(cells[1].replace(",", "")) == round(speed["value"])
        assert cells[2] == f"{step['value']:.4g}"


def test_prompts_of_unequal_length():
    ours, theirs = (run["rows"] for run in raw("ragged_h200.json")["runs"])
    speeds = {row["case"]: row["tokens"] / median(row["seconds"]) for row in ours}
    text = line("`batching` (continuous, 256 slots) + `compile`")
    assert f"{speeds['equal']:,.0f} tokens/s" in text and f"{speeds['varied']:,.0f} tokens/s" in text
    for row in ours:
        assert f"{row['limit_seconds'] / median(row['seconds']):.0%} of limit".replace("%", " %") in text
    assert f"{theirs[0]['tokens'] / median(theirs[0]['seconds']):,.0f} tokens/s" in line("transformers' `generate_batch`")
    assert f"at {speeds['equal']:,.0f} tokens/s" in (ROOT / "README.md").read_text()


def test_offload_and_two_gpus():
    offload = {row["case"]: row for row in raw("offload_h200.json")["rows"]}
    for batch in (1, 8):
        text, row = line(f"batch {batch}"), offload[f"limited to 8 GB, batch {batch}"]
        assert three(row["value"]) in text and f"{row['share_of_bus']:.1%}".replace("%", " %") in text
        assert three(offload[f"fits, batch {batch}"]["value"]) in text
    gains = {row["arm"]: row for row in raw("parallel_h200x2.json")["rows"] if row["case"] == "gain over the first arm"}
    for mode in ("replicas", "layers", "tensor"):
        cells = [cell.strip() for cell in line(f"`{mode}`").strip("|").split("|")]
        assert cells[1:] == [f"{gains[mode][what]:.2f}" for what in ("generate", "score", "one prompt")]


def test_tables_of_recorded_cases():
    assert filled(TEXT, read(ROOT / "benchmarks" / "results" / "h200.jsonl")) == TEXT
    assert TEXT.count("<!-- table ") == 2


def test_weight_kernels():
    few, wide = raw("weight_kernels_h200.json"), raw("weight_kernels_wide_h200.json")
    batches = (1, 4, 16, 32, 64)

    def layer(format: str, batch: int) -> float:
        """Microseconds of the chosen variants for a layer's four products."""
        rows = [row for row in (wide if batch > 16 else few)["rows"] if (row["format"], row["batch"]) == (format, batch)]
        chosen = [row for row in rows if row.get("chosen", True) and row.get("group") in (None, 0, 64) and row["shape"] != "head"]
        assert sorted(row["shape"] for row in chosen) == ["down", "gate_up", "o", "qkv"]
        return sum(row["us"] for row in chosen)

    def cells(name: str) -> list[str]:
        return [cell.strip() for cell in line(name).strip("|").split("|")[1:]]

    bf16 = [layer("bf16", batch) for batch in batches]
    assert cells("bf16 (cuBLAS)") == [f"{us:.1f}" for us in bf16]
    assert cells("NF4") == [f"{layer('nf4', batch):.1f}" for batch in batches]
    for name, format in (("NF4", "nf4"), ("int8", "int8"), ("int4 in groups of 64", "int4")):
        found = [f"{whole / layer(format, batch):.2f}" for whole, batch in zip(bf16, batches, strict=True)]
        assert [cell for cell in cells(f"{name}, times bf16") if cell != "–"] == (found if format == "nf4" else found[:3] + found[4:])


def test_fp8_beside_int8():
    rows = [row for row in raw("fp8_h200.json")["rows"] if row["shape"] in ("gate_up", "down", "qkv", "o")]

    def layer(format: str, batch: int) -> float:
        return sum(row["us"] for row in rows if (row["format"], row["batch"]) == (format, batch))

    one, many = (layer("fp8", batch) / layer("int8", batch) for batch in (1, 16))
    page = (ROOT / "docs" / "techniques" / "fp8.md").read_text()
    assert f"takes {one:.2f} times as long as for int8 with one token at a time and {many:.2f} times with 16" in page
