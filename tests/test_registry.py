"""Discovery survives every kind of broken plugin and names it; the others keep working."""

import pytest
from packaging.requirements import Requirement

from optkit import registry
from optkit.errors import UnavailableError, UsageError
from optkit.registry import discover
from tests.fakes import distribution, install, plugin


@pytest.fixture
def site(tmp_path):
    return tmp_path / "site"


BROKEN = {
    "import-error": "import a_module_that_does_not_exist",
    "syntax-error": "def (",
    "system-exit": "raise SystemExit(3)",
    "no-marker": "x = 1",
    "foreign-marker": "technique = 'me'",
    "other-name": plugin("another"),
    "unknown-hook": plugin("unknown-hook", "@hookimpl\ndef transfrom_model(model, trial): ..."),
    "wrong-signature": plugin("wrong-signature", "@hookimpl\ndef transform_model(model, trial, colour): ..."),
    "bad-facts": plugin("bad-facts", stage="'nowhere'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_named_and_the_others_work(monkeypatch, site, name):
    install(monkeypatch, site, {name: BROKEN[name], "good": plugin("good")})
    registry = discover()
    row = registry.get(name)
    assert row.status == "broken"
    assert row.cause and row.distribution == "optkit-fake" and f"--no-plugin {name}" in row.fix
    assert registry.get("good").status == "ready"
    with pytest.raises(UnavailableError, match="optkit-fake"):
        row.ready  # noqa: B018


def test_an_unknown_hook_gets_a_suggestion(monkeypatch, site):
    install(monkeypatch, site, {"unknown-hook": BROKEN["unknown-hook"]})
    assert "did you mean 'transform_model'" in discover().get("unknown-hook").cause


def test_two_distributions_with_one_name_are_both_named(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "a", {"twin": plugin("twin")}, name="first-dist")
    install(monkeypatch, tmp_path / "b", {"twin": plugin("twin")}, name="second-dist")
    row = discover().get("twin")
    assert row.status == "broken" and "first-dist" in row.cause and "second-dist" in row.cause


def test_a_malformed_entry_points_file_is_skipped(monkeypatch, site):
    install(monkeypatch, site, {"good": plugin("good")})
    distribution(site, "malformed", "[optkit.techniques\nx", {})
    registry = discover()
    assert registry.get("good").status == "ready"


def test_a_missing_requirement_says_what_installs_it(monkeypatch, site):
    install(monkeypatch, site, {"needy": plugin("needy", requires="('no-such-library>=2',)", extra="'fast'")})
    row = discover().get("needy")
    assert row.status == "unavailable" and "no-such-library is not installed" in row.cause and row.fix == "pip install 'optkit-fake[fast]'"


def test_an_old_requirement_says_both_versions(monkeypatch, site):
    install(monkeypatch, site, {"needy": plugin("needy", requires="('pluggy>=999',)")})
    assert "pluggy>=999 is needed" in discover().get("needy").cause


def test_a_hook_is_called_alone_with_the_arguments_it_takes(monkeypatch, site):
    install(
        monkeypatch, site,
        {
            "one": plugin("one", "@hookimpl\ndef transform_model(model): return model + ['one']"),
            "two": plugin("two", "@hookimpl\ndef transform_model(model, trial): return model + ['two', trial]"),
            "none": plugin("none"),
        },
    )  # fmt: skip
    registry = discover()
    assert registry.hook("one", "transform_model")(model=[], trial=1) == ["one"]
    assert registry.hook("two", "transform_model")(model=[], trial=1) == ["two", 1]
    assert registry.hook("none", "transform_model") is None


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(UsageError, match="did you mean 'flash'"):
        discover().get("flsh")


def test_no_technique_that_comes_with_optkit_is_broken():
    assert [(row.name, row.cause) for row in discover() if row.status == "broken"] == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('text')", "fails in `evaluate`: KeyError"),
        ("raise SystemExit(0)", "fails in `evaluate`: SystemExit"),
        ("return 'good'", "str, and a dictionary of numbers by name is wanted"),
        ("return {'length': 'long'}", "could not convert string to float"),
    ],
)
def test_a_metric_that_fails_is_named_with_the_way_to_switch_it_off(monkeypatch, site, body, words):
    install(monkeypatch, site, {"meter": plugin("meter", f"@hookimpl\ndef evaluate(outputs): {body}")})
    with pytest.raises(UnavailableError, match=words) as caught:
        discover().hook("meter", "evaluate")(outputs=[], samples=[], trial=None)
    assert "plugin 'meter' of optkit-fake" in str(caught.value) and "optkit plugins disable meter" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["torchao>=0.17", "llm.compressor-x >=0.14, <0.15", "a~=1.0", "a===1", "a[fast]>=1,!=1.5", "a>=1; python_version > '3'", "a (>=2)"],
)
def test_requirements_are_read_as_packaging_reads_them(text):
    name, versions = registry._requirement(text)
    assert (name, versions) == (Requirement(text).name, Requirement(text).specifier)
