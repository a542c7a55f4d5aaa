"""Plugins that are broken in every way that we could think of: all at once, and every command still works and names each."""

import json
import os
import subprocess
import sys

import pytest

from optkit.testing.fixtures import OptkitRun
from tests.fakes import plugin
from tests.testing.broken import BROKEN, RUDE, entry_points, install_all


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """One site with every broken plugin, and what the commands say there."""
    run = OptkitRun(tmp_path_factory.mktemp("crowd"))
    install_all(run)
    return run


@pytest.fixture(scope="module")
def listed(crowd):
    found = json.loads(crowd("list-plugins", "--format", "json").stdout)
    return {row["name"]: row for row in found["plugins"]}


@pytest.mark.parametrize("name", BROKEN)
def test_it_is_named_with_its_cause_and_the_way_to_switch_it_off(name, listed):
    row = listed[name]
    assert row["status"] in ("broken", "unavailable")
    assert BROKEN[name][1] in row["cause"]
    assert row["source"] == "optkit-broken" and "\n" not in row["cause"] and len(row["cause"]) < 700
    assert f"optkit plugins disable {name}" in row["cause"] + row["fix"]


@pytest.mark.parametrize("name", [*RUDE, "good"])
def test_bad_manners_do_no_harm(name, listed):
    assert listed[name]["status"] == "ready", listed[name]["cause"]


def test_two_of_one_name_are_both_named(listed):
    assert listed["twin"]["status"] == "broken"
    assert "optkit-fine" in listed["twin"]["cause"] and "optkit-twin" in listed["twin"]["cause"]


def test_one_for_another_optkit_is_not_imported(listed):
    assert listed["newer"]["status"] == "unavailable" and "it needs optkit>=99" in listed["newer"]["cause"]


def test_a_name_that_no_shell_should_see_is_quoted(listed):
    assert "disable 'not a name; rm -rf'" in listed["not a name; rm -rf"]["fix"]


def test_list_plugins_for_people(crowd):
    done = crowd("list-plugins")
    assert "SIGSEGV" in done.stdout
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    assert "plugin prints prints" in done.stderr and "not your" not in done.stdout


def test_a_plan_of_the_others_can_be_made(crowd):
    done = crowd("plan", "--plugins", "good,prints", "--format", "json")
    assert [step["name"] for step in json.loads(done.stdout)["steps"]] == ["good", "prints"]


def test_doctor_names_them(crowd):
    rows = json.loads(crowd("doctor", "--format", "json", code=None).stdout)
    found = {row["name"]: row for row in rows}
    assert "SIGSEGV" in found["plugin segfault"]["detail"] and "disable segfault" in found["plugin segfault"]["fix"]


@pytest.mark.parametrize("name", ["segfault", "configure-exits", "hook-not-marked", "twin", "newer"])
def test_a_plan_that_needs_it_is_refused_with_its_own_exit_code(crowd, name):
    done = crowd("plan", "--plugins", name, code=3)
    assert f"plugin '{name}'" in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_plugins_info_shows_a_broken_one(crowd):
    assert "SIGSEGV" in crowd("plugins", "info", "segfault").stdout


def test_a_disabled_one_is_not_imported_and_comes_back(crowd):
    crowd("plugins", "disable", "segfault")
    row = json.loads(crowd("plugins", "info", "segfault", "--format", "json").stdout)
    assert row["status"] == "disabled" and row["fix"] == "optkit plugins enable segfault"
    assert "optkit plugins enable segfault" in crowd("plan", "--plugins", "segfault", code=3).stderr
    crowd("plugins", "enable", "segfault")
    assert json.loads(crowd("plugins", "info", "segfault", "--format", "json").stdout)["status"] == "broken"


def test_disabling_one_distribution_settles_a_quarrel_about_a_name(crowd):
    crowd("plugins", "disable", "optkit-twin")
    row = json.loads(crowd("plugins", "info", "twin", "--format", "json").stdout)
    crowd("plugins", "enable", "optkit-twin")
    assert row["status"] == "ready" and row["distribution"] == "optkit-fine"


@pytest.mark.parametrize("content", [b"\xff\xfe\0[", b"[optkit.techniques]\nno assignment\n"])
def test_entry_points_that_cannot_be_read_are_skipped(optkit_run, content):
    """pydantic reads every distribution's entry points as well, and would end there: it is told not to."""
    entry_points(optkit_run.site, "binary", content)
    optkit_run.plugin("good", plugin("good"))
    done = optkit_run("list-plugins", env={"PYDANTIC_DISABLE_PLUGINS": "__all__"})
    assert "binary-1.0.dist-info" in done.stdout and "optkit-good" in done.stdout
    (problem,) = json.loads(optkit_run("list-plugins", "--format", "json").stdout)["problems"]
    assert "entry points cannot be read" in problem and "binary-1.0.dist-info" in problem
    rows = json.loads(optkit_run("doctor", "--format", "json", code=None).stdout)
    assert problem in [row["detail"] for row in rows if row["name"] == "plugins"]


def test_an_import_that_hangs_is_given_up(optkit_run):
    optkit_run.plugin("hangs", "import threading\nthreading.Event().wait()")
    optkit_run.plugin("good", plugin("good"))
    code = (
        "from optkit import plugin_importing, registry\nplugin_importing.IMPORT_TIMEOUT = 1.0\nfound = registry.discover()\n"
        "print(found.get('hangs').cause, found.get('good').status)"
    )
    environment = optkit_run.environment | {"OPTKIT_LOAD_PLUGINS": "hangs,good"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "takes more than 1 s ready" in done.stdout


def test_an_interrupt_by_the_user_still_interrupts(optkit_run):
    """Ctrl-C while a plugin is imported: a signal, and no ``raise`` of the plugin's."""
    optkit_run.plugin(
        "slow", "import os, signal, threading\nif os.getppid() == int(os.environ['PARENT']): os.kill(os.getpid(), signal.SIGINT)"
    )
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored\n"
        "from optkit.registry import discover\ntry: discover()\nexcept KeyboardInterrupt: print('interrupted')"
    )
    environment = optkit_run.environment | {"PARENT": str(os.getpid()), "OPTKIT_LOAD_PLUGINS": "slow"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "interrupted\n"
