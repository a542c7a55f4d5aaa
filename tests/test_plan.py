"""Plans: order, roles, properties, settings, and every reason at once."""

import dataclasses

import pytest

from optkit.errors import PlanConflict, UsageError
from optkit.machine import detect
from optkit.plan import Choice, make_plan
from optkit.registry import discover
from optkit.settings import Setting
from tests.fakes import install, plugin

MACHINE = dataclasses.replace(detect(), device="cpu")

SETTING = "@hookimpl\ndef configure(options): return Claims(settings=(Setting(name='generate.cache', value='{value}', because='why', strength='must'),))"


@pytest.fixture
def registry(monkeypatch, tmp_path):
    install(
        monkeypatch, tmp_path / "site",
        {
            "weights-a": plugin("weights-a", stage="'quantize'", roles="{'weights'}", adds="{'weights-quantized'}"),
            "weights-b": plugin("weights-b", stage="'quantize'", roles="{'weights'}"),
            "shape": plugin("shape", stage="'architecture'", adds="{'architecture-changed'}", forbids="{'weights-quantized'}"),
            "deaf": plugin("deaf", roles="{'engine'}", honours="{'load.*'}"),
            "fixed": plugin("fixed", SETTING.format(value="static"), stage="'generation'"),
            "moving": plugin("moving", SETTING.format(value="sliding"), stage="'generation'"),
            "refuser": plugin("refuser", stage="'cache'", refuses="{'weights-quantized'}"),
            "needy": plugin("needy", stage="'adapter'", needs="{'adapter'}"),
            "limited": plugin("limited", "@hookimpl\ndef configure(options): return Claims(limits=(Limit(name='batch.size', maximum=1, because='drafts'),))"),
            "late": plugin("late", stage="'cache'", after="{'weights-elsewhere'}"),
            "early": plugin("early", stage="'cache'", adds="{'weights-elsewhere'}"),
            "gpu-only": plugin("gpu-only", devices="{'cuda'}"),
            "no-score": plugin("no-score", tasks="{'generate'}"),
            "troubled": plugin("troubled", "@hookimpl\ndef configure(options): return Claims(problem='it needs a file; give one')"),
            "optioned": plugin("optioned", "", options="type('O', (Options,), {'__annotations__': {'size': int}, 'size': 3})"),
        },
    )  # fmt: skip
    return discover()


def plan(registry, *names, task="generate", wishes=(), **options):
    return make_plan(registry, MACHINE, task, [Choice(name, options.get(name.replace("-", "_"), {})) for name in names], wishes)


def conflicts(registry, *names, **more):
    with pytest.raises(PlanConflict) as caught:
        plan(registry, *names, **more)
    return caught.value.conflicts


def test_stages_decide_the_order_not_the_user(registry):
    assert plan(registry, "refuser", "fixed", "shape").name == "shape+fixed+refuser"


def test_after_a_property_moves_within_the_stage(registry):
    assert plan(registry, "late", "early").name == "early+late"


def test_two_owners_of_a_role(registry):
    assert conflicts(registry, "weights-a", "weights-b") == [
        "role 'weights' has one owner, and weights-a and weights-b claim it; keep one of them"
    ]


def test_a_setting_that_its_reader_does_not_read(registry):
    [reason] = conflicts(registry, "deaf", "fixed")
    assert "generate.cache" in reason and "deaf" in reason and "fixed" in reason


def test_a_flag_that_nobody_reads_is_a_conflict_too(registry):
    flag = Setting(name="generate.num_beams", value=4, because="asked", by="--set", strength="flag")
    assert "generate.num_beams" in conflicts(registry, "deaf", wishes=[flag])[0]


def test_a_setting_that_only_a_technique_can_read_is_a_conflict_without_one(registry):
    slots = Setting(name="generate.slots", value=8, because="asked for", by="--set", strength="flag")
    assert "add one" in conflicts(registry, "fixed", wishes=[slots])[0]


def test_properties_refused_and_needed(registry):
    assert "'weights-quantized'" in conflicts(registry, "weights-a", "refuser")[0]
    assert "'adapter'" in conflicts(registry, "needy")[0]


def test_limits_on_settings(registry):
    assert "drafts" in conflicts(registry, "limited")[0]


def test_device_task_and_own_problem(registry):
    assert "needs cuda" in conflicts(registry, "gpu-only")[0]
    assert "does nothing in the task 'score'" in conflicts(registry, "no-score", task="score")[0]
    assert conflicts(registry, "troubled") == ["troubled: it needs a file; give one"]


def test_every_reason_is_told_at_once(registry):
    assert len(conflicts(registry, "weights-a", "weights-b", "fixed", "moving", "refuser", "troubled")) == 4


def test_unknown_and_wrong_options_are_told_with_what_is_known(registry):
    with pytest.raises(UsageError, match="unknown option 'optioned.sizze'; did you mean 'size'"):
        plan(registry, "optioned", optioned={"sizze": 1})
    with pytest.raises(UsageError, match="'optioned.size' = 'x'"):
        plan(registry, "optioned", optioned={"size": "x"})


def test_the_plan_carries_options_settings_and_reasons(registry):
    made = plan(registry, "fixed", "optioned", optioned={"size": 5})
    row = made.to_json()
    assert {"name": "optioned", "options": {"size": 5}} in row["steps"]
    assert made.settings["generate.cache"] == "static"
    assert made.settings.why("generate.cache") == "why (fixed)"
