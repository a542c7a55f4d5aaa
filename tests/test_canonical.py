"""One text for one value, and back."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.canonical import MAX_DEPTH, NotCanonical, canonical_json, digest, parse

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def same(first: Any, second: Any) -> bool:
    """Equal in type as well, which == is not: 1 == 1.0 == True, 0.0 == -0.0."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float):
        return first == second and math.copysign(1, first) == math.copysign(1, second)
    return first == second


@settings(deadline=None)
@given(values)
def test_what_is_written_is_read_back_exactly(value):
    text = canonical_json(value)
    assert text.isascii()
    assert same(json.loads(text), value)
    assert same(parse(text), value)
    assert canonical_json(parse(text)) == text


@settings(deadline=None)
@given(values, values)
def test_two_values_have_one_text_only_if_they_are_the_same(first, second):
    assert (canonical_json(first) == canonical_json(second)) == same(first, second)


@settings(deadline=None)
@given(st.dictionaries(st.text(), leaves), st.randoms())
def test_the_order_of_keys_does_not_matter(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)


def test_the_text_and_its_digest_are_known():
    value = {"b": [1, 1.0, True, None, 1e300, -0.0], "a": {"é": "\ud800\n"}}
    text = '{"a":{"\\u00e9":"\\ud800\\n"},"b":[1,1.0,true,null,1e+300,-0.0]}'
    assert canonical_json(value) == text
    assert digest(value) == hashlib.sha256(text.encode()).hexdigest()


def test_a_tuple_is_a_list():
    assert canonical_json(("a", (1, 2))) == '["a",[1,2]]'


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "the value is nan"),
        ({"metrics": [{"perplexity": math.inf}]}, "metrics[0].perplexity is inf"),
        ([1, {"a": -math.inf}], "[1].a is -inf"),
        ({"outputs": {1, 2}}, "outputs is of type set, which JSON does not have"),
        ({"raw": b"bytes"}, "raw is of type bytes, which JSON does not have"),
        ({"by_bits": {4: 0.1}}, "by_bits has the key 4, which is no string"),
    ],
)
def test_what_json_cannot_hold_is_named_with_its_place(value, message):
    with pytest.raises(NotCanonical) as fault:
        canonical_json(value)
    assert str(fault.value) == message


def test_an_integer_that_python_does_not_print_is_refused():
    with pytest.raises(NotCanonical, match=r"Exceeds the limit \(4300 digits\)"):
        canonical_json({"seed": 10**5000})


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_nesting_has_a_limit_and_a_cycle_is_refused():
    assert parse(canonical_json(nested(MAX_DEPTH))) == nested(MAX_DEPTH)
    with pytest.raises(NotCanonical, match="nested deeper than 100 levels"):
        canonical_json(nested(MAX_DEPTH + 1))
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(NotCanonical, match="nested deeper"):
        canonical_json(cycle)


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        '{"a":Infinity}',
        "-Infinity",
        "",
        "{",
        '{"a":1}x',
        b"\xff",
        pytest.param("[" * 100_000, id="deep"),
        pytest.param("1" * 5000, id="long"),
    ],
)
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse(text)
