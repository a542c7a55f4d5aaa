"""GPTQ: damage by bits, the exported folder, and the files of GPTQ and AWQ against packers written here from the formats."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optkit.machine import detect
from tests.plugins.tiny import tiny_config, tiny_model

torch = pytest.importorskip("torch")
if importlib.util.find_spec("llmcompressor") is None:  # imported here, it would switch its log on
    pytest.skip("llmcompressor is not installed", allow_module_level=True)

#: Reading a compressed folder warns of an upper bound that it takes until the weights are there.
quiet_reload = pytest.mark.filterwarnings("ignore::UserWarning")


def plugin() -> Any:
    return importlib.import_module("optkit_plugins.gptq")


def calibration(samples: int = 16, length: int = 32) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for _ in range(samples)]


def logits(model: Any, seed: int = 1) -> Any:
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.double()


def apply(model: Any, make_trial: Any, tokenizer: Any, **options: Any) -> Any:
    trial = make_trial("gptq", plugin().technique.options(**options), tokenizer=tokenizer, calibration=calibration())
    assert plugin().transform_model(model=model, trial=trial) is None, "changed in place"
    return trial


def rounded(weight: Any, bits: int) -> Any:
    """The plain alternative: to the nearest integer, one symmetric scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / (2**bits - 1) * 2
    return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


# ---------------------------------------------------------------- quantizing


def test_damage_grows_as_bits_go(make_trial: Any) -> None:
    errors = {}
    for bits in (8, 4, 3, 2):
        model, tokenizer = tiny_model("llama")
        plain = logits(model)
        apply(model, make_trial, tokenizer, bits=bits)
        changed = logits(model)
        agreement = float((changed.argmax(-1) == plain.argmax(-1)).double().mean())
        errors[bits] = (float((changed - plain).pow(2).mean() / plain.var()), -agreement)
    mse = [errors[bits][0] for bits in (8, 4, 3, 2)]
    disagreement = [errors[bits][1] for bits in (8, 4, 3, 2)]
    assert 0 < mse[0] < 1e-3 and mse == sorted(mse) and mse[-1] > 0.2
    assert disagreement == sorted(disagreement) and disagreement[0] < -0.9


def test_it_beats_rounding_on_the_layers_inputs(make_trial: Any) -> None:
    """What GPTQ minimizes: the error of a layer's outputs on the calibration inputs."""
    model, tokenizer = tiny_model("llama")
    layer = model.model.layers[0].mlp.down_proj
    before = layer.weight.detach().double().clone()
    seen: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double().reshape(-1, args[0].shape[-1])))
    with torch.inference_mode():
        for ids in calibration():
            model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    inputs = torch.cat(seen)
    apply(model, make_trial, tokenizer, bits=3, group_size=-1)
    after = model.model.layers[0].mlp.down_proj.weight.double()
    error, plain = ((inputs @ (weight - before).T).pow(2).mean() for weight in (after, rounded(before, 3)))
    assert 0 < error < 0.8 * plain


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gpt2", "gemma2", "opt", "gpt_neox"])
def test_every_layer_of_every_architecture_lies_on_its_grid(kind: str, make_trial: Any) -> None:
    model, tokenizer = tiny_model(kind, **({"n_layer": 1} if kind == "gpt2" else {"num_hidden_layers": 1}))
    layers = {"gpt2": 4, "opt": 6, "gpt_neox": 4}.get(kind, 7)
    trial = apply(model, make_trial, tokenizer, bits=2, group_size=32)
    facts = plugin().prove_effect(model=model, trial=trial)
    assert facts["linears_quantized"] == layers and facts["group_sizes"] == {"32": layers}
    for name in trial.notes["grids"]:
        weight = model.get_submodule(name).weight
        for group in weight.reshape(-1, 32)[:50]:
            assert len(group.unique()) <= 4, "two bits are four values"


def test_a_width_that_the_group_does_not_divide_gets_a_smaller_group_or_a_row(make_trial: Any) -> None:
    from optkit_plugins._gptq_quantize import fitting_group

    assert [fitting_group(width, 128) for width in (4096, 192, 96, 64, 172, 48)] == [128, 64, 32, 64, None, None]
    assert fitting_group(48, 16) == 16
    model, tokenizer = tiny_model("llama", intermediate_size=172, num_hidden_layers=1)
    facts = plugin().prove_effect(model=model, trial=apply(model, make_trial, tokenizer))
    assert facts["group_sizes"] == {"64": 6, "row": 1}


def test_proof_counts_what_an_export_takes_and_says_nothing_of_an_untouched_model(make_trial: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama")
    options = plugin().technique.options()
    untouched = plugin().prove_effect(model=model, trial=make_trial("gptq", options))
    assert untouched["linears_quantized"] == 0 and untouched["bytes_exported"] == untouched["bytes_stored"]
    trial = apply(model, make_trial, tokenizer, symmetric=False)
    facts = plugin().prove_effect(model=model, trial=trial)
    assert facts["linears_quantized"] == 14 and facts["bytes_stored"] == untouched["bytes_stored"]
    assert facts["calibration_samples"] == 16 and facts["calibration_tokens"] == 16 * 32
    plugin().save_model(model=model, folder=tmp_path / "saved", trial=trial)
    from safetensors.torch import load_file

    written = load_file(tmp_path / "saved" / "model.safetensors")
    sizes = sum(tensor.numel() * tensor.element_size() for name, tensor in written.items() if not name.endswith("weight_shape"))
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert facts["bytes_exported"] == sizes + buffers
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    assert plugin().prove_effect(model=model, trial=trial)["linears_quantized"] == 13, "a layer off its grid is not counted"


@quiet_reload
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("llama", "float32", {"bits": 4}),
        ("qwen2", "float32", {"bits": 3, "symmetric": False, "group_size": 32}),
        ("llama", "bfloat16", {"bits": 8, "skip": ("*.layers.0.*",)}),
        ("opt", "float32", {"bits": 2, "group_size": -1}),
    ],
)
def test_the_exported_folder_loads_with_the_same_logits(kind: str, dtype: str, options: Any, make_trial: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny_model(kind)
    for parameter in model.parameters():  # not the rotary frequencies, which are loaded in float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    trial = apply(model, make_trial, tokenizer, **options)
    expected = logits(model)
    assert plugin().save_model(model=model, folder=tmp_path / "saved", trial=trial) is True
    assert torch.equal(logits(model), expected), "the model is as before"
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors"
    assert {group["weights"]["num_bits"] for group in written["config_groups"].values()} == {options["bits"]}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    assert torch.equal(logits(loaded), expected)


def test_gpt2_is_not_exported_in_a_form_that_nothing_reads(make_trial: Any, tmp_path: Path) -> None:
    from optkit import UsageError

    model, tokenizer = tiny_model("gpt2", n_layer=1)
    trial = apply(model, make_trial, tokenizer)
    with pytest.raises(UsageError, match="Conv1D"):
        plugin().save_model(model=model, folder=tmp_path / "saved", trial=trial)


def test_nothing_is_printed_written_or_left_behind(
    make_trial: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    model, tokenizer = tiny_model("llama", num_hidden_layers=1)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    name, environment = model.config._name_or_path, dict(os.environ)
    apply(model, make_trial, tokenizer)
    printed = capfd.readouterr()
    assert printed.out == "" and "it/s" not in printed.err and "METRIC" not in printed.err
    assert not list((tmp_path / "work").iterdir())
    assert dict(os.environ) == environment and model.config._name_or_path == name
    assert "save_pretrained" not in vars(model) and getattr(model.config, "quantization_config", None) is None
    layer = model.model.layers[0].mlp.up_proj
    assert [key for key, _ in layer.named_parameters()] == ["weight"] and "forward" not in vars(layer)


@pytest.mark.parametrize("tie", [False, True])
def test_the_model_is_an_ordinary_one_afterwards(tie: bool, make_trial: Any) -> None:
    model, tokenizer = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=tie)

    def state() -> dict[str, Any]:
        return {
            name: (type(module), sorted(vars(module)), type(module._parameters), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        }

    before, names = state(), list(model.state_dict())
    apply(model, make_trial, tokenizer)
    after = {name: (kind, [key for key in keys if key != "source_cls"], *rest) for name, (kind, keys, *rest) in state().items()}
    assert after == before and list(model.state_dict()) == names
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(compiled, model(ids, use_cache=False).logits)
    torch._dynamo.reset()


def test_it_needs_calibration_samples(make_trial: Any) -> None:
    from optkit import UsageError

    model, tokenizer = tiny_model("llama")
    with pytest.raises(UsageError, match="no calibration samples; give texts"):
        plugin().transform_model(model=model, trial=make_trial("gptq", plugin().technique.options(), tokenizer=tokenizer))


def test_a_mixture_of_experts_is_refused(make_trial: Any) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from optkit import UsageError

    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(UsageError, match="experts of a mixture"):
        apply(MixtralForCausalLM(config), make_trial, None)


@pytest.mark.parametrize("options", [{"bits": 5}, {"group_size": 0}, {"group_size": 4}, {"damp": 0}, {"mode": "write"}, {"sym": True}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        plugin().technique.options(**options)


def test_the_mode_decides_the_role() -> None:
    options = plugin().technique.options
    assert plugin().configure(options=options(), task="score", machine=detect()).roles == {"weights"}
    assert plugin().configure(options=options(mode="read"), task="score", machine=detect()).roles == {"load"}


def test_weights_are_opaque_where_the_fused_kernel_generates() -> None:
    options, gpu = plugin().technique.options, replace(detect(), device="cuda", compute_capability=(9, 0))
    claims = plugin().configure(options=options(), task="generate", machine=gpu)
    assert {"weights-quantized", "weights-opaque"} <= claims.adds and "gptq.kernel=library" in claims.notes[0]
    for others in ({"kernel": "library"}, {"bits": 3}):
        assert plugin().configure(options=options(**others), task="generate", machine=gpu).adds == {"weights-changed"}
    assert plugin().configure(options=options(), task="score", machine=gpu).adds == {"weights-changed"}
    cpu = replace(gpu, device="cpu", compute_capability=None)
    assert "sm_80" in plugin().configure(options=options(kernel="triton"), task="generate", machine=cpu).problem


@quiet_reload
@pytest.mark.parametrize("options", [{"bits": 4, "group_size": 64}, {"bits": 4, "symmetric": False}, {"bits": 8, "group_size": -1}])
def test_the_fused_kernels_layers_are_those_of_the_export(options: dict[str, Any], make_trial: Any, tmp_path: Path) -> None:
    """The same seed twice: multiplied packed, and expanded. Proof, logits and exported folder are the same."""
    from transformers import AutoModelForCausalLM

    plain, tokenizer = tiny_model("llama", num_hidden_layers=1)
    model, _ = tiny_model("llama", num_hidden_layers=1)
    before = plugin().prove_effect(model=plain, trial=apply(plain, make_trial, tokenizer, **options))
    trial = apply(model, make_trial, tokenizer, kernel="triton", **options)
    facts = plugin().prove_effect(model=model, trial=trial)
    assert facts["kernel"] == "optkit's fused kernel in 7 layers" and before["kernel"].startswith("torch")
    same = ("linears_quantized", "bytes_exported", "group_sizes", "quantized_share_of_parameter_bytes", "linears")
    assert {name: facts[name] for name in same} == {name: before[name] for name in same}
    assert facts["bytes_stored"] < before["bytes_stored"]
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    assert plugin().save_model(model=model, folder=tmp_path / "saved", trial=trial) is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    assert torch.equal(logits(loaded), logits(plain))


@pytest.mark.parametrize(("method", "layout", "act_order"), [("gptq", "gptq", False), ("gptq", "gptq_v2", True), ("awq", "gemm", False)])
def test_files_go_to_the_fused_kernel_with_their_own_scales(
    method: str, layout: str, act_order: bool, make_trial: Any, tmp_path: Path
) -> None:  # fmt: skip
    from optkit import ModelSource

    expected = checkpoint("llama", tmp_path / "files", method, 4, layout, act_order, group=64)
    trial = make_trial("gptq", plugin().technique.options(mode="read", kernel="triton"), settings={"load.dtype": "float32"})
    model = plugin().load_model(source=ModelSource("files", "folder", str(tmp_path / "files")), trial=trial)
    plugin().transform_model(model=model, trial=trial)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    facts = plugin().prove_effect(model=model, trial=trial)
    left = facts.get("layers_left_with_the_library", {})
    assert facts["kernel"] == f"optkit's fused kernel in {14 - len(left)} layers" and facts["fused_formats"] == ["int4, group 64"]
    assert sorted(left) == (["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"] if act_order else []), (
        "two groups, not in order"
    )
    assert all("desc_act" in reason for reason in left.values())
    plugin().save_model(model=model, folder=tmp_path / "saved", trial=trial)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-6, atol=1e-6)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear, "transformers saves expanded weights"


def test_the_whole_line_generates_scores_and_proves() -> None:
    import optkit

    model, tokenizer = tiny_model("llama", num_hidden_layers=1)
    optimized = optkit.optimize(model, tokenizer, plugins=["gptq"], set={"gptq.bits": 3}, calibration=calibration())
    assert len(optimized.generate([[5, 6, 7]], new_tokens=4)[0]) <= 4
    assert torch.isfinite(optimized.score([[5, 6, 7, 8]])[0]).all()
    proof = optimized.proof()["gptq"]
    assert proof["verdict"] == "active" and proof["facts"]["bits"] == 3


# ---------------------------------------------------------------- reading


def pack_rows(values: Any, bits: int) -> Any:
    """AutoGPTQ's packing along the first dimension: the bits of each column strung together, lowest first, cut into words of 32."""
    import numpy as np

    columns = np.asarray(values, dtype=np.int64)
    bit = (columns[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    strung = bit.reshape(-1, columns.shape[1]).astype(np.uint64)
    words = (strung.reshape(-1, 32, columns.shape[1]) << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def pack_awq(values: Any) -> Any:
    """AutoAWQ's GEMM packing along the second dimension, a nibble at a time."""
    import numpy as np

    integers = np.asarray(values, dtype=np.uint32)
    words = np.zeros((integers.shape[0], integers.shape[1] // 8), dtype=np.uint32)
    for word in range(words.shape[1]):
        for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, word] |= integers[:, word * 8 + column] << np.uint32(nibble * 4)
    return torch.from_numpy(words.view(np.int32).copy())


def layer_files(method: str, bits: int, width: int, height: int, group: int, layout: str, act_order: bool, seed: int) -> tuple[Any, Any]:
    """Random integers, zero points and scales of one layer, as a checkpoint's tensors; and its weight (out × in) in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = width // group
    integers = torch.randint(0, 2**bits, (width, height), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, height), generator=generator)
    scales = (torch.rand(groups, height, generator=generator) * 0.02 + 0.01).half()
    g_idx = torch.arange(width) // group
    if act_order:
        g_idx = g_idx[torch.randperm(width, generator=generator)]
    weight = (scales.double()[g_idx] * (integers - zeros[g_idx]).double()).T
    if method == "awq":
        return {"qweight": pack_awq(integers), "qzeros": pack_awq(zeros), "scales": scales}, weight
    stored = zeros - (1 if layout == "gptq" else 0)
    tensors = {"qweight": pack_rows(integers, bits), "qzeros": pack_rows(stored.T, bits).T.contiguous(), "scales": scales}
    return tensors | ({"g_idx": g_idx.int()} if act_order or bits == 3 else {}), weight


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_are_read_as_they_were_packed(bits: int, layout: str, act_order: bool) -> None:
    from optkit_plugins._gptq_files import gptq_weight

    tensors, expected = layer_files("gptq", bits, 128, 96, 32, layout, act_order, seed=bits)
    groups = tensors.get("g_idx", torch.arange(128) // 32)
    weight = gptq_weight(tensors["qweight"], tensors["qzeros"], tensors["scales"], groups, bits, 1 if layout == "gptq" else 0)
    assert torch.equal(weight, expected.float())


def test_awq_words_are_read_as_they_were_packed() -> None:
    from optkit_plugins._gptq_files import awq_weight

    tensors, expected = layer_files("awq", 4, 128, 96, 32, "gemm", False, seed=0)
    assert torch.equal(awq_weight(**tensors), expected.float())


def checkpoint(kind: str, folder: Path, method: str, bits: int, layout: str, act_order: bool, group: int = 32) -> Any:
    """Write a folder as AutoGPTQ or AutoAWQ would; return the same model with its weights in full precision."""
    from safetensors.torch import save_file
    from transformers.pytorch_utils import Conv1D

    from optkit.modules import linears

    model, _ = tiny_model(kind)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for seed, (name, module) in enumerate(linears(model)):
        rows, columns = module.weight.shape
        width, height = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
        packed, weight = layer_files(method, bits, width, height, group, layout, act_order, seed)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
        with torch.no_grad():
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
    folder.mkdir()
    shards = sorted(tensors)
    halves = {"a.safetensors": shards[::2], "b.safetensors": shards[1::2]}
    for file, names in halves.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {"quant_method": method, "bits": bits, "group_size": group}
    quantization |= {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": act_order, "checkpoint_format": layout}
    (folder / "config.json").write_text(json.dumps(tiny_config(kind).to_dict() | {"quantization_config": quantization, "dtype": "float32"}))
    return model


@pytest.mark.parametrize(
    ("kind", "method", "bits", "layout", "act_order"),
    [
        ("llama", "gptq", 4, "gptq", True),
        ("llama", "gptq", 3, "gptq_v2", False),
        ("qwen2", "gptq", 8, "gptq", False),
        ("gpt2", "gptq", 2, "gptq", True),
        ("llama", "awq", 4, "gemm", False),
        ("opt", "awq", 4, "gemm", False),
    ],
)
def test_a_checkpoint_is_read_into_the_model_that_it_stands_for(
    kind: str, method: str, bits: int, layout: str, act_order: bool, make_trial: Any, tmp_path: Path
) -> None:  # fmt: skip
    from optkit import ModelSource

    expected = checkpoint(kind, tmp_path / "files", method, bits, layout, act_order)
    trial = make_trial("gptq", plugin().technique.options(mode="read"), settings={"load.dtype": "float32"})
    model = plugin().load_model(source=ModelSource("files", "folder", str(tmp_path / "files")), trial=trial)
    assert torch.equal(logits(model), logits(expected))
    facts = plugin().prove_effect(model=model, trial=trial)
    assert facts["bits"] == bits and facts["linears_read"] == {"gpt2": 8, "opt": 12}.get(kind, 14)
    assert plugin().transform_model(model=model, trial=trial) is None
    assert getattr(model.config, "quantization_config", None) is None, "it is an ordinary model"


def test_autogptqs_own_file_is_found(make_trial: Any, tmp_path: Path) -> None:
    """Before transformers read it, the configuration lay in quantize_config.json, and one file was named after the bits."""
    from safetensors.torch import load_file, save_file

    from optkit import ModelSource

    expected = checkpoint("llama", tmp_path / "files", "gptq", 4, "gptq", True)
    config = json.loads((tmp_path / "files" / "config.json").read_text())
    found = config.pop("quantization_config")
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps({key: found[key] for key in ("bits", "group_size", "desc_act")}))
    tensors = load_file(tmp_path / "files" / "a.safetensors") | load_file(tmp_path / "files" / "b.safetensors")
    save_file(tensors, folder / "gptq_model-4bit-32g.safetensors")
    trial = make_trial("gptq", plugin().technique.options(mode="read"))
    model = plugin().load_model(source=ModelSource("old", "folder", str(folder)), trial=trial)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (None, "names no quantization"),
        ({"quant_method": "fp8"}, "quantized with 'fp8'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout 'marlin'"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout 'gemv'"),
    ],
)
def test_other_folders_are_refused_with_the_reason(quantization: Any, message: str, tmp_path: Path) -> None:
    from optkit import UsageError
    from optkit_plugins._gptq_files import read_format

    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization} if quantization else {}))
    with pytest.raises(UsageError, match=message):
        read_format(tmp_path)


def test_tensors_that_do_not_fit_the_bits_are_refused(make_trial: Any, tmp_path: Path) -> None:
    from optkit import ModelSource, UsageError

    checkpoint("llama", tmp_path / "files", "gptq", 4, "gptq", False)
    path = tmp_path / "files" / "config.json"
    path.write_text(path.read_text().replace('"bits": 4', '"bits": 8'))
    with pytest.raises(UsageError, match="at 8 bits take"):
        plugin().load_model(
            source=ModelSource("files", "folder", str(tmp_path / "files")),
            trial=make_trial("gptq", plugin().technique.options(mode="read")),
        )
