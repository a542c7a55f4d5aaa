"""Every command works beside every kind of broken plugin, and the way to switch each off is one that works."""

import json
import os
import subprocess
import sys

import pytest
import typer

from optkit import plugin_loading
from optkit.registry import discover
from optkit.testing.fixtures import OptkitRun
from tests.fakes import install, plugin
from tests.testing.broken import BROKEN, install_all

#: What can only be imported in a process of its own: this one has threads, so that discovery tries nothing in a copy first.
DEADLY = ("segfault", "aborts", "ends-as-if-well")
#: Every command, in an order in which one finds what another made -> words of its answer.
COMMANDS = {
    "--help": "list-plugins",
    "--version": ".",
    "list-plugins": "segfault",
    "list-profiles": "(this machine)",
    "profiles show cpu": "cpu",
    "profiles detect": "profile: ",
    "doctor": "plugin segfault",
    "plan --plugins good": "good",
    "run --plugins good --model MODEL --samples SAMPLES --repeats 1 --limit 2 --set generate.max_new_tokens=4": "active",
    "report": "active",
    "cache info": "results",
    "cache clear": "removed",
    "export FOLDER --plugins good --model MODEL": "files",
    "plugins info good": "transform_model",
    "plugins info segfault": "plugins disable segfault",
    "plugins check good": "exceptions",
    "plugins new mine": "optkit-mine",
    "plugins disable optkit-broken": "is switched off",
    "plugins enable optkit-broken": "is switched on",
}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    run = OptkitRun(tmp_path_factory.mktemp("commands"))
    install_all(run)
    (run.here / "samples.jsonl").write_text('{"prompt": "one two", "answer": "three"}\n' * 2)
    return run


def test_the_table_has_every_command():
    from optkit.cli import app

    def names(command, above=""):
        for name, found in command.commands.items():
            yield from names(found, f"{above}{name} ") if hasattr(found, "commands") else [f"{above}{name}"]

    assert [name for name in names(typer.main.get_command(app)) if not any(text.startswith(name) for text in COMMANDS)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_it_works_beside_all_of_them_at_once(crowd, command):
    places = {"MODEL": str(crowd.model), "SAMPLES": "samples.jsonl", "FOLDER": "exported"}
    done = crowd(*(places.get(word, word) for word in command.split()), env={"OMP_NUM_THREADS": "1"})
    assert COMMANDS[command] in done.stdout
    assert "Traceback" not in done.stderr


def test_a_metric_that_fails_costs_nothing_that_was_measured(optkit_run):
    optkit_run.plugin("meter", plugin("meter", "@hookimpl\ndef evaluate(outputs): raise KeyError('text')"))
    (optkit_run.here / "samples.jsonl").write_text('{"prompt": "one two", "answer": "three"}\n')
    words = ["--model", str(optkit_run.model), "--samples", "samples.jsonl", "--repeats", "1", "--set", "generate.max_new_tokens=4"]
    done = optkit_run("run", "--plugins", "meter", *words, code=3)
    assert "plugin 'meter' of optkit-meter 1.0 fails in `evaluate`: KeyError" in done.stderr and "Traceback" not in done.stderr
    (record,) = json.loads(optkit_run("report", "--format", "json").stdout)
    assert [(arm["name"], arm["state"]) for arm in record["arms"]] == [("baseline", "ok"), ("meter", "ok")]


def test_a_model_is_optimized_in_a_process_where_no_import_can_be_tried_first(crowd):
    code = (
        "import torch, optkit\nfrom optkit.testing import plain_scores, prompts, tiny_model\nplain = plain_scores(tiny_model()[0], prompts())\n"
        "optimized = optkit.optimize(*tiny_model(), ['good'])\nprint(optimized.proof()['good']['verdict'])\n"
        "print(max(float((a - b).abs().max()) for a, b in zip(optimized.score(prompts()), plain)) > 0.1)"
    )
    environment = os.environ | crowd.environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "active\nTrue\n"


@pytest.fixture
def own_config(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "site"


def assert_named(row, kind):
    if kind.startswith("configure"):
        assert row["status"] == "ready"  # its fault shows when the plan asks it
        return
    assert row["status"] == "broken" and BROKEN[kind][1] in row["cause"]
    assert f"`optkit plugins disable {kind}`" in row["fix"]


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind not in DEADLY])
def test_alone_it_is_named_and_switched_off_and_the_others_are_ready(own_config, monkeypatch, kind):
    install(monkeypatch, own_config, {kind: BROKEN[kind][0], "good": plugin("good")})
    found = discover()
    assert_named(vars(found.get(kind)), kind)
    assert found.get("good").status == "ready" and found.problems == []
    plugin_loading.write_disabled(frozenset({kind}))
    found = discover()
    assert found.get(kind).status == "disabled" and found.get(kind).fix == f"optkit plugins enable {kind}"
    assert found.get("good").status == "ready"


@pytest.mark.parametrize("kind", DEADLY)
def test_alone_one_that_kills_is_named_and_switched_off(optkit_run, kind):
    optkit_run.plugin(kind, BROKEN[kind][0])
    code = (
        "import json\nfrom optkit import plugin_loading\nfrom optkit.registry import discover\n"
        f"row = discover().get({kind!r})\nplugin_loading.write_disabled(frozenset([{kind!r}]))\n"
        f"print(json.dumps([{{'status': row.status, 'cause': row.cause, 'fix': row.fix}}, discover().get({kind!r}).status]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | optkit_run.environment, capture_output=True, text=True, timeout=60, check=True
    )
    row, afterwards = json.loads(done.stdout)
    assert_named(row, kind)
    assert afterwards == "disabled"
