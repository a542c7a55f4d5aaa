"""Distributions that are installed and run: one that ``plugins new`` writes, and the worked example."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from optkit.errors import UsageError
from optkit.scaffold import write_distribution
from optkit.testing import imports
from optkit.testing.checking import CHECKS, result_of
from optkit.testing.subject import Subject

TUTORIAL = Path(__file__).parents[2] / "docs" / "publishing.md"
EXAMPLE = Path(__file__).parents[2] / "examples" / "optkit-layerdrop"


def install(source: Path, site: Path) -> None:
    """What pip leaves of a distribution, without network: built by its own backend, found through its own entry point."""
    pytest.importorskip("hatchling")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(site),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def run_tests(folder: Path, site: Path, *arguments: str) -> str:
    """The distribution's own tests, as its author runs them."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=120", *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied(folder: Path, target: Path) -> Path:
    """Building writes beside the sources, so they are built elsewhere."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return target


def test_what_plugins_new_writes_is_installed_and_its_tests_pass(optkit_run):
    optkit_run("plugins", "new", "soft-clip")
    made = optkit_run.here / "optkit-soft-clip"
    names = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        ".github/workflows/test.yml",
        "optkit_soft_clip/__init__.py",
        "tests/test_soft_clip.py",
    } <= names
    assert not [
        path
        for path in made.rglob("*")
        if path.is_file() and "@" in path.read_text().replace("@hookimpl", "").replace("actions/", "").replace("@v", "")
    ]
    for lint in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *lint, "--no-cache", "."], cwd=made, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    install(made, optkit_run.site)
    row = json.loads(optkit_run("plugins", "info", "soft-clip", "--format", "json").stdout)
    assert row["status"] == "ready" and row["distribution"] == "optkit-soft-clip"
    assert len([line for line in (made / "optkit_soft_clip/__init__.py").read_text().splitlines() if line.strip()]) < 40
    assert "passed" in run_tests(made, optkit_run.site, "-k", "not combines")
    assert "already a technique of optkit-soft-clip" in optkit_run("plugins", "new", "soft-clip", code=2).stderr


@pytest.mark.parametrize(
    "name",
    ["", "Clip", "9lives", "a--b", "a-", "-a", "a_b", "a b", "../up", "/root", "a" * 42, "é", "x\n", "\u202ex", "a\0b", "a.b", "--",
     "optkit-clip", "flash"],
)  # fmt: skip
def test_a_name_that_cannot_be_is_refused_in_one_line(name, tmp_path):
    with pytest.raises(UsageError) as refused:
        write_distribution(name, str(tmp_path))
    text = str(refused.value)
    assert "\n" not in text and text.isprintable() and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "optkit-mine").mkdir()
    with pytest.raises(UsageError, match="already there"):
        write_distribution("mine", str(tmp_path))
    assert list((tmp_path / "optkit-mine").iterdir()) == []


def test_the_tutorial_ends_in_a_package_that_works_with_techniques_that_do_not_know_it(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    made = write_distribution("soft-clip", str(tmp_path))
    written = dict(re.findall(r"^```(?:python|toml) file=(\S+)\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL))
    assert set(written) == {"pyproject.toml", "optkit_soft_clip/__init__.py", "tests/test_soft_clip.py", "trying.py"}
    for name in ("optkit_soft_clip/__init__.py", "tests/test_soft_clip.py"):
        (made / name).write_text(written[name])
    ours, theirs = tomllib.loads((made / "pyproject.toml").read_text())["project"], tomllib.loads(written["pyproject.toml"])["project"]
    assert {key: ours[key] for key in theirs if key != "dependencies"} == {key: theirs[key] for key in theirs if key != "dependencies"}
    assert len([line for line in written["optkit_soft_clip/__init__.py"].splitlines() if line.strip()]) < 40
    install(made, tmp_path / "site")
    assert "2 passed" in run_tests(made, tmp_path / "site", "-k", "not test_technique and not whole_run")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "optkit_soft_clip", raising=False)
    one = Subject("soft-clip", {"deviations": 1.5}, partners={"nf4": {}, "compile": {"backend": "aot_eager"}})
    try:
        found = {check: result_of(one, check) for check in CHECKS}
    finally:
        one.close()
    assert [result for result in found.values() if result.state != "ok"] == []
    assert found["combines"].detail.startswith("2 run together with it")


def test_the_example_and_what_plugins_new_writes_use_public_names_alone(tmp_path):
    files = [*EXAMPLE.rglob("*.py"), *write_distribution("soft-clip", str(tmp_path)).rglob("*.py")]
    used = {name for path in files for name in imports.imported_names(path)}
    assert {name for name in used if imports.is_private(name)} == set()
    assert {"optkit.Technique", "optkit.modules.stored_bytes", "optkit.testing.TechniqueTests"} <= used


def test_the_example_is_installed_and_its_tests_pass(tmp_path):
    install(copied(EXAMPLE, tmp_path / "source"), tmp_path / "site")
    assert "passed" in run_tests(tmp_path / "source", tmp_path / "site", "-k", "not test_technique and not whole_run")


def test_the_example_passes_every_check_beside_techniques_that_do_not_know_it(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    install(copied(EXAMPLE, tmp_path / "source"), tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    one = Subject("layerdrop", partners={"nf4": {}, "compile": {"backend": "aot_eager"}, "kv-cache": {"kind": "static"}})
    try:
        assert one.row.distribution == "optkit-layerdrop"
        for check in ("manifest", "imports", "import-time", "hooks", "runs[llama]", "saves[gpt2]", "bytes[qwen3]", "combines"):
            found = result_of(one, check)
            assert found.state == "ok", found
            assert check != "combines" or found.detail.startswith("3 run together with it")
    finally:
        one.close()


def test_three_techniques_of_two_distributions_in_one_run(optkit_run):
    pytest.importorskip("bitsandbytes")
    install(copied(EXAMPLE, optkit_run.here / "source"), optkit_run.site)
    record = optkit_run.run(["compile", "nf4", "layerdrop"], set={"compile.backend": "aot_eager"})
    arm = record["arms"][1]
    assert arm["state"] == "ok", arm["reason"]
    assert arm["name"] == "layerdrop+nf4+compile"
    assert {name: proof["verdict"] for name, proof in arm["proof"].items()} == dict.fromkeys(("layerdrop", "nf4", "compile"), "active")
