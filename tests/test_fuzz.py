"""Anything at all as input: each gives a result or an ``OptkitError`` of a bearable length, and never another exception.

The inputs are the same in every run (``derandomize``): a failure here is a fault of the code, and not of the day.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optkit import config
from optkit.canonical import canonical_json, parse_foreign, sha256_hex
from optkit.cli_options import names
from optkit.errors import OptkitError
from optkit.folders import cache_folder, records_folder, usable_folder
from optkit.memo import Memo
from optkit.profile import load_profile
from optkit.profile_files import built_in_folder
from optkit.registry import discover
from optkit.report import history
from optkit.report.text import clean
from optkit.request import Request, prepare
from optkit.samples import Sample, sample_set
from optkit.settings import KNOWN
from optkit.sources import bundled_folder, model_source
from optkit.store import RecordStore

SOME = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONGEST = 6000
"""Characters of a message: a profile tells 25 mistakes at once."""
REGISTRY = discover()

odd_text = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["", " ", "a\0b", "\u202eevil", "\x1b[31mred", "[bold red]x[/]", "../../etc/passwd", "~nobody-has-this-name/x", "x" * 300,
                     "x" * 20_000, "9" * 5000, "NaN", "-inf", "1e999", "None", "true", "'", '"', "{}", "[" * 2000, "\ud800", "é" * 200]),
)  # fmt: skip


@contextmanager
def only_optkit_errors() -> Iterator[None]:
    """Passes what is expected to fail, if its message can be borne; everything else comes through and fails the test."""
    try:
        yield
    except OptkitError as error:
        shown = clean(error, 20_000)
        assert 0 < len(shown) <= LONGEST and "Traceback" not in shown
        assert error.exit_code in (1, 2, 3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Discovery and the machine are looked at once, not for each example."""
    from optkit import machine, request

    here = machine.detect()
    monkeypatch.setattr(request, "discover", lambda names: REGISTRY)
    monkeypatch.setattr(request, "detect", lambda: here)
    monkeypatch.setenv("OPTKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def planned(**fields: Any) -> None:
    from optkit.report.plans import plan_json, plan_view

    setup = prepare(Request(**{"profile": "cpu", "plugins": [], "limit": 2} | fields))
    json.dumps(plan_json(setup))
    plan_view(setup)


# ------------------------------------------------------------ options, names, configuration files

option_names = st.one_of(
    st.sampled_from(sorted(KNOWN)), odd_text, st.sampled_from(["int8.mode", "int8.", ".", "..", "batch.size.x", "load."])
)
option_values = st.one_of(odd_text, st.integers().map(str), st.floats().map(str))


@SOME
@given(option_names, option_values)
def test_options(quick: None, name: str, value: str) -> None:
    with only_optkit_errors():
        planned(plugins=["int8"], set=config.parse_pairs([f"{name}={value}"]))


@SOME
@given(odd_text)
def test_plugin_names(quick: None, text: str) -> None:
    with only_optkit_errors():
        planned(plugins=names(text), without=names(text[::-1]))


@pytest.mark.parametrize("field", ["model", "samples", "profile", "task", "reference", "metric", "cache_dir"])
@settings(SOME, max_examples=40)
@given(odd_text)
def test_other_fields_of_a_request(quick: None, field: str, text: str) -> None:
    from optkit.experiment import Experiment

    with only_optkit_errors():
        setup = prepare(Request(**{"profile": "cpu", "plugins": [], "limit": 2} | {field: text}))
        if setup.source.kind != "hub":
            Experiment(setup)


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 300, "\u202eevil", "\x1b[31m", "a/" * 3000, "~nobody-has-this-name/x", "é\n", " ", "..", "file/x"]
)
def test_names_of_caches_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The result is returned and a record is kept or refused, whatever the folder is called."""
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    Path("file").touch()
    said: list[str] = []
    with only_optkit_errors():
        folder = usable_folder(cache_folder(name), said.append)
        assert Memo(folder / "memo", warn=said.append).compute("metrics", lambda spec: "computed", {})[0] == "computed"
    with only_optkit_errors():
        store = RecordStore(records_folder(name))
        store.append({"n": 1})
        assert [row["n"] for row in store.read().rows] == [1]
    assert all("\n" not in clean(line, 20_000).replace(name, "") for line in said)


toml_values = st.sampled_from(
    ["1", "-1", "nan", "inf", '"x"', "[]", "[1, 'a']", "{}", "{a = {b = [1]}}", "true", "1979-05-27", "9" * 400, '"\\u001b"']
)
toml_lines = st.lists(st.tuples(st.sampled_from([*config.KEYS, "x", "set.a.b", "'ü'"]), toml_values), max_size=4)


@SOME
@given(st.one_of(toml_lines.map(lambda rows: "\n".join(f"{key} = {value}" for key, value in rows)), st.text(max_size=80)))
def test_configuration_files(quick: None, text: str) -> None:
    from optkit.cli import app

    Path("optkit.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with only_optkit_errors(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        with pytest.raises(SystemExit) as end:
            app(["plan", "--format", "json"])
        assert end.value.code in (0, 2) and "Traceback" not in said.getvalue()


# ------------------------------------------------------------ files

json_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    odd_text,
    st.sampled_from([10**4000, "\ud800", [[[]]], {"role": "user", "content": "x"}]),
)
json_values = st.recursive(
    json_leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3), max_leaves=6
)
rows = st.dictionaries(st.sampled_from(["prompt", "answer", "text", "messages", "id", "x"]), json_values, max_size=4)


def spoiled(text: bytes, cuts: list[tuple[int, bytes]]) -> bytes:
    """Bytes put over others, anywhere."""
    data = bytearray(text)
    for place, noise in cuts:
        at = place % (len(data) + 1)
        data[at : at + len(noise)] = noise
    return bytes(data)


cuts = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=6)), min_size=1, max_size=4)


@SOME
@given(st.lists(rows, max_size=3), st.sampled_from(["s.jsonl", "s.json", "s.txt"]), st.one_of(st.none(), cuts))
def test_sample_files(quick: None, content: list[Any], name: str, noise: Any) -> None:
    text = json.dumps(content) if name.endswith(".json") else "\n".join(json.dumps(row) for row in content)
    data = text.encode("utf-8", "surrogatepass")
    Path(name).write_bytes(spoiled(data, noise) if noise else data)
    with only_optkit_errors():
        found = sample_set(name, model_source(None)).samples
        for sample in found:
            assert isinstance(sample, Sample) and len(sample.digest) == 64
            canonical_json([sample.prompt, sample.answer, sample.text, sample.messages]).encode()
            "".join(filter(None, [sample.prompt, sample.answer, sample.text])).encode("utf-8")  # a tokenizer takes it


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "answer": NaN}', "NaN is no JSON"),
        ('{"prompt": "a", "prompt": "b"}', "has the key 'prompt' twice"),
        ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "Exceeds the limit (4300 digits)"),
        ('{"prompt": "a", "answer": ' + "[" * 200 + "]" * 200 + "}", "nested deeper than 100 levels"),
        ('{"prompt": "a", "answer": ' + "[" * 50_000, "nested too deeply"),
        ('{"prompt": "a\\ud800"}', "half a surrogate pair (\\ud800)"),
        ('{"prompt": 1e999}', "is inf"),
    ],
)
def test_what_json_readers_understand_differently_is_refused_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(OptkitError) as refused:
        sample_set(str(path), model_source(None))
    assert str(refused.value).startswith("s.jsonl:2: not valid JSON") and words in str(refused.value)
    assert len(str(refused.value)) < 300


def test_line_separators_within_a_text_are_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    prompts = ["a\u2028b", "c\x85d", "e\u2029f"]
    path.write_text("\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts), encoding="utf-8")
    assert [sample.prompt for sample in sample_set(str(path), model_source(None)).samples] == prompts


GOOD_CONFIG = json.loads((bundled_folder() / "config.json").read_text())


@SOME
@given(st.dictionaries(st.sampled_from([*GOOD_CONFIG, "text_config", "num_local_experts", "dtype", "model_type"]), json_values, max_size=3))
def test_model_configurations(quick: None, changes: dict[str, Any]) -> None:
    Path("c.json").write_bytes(json.dumps(GOOD_CONFIG | changes).encode("utf-8", "surrogatepass"))
    with only_optkit_errors():
        planned(model="random:c.json")


PROFILE = (built_in_folder() / "cpu.toml").read_bytes()


@SOME
@given(cuts)
def test_profiles_that_were_damaged(tmp_path: Path, noise: Any) -> None:
    path = tmp_path / "odd.toml"
    path.write_bytes(spoiled(PROFILE, noise))
    with only_optkit_errors():
        load_profile(str(path))


def sealed(body: bytes) -> bytes:
    return sha256_hex(body).encode() + b" " + body + b"\n"


@SOME
@given(st.lists(st.one_of(st.binary(max_size=90), json_values.map(lambda value: sealed(json.dumps(value).encode()))), max_size=4), cuts)
def test_records(tmp_path: Path, lines: list[bytes], noise: Any) -> None:
    store = RecordStore(tmp_path / "records")
    store.folder.mkdir(exist_ok=True)
    good = sealed(b'{"id":"a","n":1,"schema":1,"time":1.0}')
    store.path.write_bytes(b"\n".join([*lines, good]) if lines else spoiled(good * 3, noise))
    found = store.read()
    assert [row for row in found.rows if row != {"id": "a", "n": 1, "schema": 1, "time": 1.0}] == []
    assert all(len(line) < 1000 and "\n" not in line.removeprefix(str(store.path)) for line in found.problems)
    assert store.latest(lambda row: True) == (found.rows[-1] if found.rows else None)
    if lines:
        assert found.rows  # damage before it costs a good row nothing


RUN = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "cpu-bundled.json").read_text())


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, item in inner for found in places(item, (*place, key)))]


@settings(SOME, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(places(RUN)[1:]), st.one_of(st.just("left out"), json_leaves)), min_size=1, max_size=2))
def test_records_of_another_version(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    """A good digest over a record that this optkit would not have written: shown, or told in one line."""
    from rich.console import Console

    record = json.loads(json.dumps(RUN))
    for place, new in changes:
        inner: Any = record
        with suppress(LookupError, TypeError):  # an earlier change took the place away
            for step in place[:-1]:
                inner = inner[step]
            if new == "left out":
                del inner[place[-1]]
            else:
                inner[place[-1]] = new
    record |= {"id": "25995acb338e"}  # the store gives it
    for listed in (True, False):
        stream = io.StringIO()
        Console(file=stream, width=300).print(history.view([record], listed))
        assert "25995acb338e" in stream.getvalue() if listed else len(stream.getvalue()) > 100
        assert history.render([record], "markdown", listed)
    with only_optkit_errors():
        history.render([record], "svg", False)


# ------------------------------------------------------------ memory

HUGE = {
    "samples": "from optkit.samples import sample_set\nfrom optkit.sources import model_source\nsample_set(path, model_source(None))",
    "configuration": "from optkit.sources import model_source\nmodel_source('random:' + path)",
    "profile": "from optkit.profile import load_profile\nload_profile(path)",
    "records": "from optkit.store import RecordStore\nfrom pathlib import Path\nstore = RecordStore(Path(path).parent)\nrows, problems = store.read()\n"
    "assert rows == [] and len(problems) == 1 and store.latest(lambda row: True) is None\nraise OptkitError(problems[0])",
}  # fmt: skip


@pytest.mark.parametrize("kind", HUGE)
def test_files_without_end_take_no_memory(kind: str, tmp_path: Path) -> None:
    """More than a gigabyte (of nothing, so that no disk is filled), read in a process that may have a third of that."""
    path = tmp_path / {"samples": "s.jsonl", "configuration": "config.json", "profile": "p.toml", "records": "records.jsonl"}[kind]
    with open(path, "wb") as file:
        file.truncate(1200 * 2**20)
    code = f"from optkit.errors import OptkitError\npath = {str(path)!r}\n" + (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (400 * 2**20,) * 2)\ntry:\n    "
        + HUGE[kind].replace("\n", "\n    ")
        + "\nexcept OptkitError as error: print(error)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and len(done.stdout) < 500


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**6, '"' + "\\u0000" * 10**5, "9" * 10**6, "[" + "0," * 10**5 + "0]" * 2])
def test_no_text_costs_many_times_its_size(text: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            parse_foreign(text)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(text) + 2**20
    finally:
        tracemalloc.stop()
