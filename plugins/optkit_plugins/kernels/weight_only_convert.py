"""Layers that other libraries quantized, moved to the fused kernels with their own values."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from optkit.modules import replace
from optkit_plugins.kernels import weight_only_formats as formats
from optkit_plugins.kernels.weight_only import WeightOnlyLinear


def use_fused_kernels(model: nn.Module) -> dict[str, str]:
    """Replace bitsandbytes' 4-bit and torchao's weight-only int8 layers of the model, one at a time.

    The layers multiply with the same weights as before, but are no longer bitsandbytes' or torchao's: transformers cannot save them.

    :return: name -> why a quantized layer stays with its library.
    """
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        make = _maker(module)
        if make is None:
            continue
        group = module.weight.quant_state.blocksize if make is WeightOnlyLinear.from_bitsandbytes else module.in_features
        problem = formats.why_not((module.out_features, module.in_features), group)
        if problem:
            left[name] = problem
        else:
            replace(model, name, make(module).train(module.training))
    return left


def _maker(module: nn.Module) -> Any:
    """What turns this layer into a fused one, or ``None`` for layers that are none of ours."""
    if not isinstance(module, nn.Linear):
        return None
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.nn import Linear4bit

        if isinstance(module, Linear4bit) and getattr(module.weight, "quant_state", None) is not None:
            return WeightOnlyLinear.from_bitsandbytes
    codes, scale = getattr(module.weight, "qdata", None), getattr(module.weight, "scale", None)
    weight_only = getattr(module.weight, "act_quant_kwargs", None) is None
    if (
        isinstance(codes, torch.Tensor)
        and codes.dtype == torch.int8
        and scale is not None
        and scale.numel() == codes.shape[0]
        and weight_only
    ):
        return from_torchao
    return None


def from_torchao(linear: nn.Linear) -> WeightOnlyLinear:
    """From a linear layer whose weight is torchao's ``Int8Tensor`` with one scale a row."""
    weight: Any = linear.weight
    return WeightOnlyLinear(formats.pack_int8_codes(weight.qdata, weight.scale), linear.bias)
