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
