"""``python -m benchmarks.faults --timing``: what it plants, what it keeps when it is cut off, what it counts, and what the docs say of it."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import __main__ as command
from benchmarks.faults import timing
from optkit.request import Request, prepare

ROOT = Path(__file__).parents[1]


def run(kind: str, seed: int, ratio: float, differs: bool, **more: Any) -> timing.Run:
    again = {"ratio": 1.001, "low": 0.99, "high": 1.01, "differs": False}
    facts = {"n": 40 if kind == "planted" else 10, "ratio": ratio, "low": ratio - 0.01, "high": ratio + 0.01, "differs": differs}
    return {"kind": kind, "seed": seed, **facts, "again": again, "busy_cores": 0.1, "seconds": 60, **more}


def found_of(runs: list[timing.Run]) -> dict[str, tuple[str, bool | None]]:
    return {figure.name: (figure.value, figure.met) for figure in timing.figures(runs)}


def test_the_planted_arm_waits_as_long_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own, which moves on by a millisecond whenever it is read: 1 s of work becomes 1.05, and stays 1 s at 0."""
    namespace: dict[str, Any] = {"__name__": "slower"}
    exec(timing.PLUGIN, namespace)
    now = [0.0]

    def tick(seconds: float = 0.001) -> float:
        now[0] += seconds
        return now[0]

    namespace["time"] = types.SimpleNamespace(perf_counter=tick)
    for share, expected in ((timing.SLOW_DOWN, 1.05), (0.0, 1.0)):
        engine = types.SimpleNamespace(generate=lambda prompts, **arguments: tick(1.0) and prompts)
        trial = types.SimpleNamespace(options=namespace["SlowerOptions"](share=share))
        begin = now[0]
        assert namespace["wrap_engine"](engine, trial).generate(["a"], new_tokens=1) == ["a"]
        assert now[0] - begin == pytest.approx(expected, abs=0.005)
    assert pytest.approx(1 / 1.05) == timing.EXPECTED


def test_the_targets_are_those_of_ten_and_of_twenty() -> None:
    equal = [run("equal", seed, 1.0, False) for seed in range(20)]
    planted = [run("planted", seed, 0.95, True) for seed in range(10)]
    fine = found_of([*equal, *planted])
    assert fine["equal arms that differ"] == ("0", True) and fine["planted 0.952 × found"] == ("10", True)
    equal[3]["differs"] = True
    planted[4]["ratio"] = 1.06  # a gain is claimed where there is a loss
    still = found_of([*equal, *planted])
    assert still["equal arms that differ"] == ("1", True) and still["planted 0.952 × found"] == ("9", True)
    equal[5]["differs"] = True
    planted[7]["differs"] = False
    missed = found_of([*equal, *planted])
    assert missed["equal arms that differ"] == ("2", False) and missed["planted 0.952 × found"] == ("8", False)
    failed = found_of([*planted, {"kind": "equal", "seed": 0, "failed": "no space left", "seconds": 1}])
    assert failed["comparisons that failed"] == ("1", False) and "equal arms that differ" not in failed


def test_the_protocols_are_those_of_the_targets() -> None:
    from optkit.experiment import protocol_of

    request = Request(profile="cpu", plugins=[], limit=1, thorough=True)
    assert timing.KINDS["planted"] == (0.05, ("--thorough",)) and protocol_of(request, prepare(request)).rounds == 40
    assert timing.KINDS["equal"] == (0.0, ("--repeats", "10"))


def test_a_cut_off_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[tuple[float, int]] = []

    def compared(folder: Path, seed: int, share: float, protocol: tuple[str, ...]) -> timing.Run:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((share, seed))
        kind = "planted" if share else "equal"
        return {name: value for name, value in run(kind, seed, 1 - share, bool(share)).items() if name not in ("kind", "seed", "seconds")}

    monkeypatch.setattr(timing, "compared", compared)
    output = tmp_path / "timing.json"
    with pytest.raises(KeyboardInterrupt):
        command.main(["--timing", "4", "1", "--seed", "7", "--output", str(output)])
    kept = json.loads(output.read_text())["runs"]
    assert [(one["kind"], one["seed"]) for one in kept] == [("equal", 7), ("planted", 7), ("equal", 8)]
    assert made == [(0.0, 7), (0.05, 7), (0.0, 8)]  # the kinds in turn
    assert "planted 7, 0 s: n = 40: 0.950 [0.940, 0.960], differs" in capsys.readouterr().out
    assert str(tmp_path) not in output.read_text()


def test_what_ran_side_by_side_is_one_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def summary(seed: int, begun: int, machine: str = "a CPU, 2 cores") -> str:
        runs = [run("planted", seed, 0.95 + seed / 100, True), run("equal", seed, 1.0 + seed / 100, False)]
        file = tmp_path / f"{seed} {begun} {machine}.json"
        facts = {"command": f"c --seed {seed}", "date": "2030-01-02", "machine": machine, "begun": begun, "seconds": 100}
        file.write_text(json.dumps(facts | {"at_a_time": 1, "runs": runs}))
        return str(file)

    output = tmp_path / "merged.json"
    assert command.main(["--merge", summary(0, 1000), summary(1, 1050), summary(2, 1200), "--output", str(output)]) == 0
    whole = json.loads(output.read_text())
    assert (whole["at_a_time"], whole["seconds"], len(whole["runs"])) == (2, 300, 6)
    assert {figure["name"]: figure["value"] for figure in whole["figures"]}["planted 0.952 × found"] == "3"
    said = (
        "2030-01-02, a CPU, 2 cores, 2 at a time: a planted 0.952 × was found in 3 of 3 comparisons of 40 pairs (median 0.960, 0.950 to 0.970); "
        "an arm that does nothing differed in 0 of 3 comparisons of 10 pairs (median 1.010, 1.000 to 1.020); "
        "a second baseline differed in 0 of 6."
    )
    assert timing.sentence(whole) == said and said in capsys.readouterr().out
    for others, words in (([summary(0, 1000, "b")], "different machines"), ([summary(1, 9)], "a --seed of its own")):
        with pytest.raises(SystemExit) as refused:
            command.main(["--merge", summary(1, 1000), *others])
        assert refused.value.code == 2 and words in capsys.readouterr().err


def test_true_comparisons_are_made_and_a_failed_one_is_named(tmp_path: Path) -> None:
    """One process pair each: too few to claim anything."""
    kept: list[int] = []
    protocols = {"equal": ("--repeats", "1", "--set", "generate.max_new_tokens=4"), "planted": ("--repeats", "no number")}
    counts = {"equal": 1, "planted": 1}
    equal, planted = timing.measure(tmp_path, counts, 3, lambda runs: kept.append(len(runs)), protocols)
    assert kept == [1, 2]
    assert (equal["n"], equal["differs"], equal["seed"]) == (1, False, 3) and equal["low"] <= equal["ratio"] <= equal["high"]
    assert set(equal["again"]) == {"ratio", "low", "high", "differs"}
    assert "--repeats" in planted["failed"] and "valid integer" in timing.line(planted)


@pytest.mark.parametrize("name", ["faults-timing", "faults-timing-side-by-side"])
def test_the_docs_say_what_was_found(name: str) -> None:
    raw = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "faults.md").read_text(encoding="utf-8"))
    assert timing.sentence(raw) in page
    assert {figure["name"]: figure["met"] for figure in raw["figures"]}
