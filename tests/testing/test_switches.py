"""What is loaded and what is not: OPTKIT_LOAD_PLUGINS, disable and enable, a plugin file; and what ``plugins info`` shows."""

import json
import os

import pytest

from optkit import plugin_loading
from optkit.errors import OptkitError, UsageError
from optkit.registry import discover
from tests.fakes import install, plugin


@pytest.fixture
def own_config(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("OPTKIT_LOAD_PLUGINS", raising=False)
    return tmp_path / "config"


@pytest.fixture
def two(own_config, tmp_path, monkeypatch):
    """Two plugins; the second one cannot be imported without being noticed."""
    install(monkeypatch, tmp_path / "site", {"one": plugin("one"), "loud": "import os\nos.environ['LOUD'] = '1'\n" + plugin("loud")})
    monkeypatch.setenv("LOUD", "0")


@pytest.mark.parametrize(
    ("listed", "ready"), [("one", {"one"}), ("", set()), (" one , loud ", {"one", "loud"}), ("optkit-fake", {"one", "loud"})]
)
def test_only_what_the_variable_names_is_loaded(two, monkeypatch, listed, ready):
    monkeypatch.setenv("OPTKIT_LOAD_PLUGINS", listed)
    found = discover()
    assert {row.name for row in found if row.status != "disabled"} == ready
    assert "OPTKIT_LOAD_PLUGINS" in found.get("flash").fix


def test_what_is_switched_off_is_not_imported(two, monkeypatch):
    plugin_loading.write_disabled(frozenset({"loud"}))
    assert discover().get("loud").status == "disabled" and os.environ["LOUD"] == "0"
    plugin_loading.write_disabled(frozenset())
    assert discover().get("loud").status == "ready" and os.environ["LOUD"] == "1"


def test_a_misspelt_name_in_the_variable_is_told(two, monkeypatch):
    monkeypatch.setenv("OPTKIT_LOAD_PLUGINS", "onne")
    assert any("'onne', which is not installed; did you mean 'one'?" in problem for problem in discover().problems)


def test_a_list_that_cannot_be_read_switches_nothing_off_and_is_told(two, own_config):
    own_config.mkdir()
    plugin_loading.disabled_file().write_bytes(b"\xff\xfe")
    found = discover()
    assert found.get("one").status == "ready" and "cannot be read" in found.problems[0]


def test_a_folder_that_cannot_be_written_is_named(own_config):
    own_config.write_text("a file")
    with pytest.raises(OptkitError, match="OPTKIT_CONFIG_DIR"):
        plugin_loading.write_disabled(frozenset({"x"}))


def test_a_plugin_file_is_loaded_when_it_is_named(own_config, tmp_path, monkeypatch):
    file = tmp_path / "trying.py"
    file.write_text("from __future__ import annotations\n" + plugin("tried"))
    assert "tried" not in {row.name for row in discover()}
    monkeypatch.setenv("OPTKIT_PLUGIN_FILE", str(file))
    row = discover().get("tried")
    assert row.status == "ready" and row.distribution == str(file)


def test_a_plugin_file_that_is_broken_is_named_and_one_that_is_not_there_refused(own_config, tmp_path, monkeypatch):
    (tmp_path / "trying.py").write_text("def (")
    monkeypatch.setenv("OPTKIT_PLUGIN_FILE", str(tmp_path / "trying.py"))
    assert "SyntaxError" in discover().get("trying").cause
    monkeypatch.setenv("OPTKIT_PLUGIN_FILE", str(tmp_path / "nowhere.py"))
    with pytest.raises(UsageError, match="is not a file"):
        discover()


def test_no_configuration_file_names_code(optkit_run):
    (optkit_run.here / "optkit.toml").write_text("plugin-file = 'trying.py'\n")
    (optkit_run.here / "trying.py").write_text("raise SystemExit('loaded')")
    done = optkit_run("plan", "--plugins", "", code=2)
    assert "unknown key 'plugin-file'" in done.stderr and "loaded" not in done.stderr


SHOWN = """
from pydantic import Field
from optkit import Options, Technique, hookimpl
class O(Options):
    width: int = Field(8, ge=2, description="how wide it is")
technique = Technique(name="shown", stage="quantize", summary="to be shown", roles={"weights"}, options=O, paper="https://example.org/p",
                      exceptions={"gpt2": "it has no rotary positions"})
@hookimpl
def transform_model(model): ...
"""


def test_info_shows_hooks_options_references_exceptions_and_conflicts(optkit_run):
    optkit_run.plugin("shown", SHOWN)
    optkit_run.plugin("rival", plugin("rival", roles="{'weights'}", stage="'quantize'"))
    facts = json.loads(optkit_run("plugins", "info", "shown", "--format", "json").stdout)
    assert facts["hooks"] == ["transform_model"] and facts["paper"] == "https://example.org/p" and facts["roles"] == ["weights"]
    assert facts["options"] == [{"name": "width", "type": "int", "limits": "ge=2", "default": "8", "description": "how wide it is"}]
    assert facts["conflicts"]["rival"] == ["role 'weights' has one owner, and shown and rival claim it; keep one of them"]
    assert "flash" not in facts["conflicts"]
    text = optkit_run("plugins", "info", "shown").stdout
    assert "it has no rotary positions" in text and "how wide it is" in text
    listed = optkit_run("list-plugins").stdout
    assert "checks that a technique says it cannot pass" in listed and "it has no rotary positions" in listed


def test_doctor_names_what_a_technique_lacks_here(optkit_run):
    optkit_run.plugin("lacking", plugin("lacking", "@hookimpl\ndef configure(): return Claims(problem='no adapter; set lacking.adapter')"))
    rows = {row["name"]: row for row in json.loads(optkit_run("doctor", "--format", "json", code=None).stdout)}
    found = rows["plugin lacking"]
    assert (found["status"], found["detail"]) == ("warn", "unavailable: no adapter; set lacking.adapter")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "flsh"], "did you mean 'flash'"),
        (["disable", "flsh"], "did you mean 'flash'"),
        (["enable", "flash"], "is not switched off"),
        (["check", "flsh"], "did you mean 'flash'"),
        (["check", "flash", "--set", "int8.mode=x"], "only options of flash"),
        (["info", "flash", "--format", "xml"], "human or json"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(optkit_run, arguments, words):
    done = optkit_run("plugins", *arguments, code=2)
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""
