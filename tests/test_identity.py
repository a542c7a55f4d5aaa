"""What decides a prediction: each field of the real spec follows what it stands for, and every field has a test that says so."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import optkit
from benchmarks.faults.fields import mutations, real_specs
from optkit import identity
from optkit.experiment import Experiment
from optkit.memo import Memo
from optkit.memo_entry import Key
from optkit.request import Request, prepare
from optkit.store import RecordStore
from tests.fakes import distribution, plugin


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OPTKIT_RECORDS_DIR", str(tmp_path / "records"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with one technique in a package, and the library that it requires."""
    site = tmp_path / "site"
    points = "[optkit.techniques]\nloud = loud_package.plugin\n"
    distribution(site, "optkit-loud", points, {})
    distribution(site, "loud-library", "", {})
    package = site / "loud_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("STRENGTH = 1\n")
    source = plugin("loud", "", stage="'quantize'", requires="('loud-library',)", calibrates="True", lossy="True")
    (package / "plugin.py").write_text("from loud_package.helper import STRENGTH\n" + source)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "samples.jsonl").write_text("".join(f'{{"prompt": "p{number}", "answer": "a"}}\n' for number in range(8)))
    monkeypatch.syspath_prepend(str(site))
    for name in [name for name in sys.modules if name.startswith("loud_package")]:
        del sys.modules[name]  # of the test before
    return site


def specs(machine: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """The spec of the plan ``loud`` with its samples, as the memo gets it."""
    given = {"model": "model", "samples": "samples.jsonl", "plugins": ["loud"], "profile": "cpu", "limit": 4} | fields
    setup = prepare(Request(**given))
    if machine:
        setup.machine = (
            setup.machine.model_copy(update=machine)
            if hasattr(setup.machine, "model_copy")
            else dataclasses.replace(setup.machine, **machine)
        )
    return {**Experiment(setup).specs["loud"], "samples": [sample.digest for sample in setup.samples.samples]}


def new_version(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Another version of an installed library."""
    versions = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda other: "99.9" if other == name else versions(other))


def appended(path: str, text: str) -> Callable[[pytest.MonkeyPatch, Path], dict[str, Any]]:
    def change(monkeypatch: pytest.MonkeyPatch, here: Path) -> dict[str, Any]:
        with (here / path).open("a") as file:
            file.write(text)
        return {}

    return change


def other_code(monkeypatch: pytest.MonkeyPatch, here: Path) -> dict[str, Any]:
    """A line more in a file of optkit's that computes nothing: which files matter is not guessed."""
    copy = here / "optkit"
    shutil.copytree(Path(optkit.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    assert identity.source_digest(copy) == identity.source_digest(Path(optkit.__file__).parent)
    with (copy / "report" / "rows.py").open("a") as file:
        file.write("# a line more\n")
    monkeypatch.setattr(optkit, "__file__", str(copy / "__init__.py"))
    return {}


def another_python(monkeypatch: pytest.MonkeyPatch, here: Path) -> dict[str, Any]:
    """The code that computes is the same, whatever reads it."""
    major_minor = platform.python_version().rpartition(".")[0]
    monkeypatch.setattr(sys, "version", sys.version.replace(major_minor, "3.99"))
    monkeypatch.setattr(sys, "version_info", (3, 99, *sys.version_info[2:]))
    monkeypatch.setattr(sys.implementation, "cache_tag", "cpython-399")
    monkeypatch.setattr(sys, "hexversion", 0x03630000)
    assert platform.python_version().startswith("3.99")
    return {}


def last_samples(monkeypatch: pytest.MonkeyPatch, here: Path) -> dict[str, Any]:
    """Only samples that are not evaluated change: the technique calibrates on them."""
    lines = (here / "samples.jsonl").read_text().splitlines(keepends=True)
    (here / "samples.jsonl").write_text("".join([*lines[:-1], '{"prompt": "another", "answer": "a"}\n']))
    return {}


def library(name: str) -> Callable[[pytest.MonkeyPatch, Path], dict[str, Any]]:
    return lambda monkeypatch, here: new_version(monkeypatch, name) or {}


#: what changes in the world -> the field of the spec that must follow, alone or beside ``reference``, which holds the baseline's.
CHANGES: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], dict[str, Any]], set[str]]] = {
    "optkit's own code": (other_code, {"optkit", "reference"}),
    "torch": (library("torch"), {"libraries", "reference"}),
    "transformers": (library("transformers"), {"libraries", "reference"}),
    "the model's weights": (appended("model/model.safetensors", "!"), {"model", "reference"}),
    "the model's configuration": (appended("model/config.json", " "), {"model", "reference"}),
    "the device": (lambda monkeypatch, here: {"machine": {"name": "another"}}, {"device", "reference"}),
    "the driver": (lambda monkeypatch, here: {"machine": {"driver": "999"}}, {"driver", "reference"}),
    "the CPU's instructions": (lambda monkeypatch, here: {"machine": {"cpu_features": ("avx9",)}}, {"cpu", "reference"}),
    "the number of cores": (lambda monkeypatch, here: {"machine": {"cpu_cores": 77}}, {"cpu", "reference"}),
    "the task": (lambda monkeypatch, here: {"task": "score"}, {"task", "reference"}),
    "the seed": (lambda monkeypatch, here: {"seed": 1}, {"seed", "reference"}),
    "a setting": (lambda monkeypatch, here: {"set": {"generate.max_new_tokens": 7}}, {"plan", "reference"}),
    "the batch size": (lambda monkeypatch, here: {"set": {"batch.size": 3}}, {"plan", "reference"}),
    "a helper beside the plugin": (appended("site/loud_package/helper.py", "# changed\n"), {"plugins"}),
    "the plugin itself": (appended("site/loud_package/plugin.py", "# changed\n"), {"plugins"}),
    "a library that the plugin requires": (library("loud-library"), {"plugins"}),
    "samples that techniques calibrate on": (last_samples, {"calibration"}),
    "the version of Python": (another_python, set()),
    "the samples": (appended("samples.jsonl", ""), set()),
    "fewer samples": (lambda monkeypatch, here: {"limit": 3}, {"samples", "calibration"}),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_the_spec_follows_what_it_stands_for(what: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = specs()
    assert specs() == before
    change, fields = CHANGES[what]
    after = specs(**change(monkeypatch, tmp_path))
    assert {name for name in before if before[name] != after[name]} == fields
    folder = tmp_path / "memo"
    same = Key.of(folder, "predictions", before) == Key.of(folder, "predictions", after)
    assert same == (not fields)


@pytest.mark.parametrize("changed", ["plugin.py", "helper.py", "further.py", "package/inner.py"])
def test_helpers_beside_a_plugin_file_count_with_it(tmp_path: Path, changed: str) -> None:
    sources = {
        "plugin.py": "import helper\ndef f():\n    from package.inner import x\n",
        "helper.py": "import os, torch\nfrom further import y\n",
        "further.py": "y = 1\n",
        "package/__init__.py": "",
        "package/inner.py": "x = 1\n",
        "unrelated.py": "z = 1\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    module = types.ModuleType("optkit_plugin_file_plugin")
    module.__file__ = str(tmp_path / "plugin.py")
    before = identity.plugin_digest(module)
    (tmp_path / "unrelated.py").write_text("z = 2\n")
    assert identity.plugin_digest(module) == before
    (tmp_path / changed).write_text(sources[changed] + "# changed\n")
    assert identity.plugin_digest(module) != before


def test_no_field_is_left_out(site: Path) -> None:
    """A field that is added to the spec needs a change above that moves it."""
    assert set(specs()) == {name for _, fields in CHANGES.values() for name in fields}


def test_every_field_of_a_run_decides(tmp_path: Path) -> None:
    """Generated from the spec itself, so a field that is added is covered: each smallest change is another key, and a miss."""
    found = real_specs()
    assert {"baseline", "precision", "int8", "precision+int8"} >= set(found) > {"baseline"}
    memo = Memo(tmp_path / "memo", warn=pytest.fail)
    for name, spec in found.items():
        memo.compute("predictions", lambda _, name=name: name, spec)
        places = {place for place, _ in mutations(spec)}
        assert {f".{field} left out" for field in spec} <= places
    for spec in found.values():
        for place, changed in mutations(spec):
            assert memo.lookup("predictions", changed) is None, place
    assert [memo.lookup("predictions", spec).value for spec in found.values()] == list(found)


PROFILE = """
summary = "a machine of mine"
device = "cpu"
[tasks.generate]
batch_size = {batch}
sequence_length = 512
because = "it fits"
"""


def test_a_profile_that_changed_before_a_resume_makes_a_new_cell(site: Path, tmp_path: Path) -> None:
    """What the interrupted sweep recorded under the old profile is not taken for the new one; under the old one it is found."""

    def key(batch: int) -> str:
        (tmp_path / "mine.toml").write_text(PROFILE.format(batch=batch))
        return Experiment(prepare(Request(model="model", samples="samples.jsonl", plugins=["loud"], profile="mine.toml"))).key

    store = RecordStore(tmp_path / "records")
    row = store.append({"kind": "run", "key": key(4)})
    found = [store.latest(lambda row, wanted=wanted: row["key"] == wanted) for wanted in map(key, (4, 8, 4))]
    assert [one and one["id"] for one in found] == [row, None, row]


def test_the_same_spec_in_another_python_is_a_hit(tmp_path: Path) -> None:
    """Another process with another hash seed, and an order of keys that is another: the name is one of contents."""
    memo = Memo(tmp_path / "memo", warn=pytest.fail)
    memo.compute("metrics", lambda spec: "computed", {"b": {"y": 1, "x": [1.5, None]}, "a": "é"})
    code = (
        "import sys\nfrom pathlib import Path\nfrom optkit.memo import Memo\n"
        "print(Memo(Path(sys.argv[1]), warn=print).lookup('metrics', {'a': chr(233), 'b': {'x': [1.5, None], 'y': 1}}).value)"
    )
    for seed in ("0", "1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(memo.folder)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == "computed\n", done.stderr
