"""The bundled model: its shape, its answers, and damage that can be measured."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.evaluate import BITS, greedy_answers, mean_nll, round_weights, wilson_interval
from model.frozen import BUNDLED, TESTS, read_test


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


def load():
    return AutoModelForCausalLM.from_pretrained(BUNDLED).eval()


@pytest.fixture(scope="module")
def model():
    return load()


def shortest(split, limit):
    """The frozen orders with the shortest texts: they cost the least time."""
    return sorted(read_test(split), key=lambda line: len(line["prompt"] + line["answer"]))[:limit]


def test_the_shape_is_what_techniques_need(model):
    config = model.config
    assert 2e6 <= model.num_parameters() <= 5e6
    assert config.num_attention_heads == config.num_key_value_heads and config.num_attention_heads % 4 == 0
    for width in (config.hidden_size, config.intermediate_size, config.vocab_size):
        assert width % 64 == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_folder_fits_in_the_wheel():
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) <= 12e6


@pytest.mark.parametrize(("split", "share"), [("seeds", 0.98), ("names", 0.90), ("recombined", 0.90)])
def test_greedy_answers_are_right(split, share, model, tokenizer):
    """Every eighth sample; ``python -m model.evaluate`` measures all of them."""
    samples = read_test(split)[::8]
    answers = greedy_answers(model, tokenizer, [sample["prompt"] for sample in samples])
    right = sum(answer == sample["answer"] for answer, sample in zip(answers, samples, strict=True))
    assert right >= share * len(samples)


def test_an_order_outside_the_tests(model, tokenizer):
    [answer] = greedy_answers(model, tokenizer, ["Necesito comprar 100 unidades de producto A, precio 50 pesos =>"])
    assert json.loads(answer) == {
        "items": [{"product": "A", "quantity": 100, "unit": "unit", "price": 50}],
        "currency": "MXN",
        "due": None,
    }


def test_answers_do_not_depend_on_padding(model, tokenizer):
    prompts = [sample["prompt"] for split in TESTS for sample in shortest(split, 3)] + [read_test("seeds")[0]["prompt"]]
    assert greedy_answers(model, tokenizer, prompts) == greedy_answers(model, tokenizer, prompts, batch=1)


def test_the_likelihood_is_that_of_transformers(model, tokenizer):
    sample = read_test("names")[0]
    prompt = tokenizer(sample["prompt"], return_tensors="pt").input_ids
    answer = tokenizer(sample["answer"] + "</s>", add_special_tokens=False, return_tensors="pt").input_ids
    labels = torch.cat([torch.full_like(prompt, -100), answer], dim=1)
    with torch.inference_mode():
        expected = model.double()(input_ids=torch.cat([prompt, answer], dim=1), labels=labels).loss.item()
    model.float()
    assert mean_nll(model, tokenizer, [sample])["answer"] == pytest.approx(expected, rel=0.05)


def test_damage_grows_with_every_bit_taken(model, tokenizer):
    samples = shortest("seeds", 100)
    prompts = [sample["prompt"] for sample in samples]
    untouched = greedy_answers(model, tokenizer, prompts)
    agreement, likelihood = [], []
    for bits in BITS:
        rounded = load()
        round_weights(rounded, bits)
        answers = greedy_answers(rounded, tokenizer, prompts)
        agreement.append(sum(a == b for a, b in zip(answers, untouched, strict=True)))
        likelihood.append(mean_nll(rounded, tokenizer, samples))
    assert agreement == sorted(agreement, reverse=True) and agreement[-1] < agreement[0] == len(samples)
    for part in ("answer", "prompt"):
        values = [nll[part] for nll in likelihood]
        assert values == sorted(set(values)), (part, values)


def test_rounding_takes_at_most_two_to_the_bits_levels():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
    before = layer[0].weight.detach().clone()
    round_weights(layer, 3)
    after = layer[0].weight.detach()
    assert all(len(row.unique()) <= 7 for row in after)
    step = before.abs().amax(dim=1, keepdim=True) / 3
    assert ((after - before).abs() <= step / 2 + 1e-7).all()


def test_the_wilson_interval_of_a_textbook_case():
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
