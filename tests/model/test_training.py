"""The training's data and loss, against plain versions."""

import json
from random import Random

import pytest
import torch
from tokenizers import Tokenizer

from model import data, frozen, train
from model.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(frozen.BUNDLED / "tokenizer.json"))


@pytest.fixture(scope="module")
def batches(tokenizer):
    return data.make_batches(tokenizer, Random(0), tokens=2048, chunk=64)


def test_a_row_is_bos_prompt_answer_eos_padding(tokenizer, batches):
    assert sum(len(table) for table, _ in batches) >= 60
    for table, starts in batches:
        assert table.shape[1] % 16 == 0
        for row, start in zip(table.tolist(), starts.tolist(), strict=True):
            end = row.index(data.EOS)
            assert row[0] == data.BOS and set(row[end + 1 :]) <= {data.PAD}
            assert tokenizer.decode(row[1:start]).endswith(" =>")
            assert set(json.loads(tokenizer.decode(row[start:end]))) == {"items", "currency", "due"}


def test_the_answer_loss_is_that_of_transformers_with_masked_labels(batches):
    model = train.build_model(1152, seed=0)
    table, starts = batches[0]
    tokens, first = torch.from_numpy(table.astype("int64")), torch.from_numpy(starts)
    labels = tokens.clone()
    labels[(torch.arange(tokens.shape[1]) < first[:, None]) | (tokens == data.PAD)] = -100
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=labels).loss
        _, answer = train.answer_loss(model, tokens, first)
    torch.testing.assert_close(answer, expected)


def test_a_few_steps_lower_the_loss(batches):
    model = train.build_model(1152, seed=0)
    optimizer = train.build_optimizer(model, 2e-3)
    table, starts = batches[-1]
    losses = [train.take_step(model, optimizer, (table[:4], starts[:4])).item() for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_learning_rate_warms_up_and_ends_near_zero():
    assert train.schedule(0, 0.0) == pytest.approx(1 / 300)
    assert train.schedule(1000, 0.5) == pytest.approx(0.5)
    assert train.schedule(5000, 1.0) == pytest.approx(0.01)


def test_the_tokenizer_is_built_the_same_way_twice():
    assert build_tokenizer(samples=300).to_str() == build_tokenizer(samples=300).to_str()


def test_workers_deliver_batches_and_end():
    stream = data.Stream(frozen.BUNDLED, seed=0, workers=1, tokens=1024, chunk=16)
    try:
        table, starts = next(iter(stream))
        assert len(table) == len(starts) > 0
    finally:
        stream.close()
    assert stream.fresh == 1 and stream.again == 0
    assert not any(worker.is_alive() for worker in stream.workers)
