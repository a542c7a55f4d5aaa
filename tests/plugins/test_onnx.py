"""onnx: the exported graph against transformers' own ``generate`` and against a plain loop without a cache, in float32."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

from optkit import Machine, ModelSource, OptkitError, Settings, TrialContext, UnavailableError
from optkit_plugins import onnx as plugin
from tests.plugins.tiny import VOCAB, plain_greedy, ragged_prompts, tiny_model

CPU = Machine("cpu", "cpu", 1, None, 2**34, 2**34, "cpu", 2)
GPU = Machine("cuda", "NVIDIA H200", 1, (9, 0), 2**37, 2**38, "cpu", 16)


@pytest.fixture(scope="module")
def engine_for(tmp_path_factory: Any) -> Any:
    """``engine_for(kind)`` -> (model, engine, trial); exporting takes seconds, so that tests share one export a kind."""
    built: dict[Any, Any] = {}

    def make(kind: str, **options: Any) -> Any:
        key = (kind, *options.items())
        if key not in built:
            model, tokenizer = tiny_model(kind)
            folder = tmp_path_factory.mktemp(kind)
            trial = TrialContext(
                "onnx", plugin.OnnxOptions(**options), Settings({}), "generate", "cpu", 0, CPU,
                ModelSource("tiny", "random", "tiny.json"), folder, tokenizer,
            )  # fmt: skip
            built[key] = model, plugin.build_engine(model, trial), trial
        return built[key]

    return make


def transformers_greedy(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """``generate`` on the whole batch, padded on the left."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=None, pad_token_id=2
    )
    return rows[:, longest:].tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_ragged_batches_give_transformers_greedy_tokens_and_scores(engine_for: Any, kind: str) -> None:
    import torch

    model, engine, _ = engine_for(kind)
    prompts = ragged_prompts()
    texts = engine.generate(prompts, new_tokens=12, exact=True)
    assert texts == transformers_greedy(model, prompts, 12) == plain_greedy(model, prompts, 12)
    assert len({token for text in texts for token in text}) > 4, "a text of one token would hide a wrong mask"

    sequences = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    starts = [1, 3, 2, 1]
    for scores, sequence, start in zip(engine.score(sequences, starts), sequences, starts, strict=True):
        with torch.no_grad():
            logits = copy.deepcopy(model).double()(input_ids=torch.tensor([sequence])).logits[0]
        expected = logits[start - 1 : -1].log_softmax(-1).gather(1, torch.tensor(sequence[start:])[:, None])[:, 0]
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (7,), (40, 1)])
def test_batches_and_prompts_of_one_are_no_special_case(engine_for: Any, lengths: tuple[int, ...]) -> None:
    """Tracing takes sizes of 0 and 1 for constants; the graph must not have learnt the example's sizes."""
    model, engine, _ = engine_for("llama")
    prompts = ragged_prompts(lengths)
    assert engine.generate(prompts, new_tokens=5, exact=True) == plain_greedy(model, prompts, 5)
    assert engine.generate(prompts, new_tokens=0) == [[] for _ in prompts]


def test_texts_end_at_the_end_of_text_token_unless_exact(engine_for: Any, monkeypatch: Any) -> None:
    model, engine, _ = engine_for("llama")
    prompts = ragged_prompts()
    full = plain_greedy(model, prompts, 12)
    monkeypatch.setattr(engine, "eos", frozenset({full[0][3]}))
    assert engine.generate(prompts, new_tokens=12, exact=True) == full
    stopped = engine.generate(prompts, new_tokens=12)
    assert stopped == [row[: row.index(full[0][3])] if full[0][3] in row else row for row in full]
    assert len(stopped[0]) <= 3


def test_the_older_operators_give_the_same_text(engine_for: Any) -> None:
    model, engine, trial = engine_for("llama", opset=20)
    prompts = ragged_prompts()
    assert engine.generate(prompts, new_tokens=8, exact=True) == plain_greedy(model, prompts, 8)
    assert plugin.prove_effect(model, trial)["opset"] == 20


def test_the_exported_folder_gives_the_same_logits_in_a_fresh_session(engine_for: Any, tmp_path: Path) -> None:
    import numpy
    import onnxruntime
    import torch
    from transformers import AutoConfig

    model, _, trial = engine_for("qwen2")
    folder = tmp_path / "exported"
    assert plugin.save_model(model, folder, trial) is True
    assert AutoConfig.from_pretrained(folder).model_type == "qwen2"
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    assert names[:5] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value"]
    assert [node.name for node in session.get_outputs()][:2] == ["logits", "present.0.key"]
    ids = numpy.array(ragged_prompts((9,)))
    past = {name: numpy.zeros((1, 2, 0, 16), numpy.float32) for name in names[3:]}
    logits = session.run(
        ["logits"], {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "position_ids": numpy.arange(9)[None], **past}
    )[0]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids)).logits.numpy()
    assert logits.shape == (1, 9, VOCAB)
    numpy.testing.assert_allclose(logits, expected, atol=2e-4)


def test_a_graph_that_does_not_score_like_the_model_is_not_exported_in_silence(engine_for: Any, tmp_path: Path) -> None:
    import torch

    model, _, trial = engine_for("qwen2")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with pytest.raises(OptkitError, match="nats a token differently.*left for inspection"):
        plugin.save_model(other, tmp_path / "exported", trial)


def test_heavy_weights_go_to_a_file_beside_the_graph_and_are_copied_with_it(tmp_path: Path) -> None:
    from optkit_plugins._onnx_export import copy_export

    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    for name in ("model.onnx", "model.onnx.data", "other.txt"):
        (tmp_path / "from" / name).write_text(name)
    copy_export(tmp_path / "from" / "model.onnx", tmp_path / "to")
    assert sorted(file.name for file in (tmp_path / "to").iterdir()) == ["model.onnx", "model.onnx.data"]


def test_the_proof_tells_a_session_from_an_untouched_model(engine_for: Any, make_trial: Any) -> None:
    model, engine, trial = engine_for("llama")
    engine.runs = 0
    untouched = plugin.prove_effect(model, make_trial("onnx", plugin.OnnxOptions()))
    assert untouched == plugin.prove_effect(model, trial), "built and never run is no effect either"
    engine.generate(ragged_prompts(), new_tokens=1)
    facts = plugin.prove_effect(model, trial)
    assert facts["session_ran"] is True and facts["providers"] == ["CPUExecutionProvider"] and facts["nodes"] > 20
    assert facts["file_bytes"] > sum(parameter.numel() * 4 for parameter in model.parameters())


def test_a_model_with_another_state_than_keys_and_values_is_refused(make_trial: Any) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=VOCAB, state_size=4, intermediate_size=64)
    with warnings.catch_warnings(), pytest.raises(OptkitError, match="Mamba.*something else than keys and values"):
        warnings.simplefilter("ignore")  # transformers' remarks on slow kernels
        plugin.build_engine(MambaForCausalLM(config).eval(), make_trial("onnx", plugin.OnnxOptions()))


def test_the_dtype_is_claimed_with_its_reason() -> None:
    claims = plugin.configure(plugin.OnnxOptions(), "generate", CPU)
    assert claims.problem is None
    assert claims.settings[0].value == "float32" and "bfloat16" in claims.settings[0].because
    assert not claims.limits[0].admits("bfloat16")


@pytest.mark.parametrize(
    ("options", "machine", "way_out"),
    [
        ({"dtype": "float16"}, CPU, "onnx.dtype=float32"),
        ({"provider": "cuda"}, CPU, "onnx.provider=cpu"),
        ({}, GPU, "onnxruntime-gpu"),
    ],
)
def test_what_cannot_run_here_says_the_way_out(options: dict[str, Any], machine: Machine, way_out: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(plugin, "_installed", lambda distribution: False)
    assert way_out in (plugin.configure(plugin.OnnxOptions(**options), "generate", machine).problem or "")


def test_a_provider_that_does_not_start_is_no_silent_fallback(engine_for: Any) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has its CUDA provider here")
    trial = engine_for("llama")[2]
    with warnings.catch_warnings(), pytest.raises(UnavailableError, match="CUDAExecutionProvider.*onnx.provider=cpu"):
        warnings.simplefilter("ignore")  # onnxruntime's own remark
        plugin.open_session(trial.folder / "model.onnx", "cuda")
