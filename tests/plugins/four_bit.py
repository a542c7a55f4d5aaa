"""4-bit weights by their definition, computed in float64, for the tests of ``nf4`` and ``fp4``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.tiny import tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

#: QLoRA, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: One sign, two exponent bits, one mantissa bit; divided by the largest (12), as bitsandbytes documents its FP4.
FP4 = tuple(sorted({sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)}))
VALUES = {"nf4": NF4, "fp4": FP4}


def plugin(name: str) -> Any:
    return importlib.import_module(f"optkit_plugins.{name}")


def by_definition(weight: Any, blocksize: int, values: tuple[float, ...]) -> Any:
    """Each block of the flattened weight, divided by its largest magnitude, rounded to the nearest value; float64."""
    flat = weight.double().reshape(-1)
    table = torch.tensor(values, dtype=torch.float64)
    blocks = []
    for block in flat.split(blocksize):
        scale = block.abs().max()
        nearest = (block[:, None] / scale - table).abs().argmin(1)
        blocks.append(table[nearest] * scale)
    return torch.cat(blocks).reshape(weight.shape)


def weights(model: Any) -> dict[str, Any]:
    """Name -> weight (out × in) of every linear layer that is no tied head."""
    from optkit.modules import as_linear, linears

    return {name: as_linear(module).weight.detach().clone() for name, module in linears(model, min_parameters=0, head=True)}


def seen_weight(layer: Any) -> Any:
    """The weight (out × in) that a layer really multiplies with, through its forward pass."""
    with torch.inference_mode():
        rows = layer(torch.eye(layer.in_features))
    return (rows - layer.bias if layer.bias is not None else rows).T


def apply(name: str, model: Any, make_trial: Any, **options: Any) -> Any:
    technique = plugin(name)
    trial = make_trial(name, technique.technique.options(**options))
    result = technique.transform_model(model=model, trial=trial)
    assert result is None, "changed in place"
    return trial


def check_every_layer(name: str, kind: str, make_trial: Any) -> None:
    """Each layer of a tiny model but its head multiplies with the weights of the definition, blocks of 64."""
    model, _ = tiny_model(kind)
    before = weights(model)
    trial = apply(name, model, make_trial)
    facts = plugin(name).prove_effect(model=model, trial=trial)
    head = [layer for layer in before if "head" in layer or "embed_out" in layer]
    assert facts["format"] == [name] and facts["linears_quantized"] == len(before) - len(head)
    for layer in set(before) - set(head):
        expected = by_definition(before[layer], 64, VALUES[name])
        torch.testing.assert_close(seen_weight(model.get_submodule(layer)).double(), expected, rtol=1e-5, atol=1e-6)


def check_saved_folder(name: str, kind: str, make_trial: Any, folder: Path, **options: Any) -> None:
    """``save_pretrained`` writes what ``from_pretrained`` reads back to the same logits."""
    from transformers import AutoModelForCausalLM

    model, _ = tiny_model(kind)
    apply(name, model, make_trial, **options)
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else bitsandbytes computes in bfloat16 on some CPUs
    ids = torch.arange(3, 40)[None]
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
