"""offload: the same outputs to the bit, weights really elsewhere between forwards, and quantized tensors travel too."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from optkit import Machine, TransformersEngine, UsageError
from optkit.modules import plain_tensors, stored_bytes
from optkit_plugins import offload
from tests.plugins.tiny import KINDS, plain_greedy, ragged_prompts, tiny_model

IDS = torch.tensor([[5, 9, 77, 31, 4, 100, 63, 12, 8, 55]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def offloaded(model: Any, make_trial: Any, layers: Any = 1, tokenizer: Any = None) -> Any:
    trial = make_trial("offload", offload.OffloadOptions(layers=layers), tokenizer=tokenizer)
    assert offload.transform_model(model=model, trial=trial) is None
    return trial


def machine(device: str) -> Machine:
    return Machine(device, "test", 1, None, 1 << 30, 1 << 34, "test", 2)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_the_same_to_the_bit(kind: str, make_trial: Any) -> None:
    model, tokenizer = tiny_model(kind)
    before, texts = logits(model), plain_greedy(model, ragged_prompts(), 5)
    trial = offloaded(model, make_trial, layers=2, tokenizer=tokenizer)
    assert torch.equal(logits(model), before)
    assert torch.equal(model(input_ids=IDS).logits, before), "outside of inference mode"
    engine = TransformersEngine(model, trial)
    assert [engine.generate([prompt], new_tokens=5, exact=True)[0] for prompt in ragged_prompts()] == texts


def test_only_the_last_layers_are_away_and_only_between_forwards(make_trial: Any, tmp_path: Path) -> None:
    model, _ = tiny_model("llama", num_hidden_layers=3)
    total = stored_bytes(model)
    size = sum(parameter.nbytes for parameter in model.model.layers[2].parameters())
    trial = offloaded(model, make_trial, layers=1)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == size

    weight = model.model.layers[2].mlp.up_proj.weight
    home, seen = weight.data_ptr(), []
    model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append(weight.data_ptr()))
    assert offload.prove_effect(model=model, trial=trial)["visited"] is False
    logits(model)
    assert seen[0] != home and weight.data_ptr() == home
    facts = offload.prove_effect(model=model, trial=trial)
    assert facts["visited"] and facts["layers_away"] == 1 and facts["bytes_elsewhere"] == size
    assert facts["bytes_on_device"] == total - size


def test_a_layer_that_fails_goes_home_all_the_same(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    before = logits(model)
    offloaded(model, make_trial)
    weight = model.model.layers[1].mlp.up_proj.weight
    home = weight.data_ptr()

    def fail(*_: Any) -> None:
        raise ArithmeticError("test")

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        logits(model)
    assert weight.data_ptr() == home
    hook.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_two_buffers_take_turns_and_nothing_else_is_allocated(layers: int, make_trial: Any) -> None:
    """An odd number of layers needs the buffers in another order each pass; whatever the order, outputs stay the same."""
    model, _ = tiny_model("llama", num_hidden_layers=5)
    before = logits(model)
    trial = offloaded(model, make_trial, layers=layers)
    seen = []
    for layer in model.model.layers[-layers:]:
        projection = layer.mlp.up_proj
        projection.register_forward_pre_hook(lambda module, _: seen.append(module.weight.untyped_storage().data_ptr()))
    for _ in range(3):
        assert torch.equal(logits(model), before)
    buffers = [slot.block.data_ptr() for slot in trial.notes["offloaded"]["ring"].slots]
    assert len(seen) == 3 * layers and set(seen) == set(buffers) and len(buffers) == min(2, layers)
    assert seen == [buffers[at % len(buffers)] for at in range(3 * layers)]


def test_the_next_layer_is_on_its_way_while_one_computes(make_trial: Any) -> None:
    model, _ = tiny_model("llama", num_hidden_layers=4)
    ring = offloaded(model, make_trial, layers=3).notes["offloaded"]["ring"]
    seen: list[list[int]] = []
    for layer in model.model.layers[1:]:
        layer.mlp.register_forward_hook(lambda *_: seen.append([at for at, _ in ring.coming]))
    logits(model)
    logits(model)
    assert seen == [[1], [2], [0], [1], [2], [0]]
    assert [at for at, _ in ring.coming] == [0, 1], "the next pass's first layers, while the head computes"


def test_a_pass_that_breaks_off_leaves_the_next_one_right(make_trial: Any) -> None:
    model, _ = tiny_model("llama", num_hidden_layers=4)
    before = logits(model)
    offloaded(model, make_trial, layers=3)
    for failing in (1, 2, 3):
        hook = model.model.layers[failing].mlp.register_forward_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            logits(model)
        hook.remove()
        assert torch.equal(logits(model), before)


def test_packed_weights_that_are_buffers_travel(make_trial: Any) -> None:
    from optkit.modules import linears, replace
    from optkit_plugins.kernels.packed.linear import WeightOnlyLinear

    model, _ = tiny_model("llama")
    for name, linear in list(linears(model)):
        replace(model, name, WeightOnlyLinear.from_linear(linear, "int8"))
    before = logits(model)
    trial = offloaded(model, make_trial, layers=2)
    words = model.model.layers[0].mlp.up_proj.words
    home = trial.notes["offloaded"]["ring"].layers[0].home
    assert words.untyped_storage().data_ptr() == home.untyped_storage().data_ptr()
    assert torch.equal(logits(model), before)


def test_an_offloaded_model_can_be_saved(make_trial: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = tiny_model("llama")
    before = logits(model)
    offloaded(model, make_trial, layers=2)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="sdpa")), before)


def test_wrapped_tensors_travel(make_trial: Any) -> None:
    """torchao's int8 weights: a tensor in a tensor."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install 'optkit[int8]'")
    model, _ = tiny_model("llama")
    full = stored_bytes(model.model.layers[1])
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2))
    weight = model.model.layers[1].mlp.up_proj.weight
    size = sum(plain.nbytes for plain in plain_tensors(weight.data))
    assert hasattr(weight, "__tensor_flatten__") and size < weight.numel() * 2
    before = logits(model)
    trial = offloaded(model, make_trial, layers=1)
    assert torch.equal(logits(model), before)
    facts = offload.prove_effect(model=model, trial=trial)
    assert facts["bytes_elsewhere"] < 0.5 * full


def test_four_bit_weights_travel(make_trial: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'optkit[nf4]'")
    import optkit

    model, tokenizer = tiny_model("llama")
    alone = optkit.optimize(model, tokenizer, plugins=["nf4"])
    before = logits(alone.model)
    alone.close()
    model, _ = tiny_model("llama")
    both = optkit.optimize(model, tokenizer, plugins=["nf4", "offload"], set={"offload.layers": 2})
    assert torch.equal(logits(both.model), before)
    assert both.proof()["offload"]["facts"]["layers_away"] == 2
    both.close()


def test_nothing_is_offloaded_where_everything_fits(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    untouched = offload.prove_effect(model=model, trial=make_trial("offload", offload.OffloadOptions()))
    facts = offload.prove_effect(model=model, trial=offloaded(model, make_trial, layers="auto"))
    assert facts.pop("summary").startswith("everything fits")
    untouched.pop("summary")
    assert facts == untouched and facts["layers_away"] == 0


def test_auto_leaves_away_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_model("llama", num_hidden_layers=4)
    layers = offload.decoder_layers(model)
    size, total = stored_bytes(layers[0]), stored_bytes(model)

    class Memory:
        available = 0

    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    monkeypatch.setattr(offload, "FILL", 1.0)
    for room, expected in ((total, 0), (total - 1, 3), (total - size, 3), (total - size - 1, 4), (total - 9 * size, 4)):
        Memory.available = room - total
        assert offload.layers_that_do_not_fit(model, layers, "cpu") == expected, room - total


def test_more_layers_than_there_are_is_refused(make_trial: Any) -> None:
    model, _ = tiny_model("llama")
    with pytest.raises(UsageError, match="set it to 2 or fewer"):
        offloaded(model, make_trial, layers=3)


def test_what_the_plan_is_told() -> None:
    claims = offload.configure(options=offload.OffloadOptions(kv=True), machine=machine("cuda"))
    assert {wish.name: wish.value for wish in claims.settings} == {"load.device_map": "cpu", "generate.cache": "offloaded"}
    claims = offload.configure(options=offload.OffloadOptions(kv=True), machine=machine("cpu"))
    assert claims.problem is not None and "leave offload.kv out" in claims.problem
    assert offload.configure(options=offload.OffloadOptions(), machine=machine("cpu")).settings == ()
    for wrong in (-1, "all", 1.5):
        with pytest.raises(ValueError, match="layers"):
            offload.OffloadOptions(layers=wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantized", ["no", "nf4", "int8"])
def test_on_a_gpu_weights_live_in_host_memory(quantized: str, tmp_path: Path) -> None:
    import optkit

    plugins = [] if quantized == "no" else [quantized]
    outputs = []
    for more in ([], ["offload"]):
        model, tokenizer = tiny_model("llama")
        optimized = optkit.optimize(model.bfloat16().cuda(), tokenizer, plugins=plugins + more, set={"offload.layers": 2} if more else {})
        with torch.inference_mode():
            outputs.append(optimized.model(input_ids=IDS.cuda(), use_cache=False).logits)
    assert torch.equal(*outputs)
    assert {parameter.device.type for parameter in optimized.model.model.layers.parameters()} == {"cpu"}
    assert optimized.model.model.embed_tokens.weight.device.type == "cuda"
    facts = optimized.proof()["offload"]["facts"]
    assert facts["where"] == "host memory" and facts["visited"] and facts["layers_away"] == 2
    optimized.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_cache_can_live_in_host_memory() -> None:
    import optkit

    model, tokenizer = tiny_model("llama")
    expected = plain_greedy(model, ragged_prompts((6,)), 6)
    optimized = optkit.optimize(model.cuda(), tokenizer, plugins=["offload"], set={"offload.layers": 1, "offload.kv": True})
    assert optimized.engine.generate(ragged_prompts((6,)), new_tokens=6, exact=True) == expected
    optimized.close()


def test_nothing_is_left_behind(make_trial: Any) -> None:
    """The hooks must not keep the model alive once its user dropped it."""
    import weakref

    model, _ = tiny_model("llama")
    trial = offloaded(model, make_trial)
    trial.notes.clear()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
