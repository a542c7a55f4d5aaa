"""tensorrt: everything but TensorRT itself. The compiler is replaced by a stand-in that runs the exported step in torch, on the CPU."""

from __future__ import annotations

import builtins
import types
from typing import Any

import pytest

from optkit import UnavailableError
from optkit_plugins import tensorrt as plugin
from tests.plugins.tiny import plain_greedy, ragged_prompts, tiny_model


class Standin:
    """``torch_tensorrt`` with its documented call; what it gives back is the exported program as a module of one part."""

    __version__ = "0"

    def __init__(self, part: str = "_run_on_acc_0") -> None:
        self.part, self.calls = part, []
        self.dynamo = types.SimpleNamespace(compile=self.compile)

    def compile(self, program: Any, *, arg_inputs: tuple[Any, ...], **settings: Any) -> Any:
        import torch

        self.calls.append(([tuple(tensor.shape) for tensor in arg_inputs], settings))
        step = torch.nn.Module()
        step.add_module(self.part, program.module())
        step.forward = lambda *inputs: getattr(step, self.part)(*inputs)
        return step


def engine_with(monkeypatch: Any, make_trial: Any, kind: str, standin: Standin, **options: Any) -> tuple[Any, Any, Any]:
    monkeypatch.setattr(plugin, "torch_tensorrt", lambda: standin)
    model, tokenizer = tiny_model(kind)
    trial = make_trial("tensorrt", plugin.TensorRTOptions(**options), tokenizer=tokenizer)
    return model, plugin.build_engine(model, trial), trial


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_steps_of_a_fixed_length_give_the_plain_loops_tokens_and_scores(monkeypatch: Any, make_trial: Any, kind: str) -> None:
    import torch

    standin = Standin()
    model, engine, trial = engine_with(monkeypatch, make_trial, kind, standin, bucket=16)
    prompts = ragged_prompts()
    expected = plain_greedy(model, prompts, 12)
    assert engine.generate(prompts, new_tokens=12, exact=True) == expected
    assert len({token for text in expected for token in text}) > 4
    assert list(engine.steps) == [(4, 32)], "12 + 12 tokens in multiples of 16"
    shapes, settings = standin.calls[0]
    assert shapes[:3] == [(4, 1), (4, 33), (4, 1)] and {shape[2] for shape in shapes[3:]} == {32}
    assert settings["use_explicit_typing"] is True and settings["min_block_size"] == 1
    assert engine.generate(prompts, new_tokens=5, exact=True) == [row[:5] for row in expected]

    sequences = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
    starts = [3, 9, 1, 9]
    for scores, sequence, start in zip(engine.score(sequences, starts), sequences, starts, strict=True):
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([sequence])).logits[0, start - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(scores, rows.gather(1, torch.tensor(sequence[start:])[:, None])[:, 0], atol=2e-4, rtol=0)
    assert plugin.prove_effect(trial)["engines"] == len(engine.steps)
    engine.close()


def test_a_text_ends_at_the_end_of_text_token(monkeypatch: Any, make_trial: Any) -> None:
    model, engine, _ = engine_with(monkeypatch, make_trial, "llama", Standin(), bucket=32)
    prompt = ragged_prompts((5,))
    full = plain_greedy(model, prompt, 8)[0]
    engine.eos = frozenset({full[2]})
    assert engine.generate(prompt, new_tokens=8) == [full[: full.index(full[2])]]
    assert engine.generate(prompt, new_tokens=0) == [[]]
    assert engine.runs <= 3, "it stopped there"


def test_steps_that_stayed_in_torch_are_no_effect(monkeypatch: Any, make_trial: Any) -> None:
    _, engine, trial = engine_with(monkeypatch, make_trial, "llama", Standin("_run_on_gpu_0"), bucket=32)
    untouched = plugin.prove_effect(make_trial("tensorrt", plugin.TensorRTOptions()))
    engine.generate(ragged_prompts((5,)), new_tokens=2)
    left = plugin.prove_effect(trial)
    assert left.pop("summary") != untouched.pop("summary") and left == untouched


def test_a_bare_exception_of_the_import_becomes_the_cause_and_the_command(monkeypatch: Any) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "torch_tensorrt":
            raise Exception("libnvinfer.so.10: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UnavailableError, match=r"libnvinfer.so.10.*pip install 'torch-tensorrt"):
        plugin.torch_tensorrt()


def test_it_says_that_nobody_ran_it_on_a_gpu() -> None:
    assert plugin.technique.tested_on == () and plugin.technique.devices == {"cuda"}
    assert plugin.technique.requires == ("torch-tensorrt>=2.11",) and plugin.technique.extra == "tensorrt"
    assert "nobody has run it" in plugin.configure().notes[0]
