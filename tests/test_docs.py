"""The documentation: its examples run, its commands are accepted, its links lead somewhere, and its tables say what the code says."""

import dataclasses
import inspect
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

import optkit
from optkit import config, errors, hookspecs, settings, technique
from optkit.errors import OptkitError, PlanConflict, UnavailableError
from optkit.profile_schema import Profile
from optkit.registry import discover
from optkit.report.rows import COLUMNS
from optkit.sources import bundled_folder
from optkit.trial import STATES
from tests.fakes import distribution

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
HOOKS = {name: hook for name, hook in vars(hookspecs).items() if hasattr(hook, "optkit_spec")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN_TECHNIQUES = sorted(PROJECT["entry-points"]["optkit.techniques"])
TECHNIQUE_HEADINGS = ("what it does", "what it costs", "when not to use it", "options", "paper", "example")
#: Commands that are quick and change nothing; ``run`` becomes a dry run, and the others are parsed only.
REALLY_RUN = ("plan", "list-plugins", "list-profiles", "profiles", "--version")

#: What the examples take to be there: an adapter, and a program in an environment of its own.
STAND_INS = {
    "my-adapter/adapter_config.json": '{"peft_type": "LORA"}',
    "my-adapter/adapter_model.safetensors": "",
    "vllm-env/bin/vllm": "#!/bin/sh",
}


class Block(NamedTuple):
    """One fenced block: ``language`` and the rest of its info string, its text, and the line where the text begins."""

    language: str
    info: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        found = re.search(r"file=(\S+)", self.info)
        return found[1] if found else None


def read(page: Path | str) -> str:
    return (DOCS / page if isinstance(page, str) else page).read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[Block]:
    text = read(page)
    found = re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], m[3], text[: m.start(3)].count("\n") + 1) for m in found if m[1] in languages]


def prose(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL))


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(heading)}\s*$", text, re.MULTILINE | re.IGNORECASE)
    assert found, f"no heading '{heading}'"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def table(text: str) -> list[list[str]]:
    """Cells of the table rows, without headings and back quotes."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = {index for index, line in enumerate(lines) if re.fullmatch(r"[|\s:-]+", line)}
    rows = [line for index, line in enumerate(lines) if index not in rules and index + 1 not in rules]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def first_names(text: str) -> list[str]:
    """Every name in the first column of the tables."""
    return [name for row in table(text) for name in names_in(row[0])]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---------------------------------------------------------------- examples


@pytest.fixture
def here(tmp_path, monkeypatch):
    """``here(page)``: an empty folder with the files that the page names, a model folder, and folders of its own for memo and records."""

    def enter(page: Path) -> None:
        folder = tmp_path / "here"
        folder.mkdir()
        (folder / "my-model").symlink_to(bundled_folder())
        given = {block.file: block.text for block in blocks(page, "python", "toml", "json") if block.file}
        for name, text in {**STAND_INS, **given}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o700)
        if (folder / "pyproject.toml").exists():
            _install(folder, tomllib.loads((folder / "pyproject.toml").read_text())["project"])
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        for name in ("CACHE_DIR", "RECORDS_DIR"):
            monkeypatch.setenv(f"OPTKIT_{name}", str(tmp_path / name.lower()))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            monkeypatch.setenv(name, "1")

    return enter


def _install(folder: Path, project: dict) -> None:
    """What ``pip install -e .`` would do for discovery."""
    points = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["optkit.techniques"].items())
    distribution(folder, project["name"], f"[optkit.techniques]\n{points}", {}, project["version"])


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_id)
def test_python_examples_run(page, here):
    """Each block on its own, as somebody would copy it."""
    here(page)
    for block in blocks(page, "python"):
        if "no-run" in block.info:
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        exec(code, {"__name__": "example"})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh", "bash", "console", "shell")], ids=page_id)
def test_commands_are_accepted(page, here):
    here(page)
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    for words in commands(page):
        program = Path(words[0]).name
        if program == "make":
            assert set(words[1:]) <= targets, words
        elif program == "optkit":
            accepted(words[1:])


def commands(page: Path) -> list[list[str]]:
    """The commands of a page: every line of ``sh`` blocks, and those after ``$`` of ``console`` ones."""
    found = []
    for block in blocks(page, "sh", "bash", "console", "shell"):
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            end = next((index for index, word in enumerate(words) if word in ("|", "&&", ";", ">", "&")), len(words))
            if words:
                found.append(words[:end])
    return found


def accepted(arguments: list[str]) -> None:
    """The command is understood, and a plan can be made of it: here, or, for what needs a GPU, on a profile that has one."""
    if arguments[0] == "run":
        arguments = [*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])]
    elif arguments[0] not in REALLY_RUN:
        arguments = [*arguments, "--help"]
    problem = refusal(arguments)
    if isinstance(problem, PlanConflict) and "--profile" not in arguments:
        problem = refusal([*arguments, "--profile", "h200"])
    if not isinstance(problem, UnavailableError):  # a library that is missing here is no fault of the page
        assert problem is None, f"optkit {shlex.join(arguments)}: {problem}"


def refusal(arguments: list[str]) -> object:
    from optkit.cli import app

    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, OptkitError):
        return result.exception
    return None if result.exit_code == 0 else result.output + repr(result.exception)


def test_the_example_configuration_is_accepted(here, monkeypatch):
    page = DOCS / "usage.md"
    here(page)
    (file,) = [block.file for block in blocks(page, "toml") if block.file]
    assert file is not None and Path(file).name == "optkit.toml"
    monkeypatch.chdir(Path(file).parent)
    accepted(["plan"])


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_local_links_resolve(page):
    broken = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_rooms_that_are_named_exist():
    for path in re.findall(r"`((?:optkit|plugins|profiles|model|tests)/[\w/.]+)`", read(ROOT / "CONTRIBUTING.md")):
        assert (ROOT / path).exists(), path


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_documented_with_their_exact_signature(name):
    signature = f"{name}{inspect.signature(HOOKS[name])}".replace("'", "")
    text = read("plugins.md")
    assert f"### `{signature}`" in text
    source = "".join(path.read_text() for path in (ROOT / "optkit").glob("*.py") if path.name != "hookspecs.py")
    called = re.search(rf"""\bhook\([^()]*["']{name}["']\)""", source) is not None
    assert called != ("Not called yet" in section(text, f"`{signature}`")), f"{name}: the page says {'not ' if called else ''}called"


def test_hooks_that_are_gone_are_not_documented():
    assert set(re.findall(r"^### `(\w+)\(", read("plugins.md"), re.MULTILINE)) == set(HOOKS)


def test_settings_are_documented():
    rows = {names_in(row[0])[0]: tuple(row[1:]) for row in table(section(read("plugins.md"), "Settings")) if "." in row[0]}
    assert rows == {name: (f"`{default}`", meaning) for name, (default, meaning) in settings.KNOWN.items()}


def test_properties_are_documented():
    rows = {names_in(row[0])[0]: row[1] for row in table(section(read("plugins.md"), "Properties"))}
    assert rows == technique.PROPERTIES


def test_stages_and_roles_are_documented_in_their_order():
    assert tuple(first_names(section(read("plugins.md"), "Stages"))) == technique.STAGES
    assert tuple(first_names(section(read("plugins.md"), "Roles"))) == technique.ROLES


def test_fields_of_the_contract_are_documented():
    text = read("plugins.md")
    assert set(first_names(section(text, "Technique"))) == set(technique.Technique.model_fields)
    assert set(technique.Claims.model_fields) <= set(first_names(section(text, "Settings")))
    context = {field.name for field in dataclasses.fields(optkit.TrialContext)}
    assert set(first_names(section(text, "What a hook is given: `trial`"))) == context


def test_members_of_an_engine_are_documented():
    members = {name for name in vars(optkit.Engine) if not name.startswith("_")}
    documented = {name.partition("(")[0] for name in first_names(section(read("plugins.md"), "Engines"))}
    assert members <= documented
    for name in ("generate", "log_probs", "score"):
        parameters = list(inspect.signature(getattr(optkit.Engine, name)).parameters)[1:]
        documented_as = next(text for text in first_names(section(read("plugins.md"), "Engines")) if text.startswith(f"{name}("))
        assert re.findall(r"\b[a-z_]+(?=[,)=])", documented_as) == parameters


def test_public_names_resolve_and_are_documented():
    text = read("python.md") + read("plugins.md")
    for name in optkit.__all__:
        assert getattr(optkit, name) is not None
        assert re.search(rf"`(optkit\.)?{name}\b", text), f"optkit.{name} is in neither docs/python.md nor docs/plugins.md"


# ---------------------------------------------------------------- the command line


def command_of(*names: str) -> Any:
    from optkit.cli import app

    found: Any = typer.main.get_command(app)
    for name in names:
        found = found.commands[name]
    return found


def all_commands(*above: str) -> list[tuple[str, ...]]:
    return [
        names
        for name, found in command_of(*above).commands.items()
        for names in (all_commands(*above, name) if hasattr(found, "commands") else [(*above, name)])
    ]


def options_of(*names: str) -> set[str]:
    found = command_of(*names).params
    return {option for parameter in found for option in [*parameter.opts, *parameter.secondary_opts] if option.startswith("--")}


def test_options_of_run_are_documented():
    documented = {name for name in first_names(section(read("usage.md"), "Options of `run`")) if name.startswith("--")}
    assert documented == options_of("run") - {"--help"}


def test_commands_and_their_options_are_documented():
    text = read("usage.md")
    for names in all_commands():
        assert re.search(rf"`optkit {' '.join(names)}\b", section(text, "Commands")), names
        for option in options_of(*names) - {"--help"}:
            assert re.search(rf"`{option}\b", text), (names, option)


def test_keys_of_the_configuration_files_are_options():
    assert {f"--{key}" for key in config.KEYS} <= options_of("run")


def test_exit_codes_and_states_are_documented():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OptkitError)]
    codes = {row[0] for row in table(section(read("usage.md"), "Exit codes"))}
    assert {str(kind.exit_code) for kind in kinds} | {"0", "130"} <= codes
    assert set(STATES) <= set(first_names(section(read("usage.md"), "Exit codes")))


def test_extras_are_documented():
    assert set(first_names(section(read("usage.md"), "Installing"))) == set(PROJECT["optional-dependencies"])


def test_keys_of_profiles_are_documented():
    assert set(first_names(section(read("profiles.md"), "Keys"))) == {*Profile.model_fields, "without"} - {"origin"}


def test_example_profiles_load_and_built_in_ones_are_named(here):
    from optkit.profile import load_profile
    from optkit.profile_files import built_in_folder

    page = DOCS / "profiles.md"
    here(page)
    examples = [block.file for block in blocks(page, "toml") if block.file]
    assert examples
    for file in examples:
        assert load_profile(f"./{file}", [Path("profiles")]).summary
    for path in built_in_folder().glob("*.toml"):
        assert f"`{path.stem}`" in read(page)


# ---------------------------------------------------------------- README, techniques, changelog


@pytest.mark.parametrize("column", COLUMNS[1:])
def test_columns_are_explained(column):
    assert f"**{column}**" in section(read(ROOT / "README.md"), "What the columns mean")


@pytest.mark.parametrize("name", OWN_TECHNIQUES)
def test_techniques_are_in_the_readme(name):
    found = discover().get(name)
    assert found.technique is not None, found.cause
    assert f"| [`{name}`](docs/techniques/{name}.md) | {found.technique.summary} |" in read(ROOT / "README.md")


@pytest.mark.parametrize("name", OWN_TECHNIQUES)
def test_techniques_have_their_page(name):
    found = discover().get(name)
    assert found.technique is not None, found.cause
    page = DOCS / "techniques" / f"{name}.md"
    assert page.exists(), f"docs/techniques/{name}.md is missing"
    text = read(page)
    headings = [heading.strip().lower() for heading in re.findall(r"^## (.+)$", text, re.MULTILINE)]
    assert [heading for heading in TECHNIQUE_HEADINGS if heading not in headings] == []
    fields = set(found.technique.options.model_fields)
    documented = {option.removeprefix(f"{name}.") for option in first_names(section(text, "Options"))}
    assert documented == fields
    assert any(words[0] == "optkit" and "--plugins" in words for words in commands(page)), "no example command"


def test_pages_of_techniques_that_are_gone():
    assert {path.stem for path in (DOCS / "techniques").glob("*.md")} <= set(OWN_TECHNIQUES)


def test_the_changelog_has_this_version():
    assert f"## [{optkit.__version__}]" in read(ROOT / "CHANGELOG.md")
    for name in OWN_TECHNIQUES:
        assert f"`{name}`" in read(ROOT / "CHANGELOG.md")
