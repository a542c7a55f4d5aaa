"""``--plugin-file``: a technique tried from a file, in every command that looks at techniques and in the processes of its trials."""

import json
import os

import pytest
from typer.testing import CliRunner

from optkit.cli import app
from optkit.errors import UnavailableError, UsageError
from optkit.registry import discover
from tests.fakes import plugin

LOUDER = '"""Louder: for tests."""\n' + plugin(
    "tried",
    "@hookimpl\ndef transform_model(model): model.lm_head.weight.data.mul_(1.5)",
    stage="'merge'", adds="{'weights-changed'}", lossy="True",
)  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPTKIT_PLUGIN_FILE", raising=False)
    (tmp_path / "trying.py").write_text(LOUDER)
    return tmp_path


def optkit(*arguments):
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.mark.parametrize(
    "command", ["plan --plugins tried", "run --plugins tried --dry-run", "list-plugins", "plugins info tried", "doctor --format json"]
)
def test_a_command_sees_the_file_and_leaves_no_trace(here, command):
    words = [] if command.startswith("doctor") else ["--plugin-file", "trying.py"]
    assert ("tried" in optkit(*command.split(), *words)) == bool(words)
    assert "OPTKIT_PLUGIN_FILE" not in os.environ


def test_a_flag_comes_before_the_environment_which_is_put_back(here, monkeypatch):
    (here / "other.py").write_text(plugin("other"))
    monkeypatch.setenv("OPTKIT_PLUGIN_FILE", "other.py")
    names = [row["name"] for row in json.loads(optkit("list-plugins", "--format", "json", "--plugin-file", "trying.py"))["plugins"]]
    assert "tried" in names and "other" not in names
    assert os.environ["OPTKIT_PLUGIN_FILE"] == "other.py"


def test_several_files_of_one_name_are_each_loaded_once(here):
    (here / "sub").mkdir()
    (here / "sub" / "trying.py").write_text(plugin("other"))
    files = [word for name in ("trying.py", "sub/trying.py", "./trying.py") for word in ("--plugin-file", name)]
    rows = {row["name"]: row for row in json.loads(optkit("list-plugins", "--format", "json", *files))["plugins"]}
    assert rows["tried"]["status"] == rows["other"]["status"] == "ready"
    assert rows["other"]["source"] == str(here / "sub" / "trying.py")


@pytest.mark.parametrize(("name", "words"), [("nowhere.py", "is not a file"), ("a:b.py", "rename it"), ("sub", "is not a file")])
def test_what_is_no_file_is_refused(here, name, words):
    (here / "sub").mkdir()
    with pytest.raises(UsageError, match=words):
        optkit("plan", "--plugin-file", name)


def test_a_broken_file_and_one_with_a_name_that_is_taken_say_the_way_out(here):
    (here / "broken.py").write_text("def (")
    (here / "taken.py").write_text(plugin("cache"))
    files = ["--plugin-file", "broken.py", "--plugin-file", "taken.py"]
    rows = {row["name"]: row for row in json.loads(optkit("list-plugins", "--format", "json", *files))["plugins"]}
    assert "SyntaxError" in rows["broken"]["cause"]
    assert rows["broken"]["fix"] == f"Fix {here / 'broken.py'}, or leave it out of --plugin-file and OPTKIT_PLUGIN_FILE."
    assert rows["cache"]["cause"].startswith(f"both optkit (optkit_plugins.cache) and {here / 'taken.py'} bring")
    assert rows["cache"]["fix"] == f"Give the technique of {here / 'taken.py'} another name, or leave the file out."


def test_only_what_is_asked_for_is_imported(here, monkeypatch):
    (here / "loud.py").write_text("import os\nos.environ['LOUD'] = '1'\n" + plugin("loud"))
    monkeypatch.setenv("OPTKIT_PLUGIN_FILE", "loud.py")
    monkeypatch.setenv("LOUD", "0")
    found = discover({"cache"}, files=False)
    assert os.environ["LOUD"] == "0" and found.get("cache").status == "ready"
    assert (found.get("flash").status, found.get("flash").cause) == ("disabled", "it was not asked for here")
    assert discover({"loud"}, files=False).get("loud").status == "ready"


def test_a_file_never_gives_way_in_silence_to_an_installed_technique_of_its_name(here):
    (here / "taken.py").write_text(plugin("cache"))
    with pytest.raises(UnavailableError, match="both optkit .* bring a technique of this name"):
        optkit("plan", "--plugins", "cache", "--plugin-file", "taken.py")


def test_it_is_exported_and_checked_from_its_file(optkit_run):
    (optkit_run.here / "trying.py").write_text(LOUDER)
    file = ("--plugin-file", "trying.py")
    assert "scores" in optkit_run("export", "made", "--plugins", "tried", "--model", str(optkit_run.model), *file).stdout
    done = optkit_run("plugins", "check", "tried", *file, env={"OPTKIT_LOAD_PLUGINS": ""})
    assert "failed" not in done.stdout and "weight values changed" in done.stdout
