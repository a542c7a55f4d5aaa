"""The command line as a user meets it: whole processes, exit codes, one-line errors, and what is not imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optkit import config
from optkit.errors import UsageError

HEAVY = ("torch", "transformers", "numpy", "joblib")


@pytest.fixture
def optkit(tmp_path):
    """Run ``optkit …`` in an empty folder with folders of its own."""
    here = tmp_path / "here"
    here.mkdir()
    own = {"OPTKIT_CACHE_DIR": str(tmp_path / "cache"), "OPTKIT_RECORDS_DIR": str(tmp_path / "records"), "COLUMNS": "200"}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OPTKIT_")}

    def call(*arguments, code=0, env=None):
        done = subprocess.run(
            [sys.executable, "-m", "optkit.cli", *arguments],
            cwd=here,
            env=plain | own | (env or {}),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    call.here = here
    return call


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list-plugins"],
        ["plan", "--plugins", "int8", "--profile", "h200"],
        ["list-profiles"],
        ["run", "--dry-run", "--plugins", ""],
    ],
)
def test_quick_commands_import_nothing_heavy(arguments):
    code = (
        "import sys\nfrom optkit import cli\n"
        f"sys.argv = ['optkit', *{arguments!r}]\n"
        "try: cli.app()\nexcept SystemExit as end: assert not end.code, end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "--plugins", "flsh"], 2, "did you mean 'flash'"),
        (["plan", "--profile", "h20"], 2, "h20"),
        (["plan", "--plugins", "nf4,int8"], 2, "role 'weights'"),
        (["plan", "--plugins", "int8", "--set", "int8.mod=x"], 2, "did you mean 'mode'"),
        (["plan", "--set", "generate.cash=static"], 2, "did you mean 'generate.cache'"),
        (["plan", "--set", "nonsense"], 2, "--set nonsense"),
        (["plan", "--model", "./nowhere"], 2, "no model folder"),
        (["plan", "--samples", "nowhere.jsonl"], 2, "no samples"),
        (["plan", "--format", "xml"], 2, "human or json"),
        (["run", "--profile", "h200", "--plugins", ""], 3, "does not fit this machine"),
        (["plan", "--cache-max-age", "soon"], 2, "No such option"),
        (["run", "--cache-max-age", "soon"], 2, "no duration"),
        (["report"], 1, "no recorded runs"),
        (["run", "--task", "train"], 2, "train"),
    ],
)
def test_wrong_input_is_one_line_with_the_way_out(optkit, arguments, code, words):
    done = optkit(*arguments, code=code)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_json_is_json_and_tells_status_and_where_it_was_run(optkit):
    rows = json.loads(optkit("list-plugins", "--format", "json").stdout)["plugins"]
    assert {"name", "version", "stage", "source", "status", "cause", "fix", "tested_on"} <= rows[0].keys()


def test_options_come_from_flag_then_environment_then_files(optkit):
    (optkit.here / "pyproject.toml").write_text("[tool.optkit]\nlimit = 11\nseed = 1\nplugins = ['int8']\n")
    (optkit.here / "optkit.toml").write_text("limit = 22\n[set]\n'generate.max_new_tokens' = 5\n")

    def plan(*arguments, **env):
        return json.loads(optkit("plan", "--format", "json", *arguments, env=env).stdout)

    found = plan()
    assert found["samples"]["n"] == 22 and found["origins"]["limit"] == "optkit.toml"
    assert found["origins"]["plugins"] == "pyproject.toml [tool.optkit]" and found["steps"][0]["name"] == "int8"
    assert {"name": "generate.max_new_tokens", "value": 5}.items() <= next(
        s for s in found["settings"] if s["name"].endswith("new_tokens")
    ).items()
    assert plan(OPTKIT_LIMIT="33")["samples"]["n"] == 33
    found = plan("--limit", "44", OPTKIT_LIMIT="33")
    assert found["samples"]["n"] == 44 and found["origins"]["limit"] == "--limit"


def test_unknown_keys_of_a_file_are_all_told(optkit):
    (optkit.here / "optkit.toml").write_text("limt = 3\nprofil = 'cpu'\n")
    done = optkit("plan", code=2)
    assert "did you mean 'limit'" in done.stderr and "did you mean 'profile'" in done.stderr


@pytest.mark.parametrize("text", ["limit = ", "a" * 10, "[set", "limit = nan"])
def test_a_broken_file_is_no_traceback(optkit, text):
    (optkit.here / "optkit.toml").write_text(text)
    assert "Traceback" not in optkit("plan", code=2).stderr


def test_a_plan_for_a_machine_one_does_not_have(optkit):
    found = json.loads(optkit("plan", "--profile", "rtx5090", "--plugins", "precision,int8", "--format", "json").stdout)
    assert found["profile"] == "rtx5090" and [step["name"] for step in found["steps"]]
    assert found["memory"]["total"] > 0


def test_completion_offers_plugins_and_profiles():
    from optkit.cli_options import complete_plugins, complete_profiles

    assert "int8,nf4" in complete_plugins("int8,n")
    assert {"h100", "h200"} <= set(complete_profiles("h"))


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("30d", 30 * 86400), ("2w", 14 * 86400)])
def test_durations(text, seconds):
    assert config.parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "value"), [("64", 64), ("0.5", 0.5), ("1e-3", 1e-3), ("true", True), ("none", None), ("a=b", "a=b"), ("9" * 30, "9" * 30)]
)
def test_values(text, value):
    assert config.parse_pairs([f"a.b={text}"]) == {"a.b": value}


def test_a_value_too_long():
    with pytest.raises(UsageError):
        config.parse_value("x" * 2000)


def test_the_version(optkit):
    import optkit as package

    assert optkit("--version").stdout.strip() == package.__version__


def test_no_core_file_names_a_technique():
    import optkit as package
    from optkit.registry import discover

    words = {"cache", "batching", "int8", "fp4", "fp8"}  # a command, a role, and three dtypes of data sheets bear these names too
    names = {row.name for row in discover() if row.module.startswith("optkit_plugins.")} - words
    for path in Path(package.__file__).parent.rglob("*.py"):
        text = re.sub(r'""".*?"""', "", path.read_text(), flags=re.S)  # examples in docstrings are for people
        found = [name for name in names if f'"{name}"' in text or f"'{name}'" in text]
        assert not found, f"{path.name} names {found}"
