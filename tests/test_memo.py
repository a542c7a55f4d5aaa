"""The memo when nothing goes wrong on the disk: what is found, what is not, what is kept, and for how long."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from optkit.memo import Memo
from optkit.memo_entry import Key, Origin, pack

SPEC: dict[str, Any] = {
    "model": "0f3a",
    "samples": ["aa", "bb"],
    "generate": {"max_new_tokens": 16, "temperature": 1.0, "sample": True, "stop": None},
    "versions": {"optkit": "0.1.0", "torch": "2.13.0"},
}


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def memo(tmp_path, warnings) -> Memo:
    return Memo(tmp_path / "memo", warn=warnings.append)


def never(spec: dict[str, Any]) -> Any:
    raise AssertionError(f"computed again: {spec}")


def put(memo: Memo, spec: dict[str, Any], value: Any, *, age_seconds: float = 0.0) -> Path:
    """An entry that looks computed ``age_seconds`` ago."""
    memo.compute("metrics", lambda _: None, {"any": "entry makes the folder"})
    key = Key.of(memo.folder, "metrics", spec)
    Path(key.path).write_bytes(pack(key, json.dumps(value), Origin("computed", 2.5, time.time() - age_seconds)))
    return Path(key.path)


def test_a_result_is_computed_once_and_found_again(memo, warnings):
    before = time.time()
    value, origin = memo.compute("metrics", lambda spec: {"perplexity": 4.6875, "n": len(spec["samples"])}, SPEC)
    assert value == {"perplexity": 4.6875, "n": 2}
    assert origin.source == "computed"
    assert before <= origin.time <= time.time()

    assert memo.compute("metrics", never, SPEC) == (value, Origin("memo", origin.seconds, origin.time))
    hit = memo.lookup("metrics", SPEC)
    assert (hit.value, hit.time, hit.seconds) == (value, origin.time, origin.seconds)
    assert hit.path.parent == memo.folder
    assert warnings == []


def test_another_process_finds_it_without_joblib_or_numpy(memo):
    memo.compute("metrics", lambda spec: [1, 2.5, "é\u2028\ud800"], SPEC)
    script = f"""
import json, sys
from pathlib import Path
from optkit.memo import Memo
spec = json.loads({json.dumps(json.dumps(SPEC, sort_keys=True))})
hit = Memo(Path({str(memo.folder)!r}), warn=lambda message: sys.exit(message)).lookup("metrics", spec)
print(json.dumps(hit.value), [name for name in ("joblib", "numpy", "torch", "transformers", "pickle") if name in sys.modules])
"""
    for seed in ("1", "2"):  # of Python's own hashes
        found = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert found.stdout == json.dumps([1, 2.5, "é\u2028\ud800"]) + " []\n", found.stderr


def test_the_file_is_a_digest_and_the_whole_entry(memo):
    _, origin = memo.compute("metrics", lambda spec: 1.5, SPEC)
    entry = json.loads(memo.lookup("metrics", SPEC).path.read_text().split("\n")[1])
    assert entry == {
        "schema": 1,
        "key": {"name": "metrics", "spec": SPEC},
        "seconds": origin.seconds,
        "time": origin.time,
        "value": 1.5,
    }


def leaves(spec: Any, place: tuple = ()) -> list[tuple]:
    if isinstance(spec, dict):
        return [leaf for key in spec for leaf in leaves(spec[key], (*place, key))]
    if isinstance(spec, list):
        return [leaf for index in range(len(spec)) for leaf in leaves(spec[index], (*place, index))]
    return [place]


@pytest.mark.parametrize("place", leaves(SPEC), ids=str)
@pytest.mark.parametrize("new", ["other", 0, None], ids=repr)
def test_any_field_of_the_spec_decides(memo, place, new):
    memo.compute("metrics", lambda spec: "old", SPEC)
    changed = copy.deepcopy(SPEC)
    inner: Any = changed
    for step in place[:-1]:
        inner = inner[step]
    if inner[place[-1]] is new:
        inner[place[-1]] = "something"
    else:
        inner[place[-1]] = new
    assert memo.lookup("metrics", changed) is None
    assert memo.compute("metrics", lambda spec: "new", changed)[0] == "new"
    assert memo.lookup("metrics", SPEC).value == "old"


def test_what_python_calls_equal_is_not_the_same_spec(memo):
    for value in (1, 1.0, True, "1", None, [], {}, 0.0, -0.0):
        assert memo.compute("metrics", lambda spec: repr(spec["x"]), {"x": value})[0] == repr(value)


def test_levels_do_not_meet(memo):
    memo.compute("predictions", lambda spec: "predicted", SPEC)
    assert memo.lookup("metrics", SPEC) is None
    with pytest.raises(ValueError, match="memo level"):
        memo.lookup("../metrics", SPEC)


def test_two_versions_of_one_function_take_turns_and_keep_their_own_values(memo, warnings):
    """joblib's own store wipes the entries of the one when the other is called."""
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    exec("def evaluate(spec): return ['old', spec['x']]", old)
    exec("def evaluate(spec):\n    # another text\n    return ['new', spec['x']]", new)
    for _ in range(2):
        for x in range(5):
            assert memo.compute("metrics", old["evaluate"], {"code": "aa", "x": x})[0] == ["old", x]
            assert memo.compute("metrics", new["evaluate"], {"code": "bb", "x": x})[0] == ["new", x]
    for x in range(5):
        assert memo.compute("metrics", never, {"code": "aa", "x": x})[0] == ["old", x]
    assert memo.info()["entries"] == 10
    assert warnings == []


def test_force_computes_again_and_replaces(memo):
    memo.compute("metrics", lambda spec: "old", SPEC)
    value, origin = memo.compute("metrics", lambda spec: "new", SPEC, force=True)
    assert (value, origin.source) == ("new", "computed")
    assert memo.lookup("metrics", SPEC).value == "new"


def test_a_result_comes_back_in_the_same_form_found_or_computed(memo):
    computed, _ = memo.compute("metrics", lambda spec: {"interval": (1, 2.0)}, SPEC)
    found, _ = memo.compute("metrics", never, SPEC)
    assert repr(computed) == repr(found) == "{'interval': [1, 2.0]}"


def test_the_function_gets_a_spec_of_its_own(memo):
    spec = copy.deepcopy(SPEC)
    memo.compute("metrics", lambda own: own["samples"].clear(), spec)
    assert spec == SPEC
    assert memo.lookup("metrics", SPEC) is not None


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"perplexity": math.nan}, "metrics not cached: perplexity is nan"),
        ([1.0, math.inf], "metrics not cached: [1] is inf"),
        ({"model": object}, "metrics not cached: model is of type type, which JSON does not have"),
        ({3: "three"}, "metrics not cached: the value has the key 3, which is no string"),
    ],
)
def test_what_json_cannot_hold_is_returned_as_it_is_and_named(memo, warnings, value, named):
    returned, origin = memo.compute("metrics", lambda spec: value, SPEC)
    assert returned is value
    assert origin.source == "computed"
    assert warnings == [named]
    assert memo.lookup("metrics", SPEC) is None


def test_a_spec_that_cannot_be_described_is_not_cached_and_named(memo, warnings):
    spec = {"model": {"weights": object()}}
    assert memo.compute("metrics", lambda own: own is spec, spec)[0] is True
    assert memo.lookup("metrics", spec) is None
    assert warnings == [
        "metrics not cached: what decides them cannot be described: model.weights is of type object, which JSON does not have"
    ]


def test_an_exception_passes_through_and_nothing_is_kept(memo):
    with pytest.raises(ZeroDivisionError):
        memo.compute("metrics", lambda spec: 1 / 0, SPEC)
    assert memo.compute("metrics", lambda spec: 1, SPEC)[0] == 1


def test_metrics_are_computed_over_memoized_predictions(memo):
    calls: list[str] = []

    def predict(spec: dict[str, Any]) -> list[str]:
        calls.append("predictions")
        return spec["samples"]

    def count(spec: dict[str, Any]) -> int:
        calls.append("metrics")
        return len(memo.compute("predictions", predict, SPEC)[0])

    assert memo.compute("metrics", count, {**SPEC, "metric": "count"})[0] == 2
    assert memo.compute("metrics", count, {**SPEC, "metric": "count again"})[0] == 2
    assert calls == ["metrics", "predictions", "metrics"]


def test_threads_share_one_computation(memo, warnings):
    entered, go = threading.Event(), threading.Event()
    calls: list[str] = []
    results: list[Any] = []

    def slow(spec: dict[str, Any]) -> str:
        calls.append("computed")
        entered.set()
        assert go.wait(60)
        return "value"

    def waits(message: str) -> None:
        assert message == "waiting for another process that computes the same metrics"
        go.set()

    first = threading.Thread(target=lambda: results.append(memo.compute("metrics", slow, SPEC)[0]))
    first.start()
    assert entered.wait(60)
    results.append(Memo(memo.folder, warn=waits).compute("metrics", slow, SPEC)[0])
    first.join()
    assert results == ["value", "value"]
    assert calls == ["computed"]
    assert warnings == []


def test_an_older_result_than_asked_for_is_a_miss(memo, tmp_path):
    put(memo, SPEC, "two days old", age_seconds=2 * 86400)
    assert memo.lookup("metrics", SPEC).value == "two days old"
    fresh: list[str] = []
    strict = Memo(memo.folder, max_age_seconds=86400, warn=fresh.append)
    assert strict.lookup("metrics", SPEC) is None
    assert strict.compute("metrics", lambda spec: "new", SPEC)[0] == "new"
    assert strict.lookup("metrics", SPEC).value == "new"
    assert fresh == []


def test_info_counts_what_is_there(memo):
    empty = {"entries": 0, "bytes": 0, "oldest": None, "newest": None, "folder": str(memo.folder)}
    assert memo.info() == empty
    paths = []
    for x in range(3):
        memo.compute("metrics", lambda spec: "value", {"x": x})
        paths.append(memo.lookup("metrics", {"x": x}).path)
        os.utime(paths[-1], (5000, 1000 + x))
    (memo.folder / "notes.txt").write_text("not an entry")
    total = sum(path.stat().st_size for path in paths)
    assert memo.info() == {**empty, "entries": 3, "bytes": total, "oldest": 1000, "newest": 1002}
    assert memo.clear() == 3
    assert memo.info() == empty
    assert {path.name for path in memo.folder.iterdir()} == {"CACHEDIR.TAG", "notes.txt"}


def test_what_was_used_least_recently_goes_first(memo):
    paths = {}
    for x in "abcd":
        memo.compute("metrics", lambda spec: "v" * 1000, {"x": x})
        paths[x] = memo.lookup("metrics", {"x": x}).path
    for age, x in enumerate("abcd"):
        os.utime(paths[x], (1000 - age, 1000 - age))  # d was used longest ago
    memo.lookup("metrics", {"x": "d"})  # and now
    room_for_three = 3 * paths["a"].stat().st_size + 200
    Memo(memo.folder, size_limit_bytes=room_for_three, warn=pytest.fail).compute("metrics", lambda spec: "v" * 1000, {"x": "e"})
    assert [x for x in "abcde" if memo.lookup("metrics", {"x": x})] == ["a", "d", "e"]
    assert memo.lookup("metrics", {"x": "d"}).time > 1000  # using an entry does not make it younger
    assert os.stat(paths["d"]).st_mtime == 997


def test_the_newest_result_stays_even_if_the_clock_went_back(memo):
    for x in "ab":
        memo.compute("metrics", lambda spec: "v" * 1000, {"x": x})
        os.utime(memo.lookup("metrics", {"x": x}).path, (2**32, 2**32))
    Memo(memo.folder, size_limit_bytes=2500, warn=pytest.fail).compute("metrics", lambda spec: "v" * 1000, {"x": "c"})
    assert memo.lookup("metrics", {"x": "c"})
    assert memo.info()["entries"] == 2


def test_a_result_beyond_the_size_limit_is_returned_and_not_kept(memo):
    memo.compute("metrics", lambda spec: "small", {"x": 1})
    said: list[str] = []
    small = Memo(memo.folder, size_limit_bytes=1000, warn=said.append)
    assert small.compute("metrics", lambda spec: "v" * 2000, SPEC)[0] == "v" * 2000
    assert len(said) == 1
    assert said[0].startswith("metrics not cached: 2")
    assert said[0].endswith("bytes are more than the cache's limit of 1000")
    assert memo.info()["entries"] == 1
