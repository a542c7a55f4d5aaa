"""Settings are resolved by strength, and every contradiction is told with both reasons."""

import pytest

from optkit.errors import UsageError
from optkit.settings import KNOWN, Limit, Setting, Settings, resolve


def wish(value, strength="prefer", name="generate.cache", by="a"):
    return Setting(name=name, value=value, because=f"{by} says so", by=by, strength=strength)


@pytest.mark.parametrize(
    ("stronger", "weaker"), [("flag", "must"), ("must", "profile"), ("profile", "prefer"), ("prefer", "default"), ("flag", "default")]
)
def test_the_stronger_wish_wins_in_any_order(stronger, weaker):
    for wishes in ([wish("static", stronger), wish("dynamic", weaker)], [wish("dynamic", weaker), wish("static", stronger)]):
        assert resolve(wishes, [])[0]["generate.cache"] == "static"


def test_two_musts_are_a_conflict_that_quotes_both_reasons():
    _, conflicts = resolve([wish("static", "must", by="one"), wish("sliding", "must", by="two")], [])
    assert len(conflicts) == 1
    assert "one says so" in conflicts[0] and "two says so" in conflicts[0]


def test_a_flag_against_a_must_is_a_conflict():
    _, conflicts = resolve([wish("static", "must"), wish("dynamic", "flag", by="--set")], [])
    assert conflicts


def test_two_equal_musts_agree():
    assert resolve([wish("static", "must"), wish("static", "must", by="b")], [])[1] == []


def test_limits_are_checked_against_defaults_too():
    limit = Limit(name="generate.cache", allowed=("static",), because="graphs need fixed shapes", by="c")
    _, conflicts = resolve([], [limit])
    assert "graphs need fixed shapes" in conflicts[0] and "--set generate.cache" in conflicts[0]


def test_a_maximum_admits_up_to_itself():
    limit = Limit(name="batch.size", maximum=1, because="one at a time", by="c")
    assert resolve([wish(1, name="batch.size")], [limit])[1] == []
    assert resolve([wish(2, name="batch.size")], [limit])[1]


def test_an_unknown_setting_names_its_neighbour():
    with pytest.raises(UsageError, match="did you mean 'generate.cache'"):
        resolve([wish(1, name="generate.cash")], [])


def test_settings_survive_json_and_answer_every_known_name():
    settings, _ = resolve([wish("static", "must")], [])
    again = Settings.from_json(settings.to_json())
    assert dict(again) == dict(settings)
    assert set(again) == set(KNOWN)
    assert "says so" in again.why("generate.cache")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("batch.size", "x", "a whole number from 1 to 1,000,000"),
        ("batch.size", 0, "a whole number"),
        ("batch.size", True, "a whole number"),
        ("batch.size", None, "a whole number"),
        ("load.dtype", "load", "float32, bfloat16, float16, float64"),
        ("load.attention", "org/kernel", "not a kernel of the hub"),
        ("load.attention", "org--kernel@main:x", "not a kernel of the hub"),
        ("load.trust_remote_code", 1, "True, False"),
        ("generate.temperature", float("nan"), "a number above 0"),
        ("generate.cache", "cash", "dynamic, static, sliding"),
        ("generate.max_new_tokens", "9" * 500, "a whole number"),
    ],
)
def test_a_value_that_a_setting_cannot_have_is_told_before_anything_runs(name, value, words):
    with pytest.raises(UsageError) as refused:
        resolve([wish(value, name=name, by="--set")], [])
    text = str(refused.value)
    assert text.startswith(f"setting '{name}' = ") and words in text and "(--set)" in text and len(text) < 400


def test_all_wrong_values_are_told_at_once_and_none_is_the_models_own():
    wrong = [wish("x", name="batch.size"), wish(-1, name="generate.top_k")]
    with pytest.raises(UsageError) as refused:
        resolve(wrong, [])
    assert len(str(refused.value).splitlines()) == 2
    assert resolve([wish(None, name="load.dtype")], [])[0]["load.dtype"] is None


def test_every_default_is_a_value_that_its_setting_takes():
    for name, (default, _) in KNOWN.items():
        assert resolve([wish(default, name=name)], [])[0][name] == default
