"""Prompts say what their JSON says."""

import json
from random import Random

import pytest

from model import grammar, noise, numbers


@pytest.fixture(scope="module")
def orders():
    rng = Random(11)
    return [grammar.draw_order(rng) for _ in range(1000)]


def test_the_same_seed_gives_the_same_order():
    first, second = (grammar.draw_order(Random(5), "names") for _ in range(2))
    assert first == second
    assert grammar.draw_order(Random(6), "names") != first


def test_an_answer_is_compact_json_with_a_fixed_key_order(orders):
    for order in orders:
        content = json.loads(order.answer)
        assert list(content) == ["items", "currency", "due"]
        assert all(list(item) == ["product", "quantity", "unit", "price"] for item in content["items"])
        assert json.dumps(content, separators=(",", ":")) == order.answer


def test_names_stand_in_the_prompt_as_in_the_answer(orders):
    for order in orders:
        assert all(item["product"] in order.prompt for item in json.loads(order.answer)["items"])


def test_prompts_end_with_the_separator_and_hold_it_once(orders):
    assert all(order.prompt.endswith(" =>") and order.prompt.count("=>") == 1 for order in orders)
    assert not any(mark in order.prompt for order in orders for mark in (noise.OPEN, noise.CLOSE, "{", "}", "None"))


def test_without_a_price_there_is_no_currency(orders):
    for order in orders:
        content = json.loads(order.answer)
        assert (content["currency"] is None) == all(item["price"] is None for item in content["items"])


@pytest.mark.parametrize("language", ["es", "en"])
@pytest.mark.parametrize("style", sorted(set(numbers.PRICE_STYLES + numbers.QUANTITY_STYLES) - {"phrase"}))
def test_numbers_mean_what_they_say(style, language):
    rng = Random(3)
    for _ in range(50):
        text, value = numbers.draw_number(rng, style, language)
        if style in ("words", "hundreds"):
            assert text == numbers.spell(value, language)
            continue
        plain = text.replace("k", "000").replace(" mil", "000").replace(" thousand", "000")
        if style in ("comma", "dot"):
            plain = plain.replace(",", "").replace(".", "")
        assert float(plain.replace(",", ".")) == value


@pytest.mark.parametrize(
    ("value", "spanish", "english"),
    [
        (2, "dos", "two"),
        (16, "dieciséis", "sixteen"),
        (22, "veintidós", "twenty-two"),
        (35, "treinta y cinco", "thirty-five"),
        (80, "ochenta", "eighty"),
        (100, "cien", "one hundred"),
        (125, "ciento veinticinco", "one hundred twenty-five"),
        (541, "quinientos cuarenta y uno", "five hundred forty-one"),
        (900, "novecientos", "nine hundred"),
    ],
)
def test_numbers_in_words(value, spanish, english):
    assert numbers.spell(value, "es") == spanish
    assert numbers.spell(value, "en") == english


def test_noise_never_touches_what_is_shielded():
    rng = Random(1)
    text = "quiero treinta unidades de " + noise.shield("ÁrbolNuevo Largo-20") + " para el miércoles"
    typed = {noise.add_noise(rng, text) for _ in range(300)}
    assert all("ÁrbolNuevo Largo-20" in each for each in typed)
    assert len(typed) > 20
