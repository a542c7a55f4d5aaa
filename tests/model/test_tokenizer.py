"""The bundled tokenizer: lossless, and its boundaries are where training and generation need them."""

from random import Random

import pytest
from transformers import AutoTokenizer

from model import data, frozen, names


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(frozen.BUNDLED)


@pytest.mark.parametrize("split", frozen.TESTS)
def test_a_prompt_and_its_answer_are_tokenized_apart_as_together(split, tokenizer):
    for line in frozen.read_test(split):
        prompt = tokenizer(line["prompt"]).input_ids
        answer = tokenizer(line["answer"], add_special_tokens=False).input_ids
        assert tokenizer(line["prompt"] + line["answer"]).input_ids == prompt + answer
        assert prompt[0] == tokenizer.bos_token_id
        assert len(prompt) <= data.MAX_PROMPT and len(answer) < data.MAX_ANSWER
        assert tokenizer.decode(answer) == line["answer"]
        assert tokenizer.decode(prompt, skip_special_tokens=True) == line["prompt"]


def test_any_text_comes_back(tokenizer):
    for text in ("日本 ₿ ñandú\n\ttab  two", '{"items":[{"product":"x', "=> =>", "Ḽơᶉëᶆ <s"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_name_has_the_same_pieces_after_a_space_and_after_a_quote(tokenizer):
    rng = Random(2)
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    space, opening = ids(" "), ids('{"product":"')
    same = 0
    for _ in range(500):
        name = names.product_name(rng, held_out=True)
        same += ids(" " + name) == space + ids(name) and ids('{"product":"' + name) == opening + ids(name)
    assert same >= 490  # the rest begin with a word of the grammar


def test_special_tokens_and_left_padding(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (data.PAD, data.BOS, data.EOS)
    batch = tokenizer(["a", "a longer prompt =>"], padding=True)
    assert batch["input_ids"][0][0] == data.PAD and batch["attention_mask"][0][0] == 0
    assert batch["input_ids"][0][-1] != data.PAD
