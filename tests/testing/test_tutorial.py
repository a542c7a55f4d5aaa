"""The plugin of docs/plugins.md, written from that page alone: short, and at work beside techniques that do not know it."""

import re
from pathlib import Path

import pytest
import torch

import optkit
from optkit.modules import linears
from optkit.testing import plain_greedy, plain_scores, prompts, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
(SOURCE,) = re.findall(r"^```python file=optkit_rounding\.py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
#: Bits of the mantissa: few enough that texts differ from the untouched model's.
BITS = 4


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "optkit_rounding.py"
    path.write_text(SOURCE)
    monkeypatch.setenv("OPTKIT_PLUGIN_FILE", str(path))
    return path


def rounded_by_hand():
    """The tiny model with each linear weight rounded to the nearest float of ``BITS`` bits of mantissa: Python's own integers."""
    model, tokenizer = tiny_model("llama")
    for _, module in linears(model):
        exponents = torch.floor(torch.log2(module.weight.data.abs().double())) + 1
        step = 2.0 ** (exponents - BITS)
        module.weight.data = (torch.round(module.weight.data.double() / step) * step).float()
    return model, tokenizer


def test_it_is_under_40_lines_and_imports_public_names_alone():
    assert len(SOURCE.splitlines()) < 40
    assert set(re.findall(r"^(?:from|import) (\S+)", SOURCE, re.MULTILINE)) == {"optkit", "optkit.modules", "pydantic"}


def test_with_compile_texts_are_those_of_a_model_rounded_by_hand(file):
    chosen = {"rounding.bits": BITS, "compile.backend": "aot_eager"}
    both = optkit.optimize(*tiny_model("llama"), ["rounding", "compile"], set=chosen)
    texts = both.generate(prompts(), new_tokens=8)
    assert texts == plain_greedy(rounded_by_hand()[0], prompts(), 8)
    assert texts != plain_greedy(tiny_model("llama")[0], prompts(), 8)
    assert both.proof()["rounding"]["verdict"] == "active"  # a graph is only proven beside a baseline: in the run below
    both.close()
    torch.compiler.reset()


def test_with_nf4_scores_are_those_of_nf4_on_a_model_rounded_by_hand(file):
    pytest.importorskip("bitsandbytes")
    both = optkit.optimize(*tiny_model("llama"), ["nf4", "rounding"], set={"rounding.bits": BITS})
    scores = both.score(prompts())
    for ours, theirs in zip(scores, optkit.optimize(*rounded_by_hand(), ["nf4"]).score(prompts()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for ours, plain in zip(scores, plain_scores(tiny_model("llama")[0], prompts()), strict=True):
        assert (ours - plain).abs().max() > 1e-2
    assert {name: proof["verdict"] for name, proof in both.proof().items()} == {"rounding": "active", "nf4": "active"}


def test_both_pairs_in_one_run_from_a_file_that_is_not_installed(optkit_run):
    pytest.importorskip("bitsandbytes")
    (optkit_run.here / "optkit_rounding.py").write_text(SOURCE)
    plans = ("--plan", "rounding,nf4", "--plan", "rounding,compile", "--plugin-file", "optkit_rounding.py")
    record = optkit_run.run([], *plans, set={"compile.backend": "aot_eager", "rounding.bits": BITS})
    found = {
        arm["name"]: (arm["state"], {name: proof["verdict"] for name, proof in arm.get("proof", {}).items()}) for arm in record["arms"]
    }
    assert found == {
        "baseline": ("ok", {}),
        "rounding+nf4": ("ok", {"rounding": "active", "nf4": "active"}),
        "rounding+compile": ("ok", {"rounding": "active", "compile": "active"}),
    }
