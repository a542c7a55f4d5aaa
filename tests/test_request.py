"""Which plans a request asks for, and why each technique is in them."""

from __future__ import annotations

import pytest

from optkit.errors import UsageError
from optkit.request import Request, prepare


def plans(**request) -> list[str]:
    return [plan.name for plan in prepare(Request(profile="cpu", **request)).plans]


def test_several_plans_are_measured_in_their_order_without_the_profiles_defaults():
    assert plans(plans=[["precision"], ["int8", "precision"]]) == ["precision", "precision+int8"]


def test_plans_come_before_the_plan_as_a_whole_and_no_plan_twice():
    assert plans(plugins=["int8", "precision"], plans=[["precision", "int8"], ["precision"]]) == ["precision", "precision+int8"]
    assert plans(plugins=["int8", "precision"], each=True, plans=[["int8"]]) == ["int8", "precision", "precision+int8"]


def test_a_reference_that_is_no_other_plan_is_measured_too():
    assert plans(plugins=["int8"], reference="precision") == ["precision", "int8"]
    assert plans(plugins=["int8"], reference="int8") == ["int8"]


def test_options_reach_every_plan_that_has_the_technique_and_say_where_they_come_from():
    setup = prepare(Request(profile="cpu", plans=[["int8"], ["precision", "int8"]], set={"int8.group": 32}))
    steps = [step for plan in setup.plans for step in plan.steps if step.name == "int8"]
    assert [step.options.group for step in steps] == [32, 32]
    assert {step.choice.because for step in steps} == {"asked for (--plan)"}


def test_an_option_of_a_technique_in_no_plan_is_refused():
    with pytest.raises(UsageError, match=r"option of 'nf4', which is not in this plan \(int8\)"):
        plans(plans=[["int8"]], set={"nf4.blocksize": 64})


def test_a_technique_may_be_left_out_of_the_profiles():
    whole = plans()
    assert len(whole) == 1 and "int8" in whole[0]
    assert "int8" not in "".join(plans(without=["int8"]))
