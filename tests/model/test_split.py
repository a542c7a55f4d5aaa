"""The frozen tests share no text, no kind of name and no pair of productions with what the model is trained on."""

import json
from itertools import combinations
from random import Random

import pytest
from tokenizers import Tokenizer

from model import frozen, grammar, names

TRAINING_SAMPLE = 4000


@pytest.fixture(scope="module")
def training():
    rng = Random("a sample of the training stream")
    return [grammar.draw_order(rng) for _ in range(TRAINING_SAMPLE)]


@pytest.fixture(scope="module")
def redrawn():
    tokenizer = Tokenizer.from_file(str(frozen.BUNDLED / "tokenizer.json"))
    return {split: frozen.draw_test(split, tokenizer) for split in frozen.TESTS}


def normalized(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


@pytest.mark.parametrize("split", frozen.TESTS)
def test_the_frozen_files_are_what_the_grammar_draws(split, redrawn):
    lines = frozen.read_test(split)
    assert len(lines) >= 500
    assert [(line["prompt"], line["answer"], line["language"]) for line in lines] == [
        (order.prompt, order.answer, order.language) for order in redrawn[split]
    ]
    assert [line["id"] for line in lines] == [f"{split}-{i:03d}" for i in range(len(lines))]


def test_no_training_text_is_on_the_side_of_the_tests(training):
    """The side follows from the text alone, so this holds for every seed; the sample shows that the rule is applied."""
    frozen_texts = {normalized(line["prompt"]) for split in frozen.TESTS for line in frozen.read_test(split)}
    assert all(grammar.in_test_share(text) for text in frozen_texts)
    assert not any(grammar.in_test_share(order.prompt) for order in training)
    assert frozen_texts.isdisjoint(normalized(order.prompt) for order in training)


def test_the_three_tests_share_no_text():
    texts = [{normalized(line["prompt"]) for line in frozen.read_test(split)} for split in frozen.TESTS]
    assert all(len(each) == 500 for each in texts)
    assert all(left.isdisjoint(right) for left, right in combinations(texts, 2))


def test_new_names_come_from_letter_pairs_that_no_training_name_has(training, redrawn):
    for order in redrawn["names"]:
        for name in order.names:
            groups = [group for group in names.letter_groups(name) if len(group) > 1]
            assert groups and all(names.held_out_pairs(group) for group in groups), name
    for orders in (training, redrawn["seeds"], redrawn["recombined"]):
        assert not [name for order in orders for name in order.names if names.held_out_pairs(name)]


def test_new_names_are_those_of_the_answers(redrawn):
    for split in frozen.TESTS:
        for order in redrawn[split]:
            assert tuple(item["product"] for item in json.loads(order.answer)["items"]) == order.names


def test_every_letter_and_digit_occurs_in_training_names(training):
    seen = set("".join(name for order in training for name in order.names))
    assert set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_/ ") == seen


def test_recombined_prompts_have_pairs_that_training_never_combines(training, redrawn):
    for order in redrawn["recombined"]:
        pairs = [p for p in grammar.held_out_combinations(order.language, order.productions) if grammar.COMMA not in p]
        assert len(pairs) >= grammar.RECOMBINED_PAIRS
    for orders in (training, redrawn["seeds"], redrawn["names"]):
        assert not any(grammar.held_out_combinations(order.language, order.productions) for order in orders)


def test_each_recombined_production_is_seen_alone_in_training(training, redrawn):
    paired = {slot for pair in grammar.PAIRED for slot in pair}
    seen = {(order.language, production) for order in training for production in order.productions}
    wanted = {(order.language, p) for order in redrawn["recombined"] for p in order.productions if p[0] in paired}
    assert len(wanted) > 300
    assert wanted <= seen


def test_the_grammar_has_hundreds_of_productions_in_each_language():
    assert grammar.count_productions() > 800
    for language in grammar.LANGUAGES:
        slots = grammar.productions(language)
        assert sum(len({str(a) for a in alternatives}) for alternatives in slots.values()) > 400
