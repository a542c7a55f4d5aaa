"""Metrics over predictions, against counts done by hand."""

import math

import pytest

from optkit import metrics
from optkit.errors import UsageError
from optkit.samples import Sample


def rows(texts, nlls=None):
    out = []
    for index, text in enumerate(texts):
        row = {"id": str(index), "digest": str(index), "text": text, "tokens": 1}
        if nlls:
            row |= {"nll": nlls[index], "nll_tokens": 2}
        out.append(row)
    return out


SAMPLES = [Sample(id=str(index), prompt="p", answer=answer) for index, answer in enumerate(["a", "b", "c", "d"])]


def test_exact_match_agreement_and_perplexity():
    before, after = rows(["a", "b", "c", "x"], [1.0] * 4), rows(["a", "x", "c ", "x"], [2.0] * 4)
    found = metrics.quality(after, SAMPLES, before)
    assert found["exact_match"]["value"] == 0.5  # white space round an answer does not count
    assert found["exact_match"]["difference"] == -0.25
    assert found["agreement"]["value"] == 0.5
    assert found["perplexity"]["value"] == pytest.approx(math.exp(1.0))
    assert found["perplexity"]["difference"] == pytest.approx(math.exp(1.0) - math.exp(0.5))


def test_the_baseline_has_values_and_no_differences():
    found = metrics.quality(rows(["a", "b", "c", "d"], [1.0] * 4), SAMPLES, None)
    assert found["exact_match"]["value"] == 1 and "difference" not in found["exact_match"] and "agreement" not in found


def test_a_broken_metric_of_somebody_else_is_shown_as_failed():
    def mine(outputs, samples):
        raise ValueError("no")

    assert metrics.own(mine, rows(["a"] * 4), SAMPLES)["mine"] == {"error": "ValueError: no"}


def test_own_metric_by_name(tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text("def length(outputs, samples):\n    return sum(len(row['text']) for row in outputs)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = metrics.own(metrics.load_metric("own_metric:length"), rows(["a", "bb", "c", "d"]), SAMPLES)
    assert found["length"]["value"] == 5


@pytest.mark.parametrize("text", ["nowhere:x", "math:nothing", "math:pi", "math"])
def test_a_metric_that_is_none(text):
    with pytest.raises(UsageError, match="--metric"):
        metrics.load_metric(text)
