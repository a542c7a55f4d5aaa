"""Layers that other libraries quantized, moved to the fused kernels with their own values, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from optkit.modules import replace
from optkit_plugins.kernels.packed import formats
from optkit_plugins.kernels.packed.linear import WeightOnlyLinear

#: How far from an integer a weight divided by its scale may lie, in steps, beside the rounding of the weight's dtype.
OFF_GRID = 0.05


def use_fused_kernels(model: nn.Module) -> dict[str, str]:
    """Replace bitsandbytes' 4-bit and torchao's weight-only int8 and float8 layers of the model, one at a time.

    The layers multiply with the same weights as before, but are no longer bitsandbytes' or torchao's: transformers cannot save them
    until ``give_back`` has put those back.

    :return: name -> why a quantized layer stays with its library.
    """
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        make = _maker(module)
        if make is None:
            continue
        group = module.weight.quant_state.blocksize if make is from_bitsandbytes else module.in_features
        problem = formats.why_not((module.out_features, module.in_features), group)
        if problem:
            left[name] = problem
        else:
            exchange(model, name, module, make(module))
    return left


def give_back(model: nn.Module) -> None:
    """Put back what ``use_fused_kernels`` or ``from_grid`` replaced, one layer at a time, with the same codes and scales."""
    for name, module in list(model.named_modules()):
        if isinstance(module, WeightOnlyLinear) and module.back is not None:
            exchange(model, name, module, module.back(module))


def exchange(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``old``, with what it remembers of its origin."""
    source = getattr(old, "source_cls", None)  # transformers marks quantized layers by what they were
    if source is not None:
        new.source_cls = source
    replace(model, name, new.train(old.training))


def _maker(module: nn.Module) -> Callable[[Any], WeightOnlyLinear] | None:
    """What turns this layer into a fused one, or ``None`` for layers that are none of ours."""
    if not isinstance(module, nn.Linear):
        return None
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.nn import Linear4bit

        if isinstance(module, Linear4bit) and getattr(module.weight, "quant_state", None) is not None:
            return from_bitsandbytes
    codes, scale = getattr(module.weight, "qdata", None), getattr(module.weight, "scale", None)
    weight_only = getattr(module.weight, "act_quant_kwargs", None) is None
    if (
        isinstance(codes, torch.Tensor)
        and codes.dtype in (torch.int8, torch.float8_e4m3fn)
        and scale is not None
        and scale.numel() == codes.shape[0]
        and weight_only
    ):
        return from_torchao
    return None


# bitsandbytes -------------------------------------------------------------------------------------------------------------------------


def from_bitsandbytes(linear: Any) -> WeightOnlyLinear:
    """From a ``Linear4bit``. Scales that were quantized themselves (double_quant) are plain from then on."""
    fused, dtype = WeightOnlyLinear.from_bitsandbytes(linear), linear.weight.quant_state.dtype
    compute_dtype, avx512 = linear.compute_dtype, linear.support_avx512bf16_for_cpu
    fused.back = lambda layer: to_bitsandbytes(layer, dtype, compute_dtype, avx512)
    return fused


def to_bitsandbytes(fused: WeightOnlyLinear, dtype: torch.dtype, compute_dtype: Any, avx512: bool) -> nn.Module:
    """A ``Linear4bit`` of the same codes and scales. ``dtype``: of the weight before it was quantized."""
    from bitsandbytes.functional import QuantState, get_4bit_type
    from bitsandbytes.nn import Linear4bit, Params4bit

    data, absmax = formats.to_bitsandbytes(fused.packed)
    shape = torch.Size((fused.out_features, fused.in_features))
    code = get_4bit_type(fused.format, device=data.device, blocksize=fused.group)
    state = QuantState(absmax, shape=shape, code=code, blocksize=fused.group, quant_type=fused.format, dtype=dtype)
    with torch.device("meta"):
        linear = Linear4bit(shape[1], shape[0], bias=fused.bias is not None, compute_dtype=compute_dtype, quant_type=fused.format)
    linear.weight = Params4bit(
        data,
        quant_state=state,
        blocksize=fused.group,
        compress_statistics=False,
        quant_type=fused.format,
        module=linear,
        bnb_quantized=True,
    )
    linear.quant_state, linear.support_avx512bf16_for_cpu = state, avx512
    linear.register_parameter("bias", fused.bias)
    return linear


# torchao ------------------------------------------------------------------------------------------------------------------------------


def from_torchao(linear: nn.Linear) -> WeightOnlyLinear:
    """From a linear layer whose weight is torchao's ``Int8Tensor`` or ``Float8Tensor`` with one scale a row."""
    weight: Any = linear.weight.data
    pack = formats.pack_int8_codes if weight.qdata.dtype == torch.int8 else formats.pack_fp8_codes
    fused = WeightOnlyLinear(pack(weight.qdata, weight.scale), linear.bias)
    kind, (names, attributes) = type(weight), weight.__tensor_flatten__()
    rest = {name: getattr(weight, name).clone() for name in names if name != "qdata"}  # scales, and an int8 weight's zero points

    def back(layer: WeightOnlyLinear) -> nn.Module:
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        codes = formats.integers(layer.packed)
        tensors = {name: value.to(codes.device) for name, value in rest.items()} | {"qdata": codes}
        plain.weight = nn.Parameter(kind.__tensor_unflatten__(tensors, attributes, None, None), requires_grad=False)
        plain.register_parameter("bias", layer.bias)
        return plain

    fused.back = back
    return fused


# Integer grids (GPTQ, AWQ) ------------------------------------------------------------------------------------------------------------


def from_grid(linear: Any, bits: int, scale: torch.Tensor, zero: torch.Tensor) -> WeightOnlyLinear | str:
    """A layer whose weights lie on a grid of 4 bits, or of 8 bits with one scale a row, or why it cannot be one.

    :param scale: (out × groups). :param zero: (out × groups): the weight is ``(integer - zero) * scale``, integers from 0 to 2^bits - 1.
    """
    weight = linear.weight.detach()
    group = weight.shape[1] // scale.shape[1]
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    if scale.shape[0] != weight.shape[0] or weight.shape[1] % scale.shape[1]:
        return "the layer's shape is no longer the one that was quantized"
    if bits != 4 and not (bits == 8 and scale.shape[1] == 1 and symmetric):
        return f"{bits} bits in groups of {group}: the fused kernel takes 4 bits, or 8 with one symmetric scale a row"
    problem = formats.why_not((weight.shape[0], weight.shape[1]), group)
    if problem:
        return problem
    scale, zero = scale.to(weight.device), zero.to(weight.device)
    steps = weight.float() / scale.float().repeat_interleave(group, 1)
    rounding = OFF_GRID + torch.finfo(weight.dtype).eps / 2 * steps.abs()
    steps += zero.float().repeat_interleave(group, 1)
    codes = steps.round()
    if not bool(((steps - codes).abs() <= rounding).all() and (codes >= 0).all() and (codes < 2**bits).all()):
        return "its weights were changed and no longer lie on their grid"
    if bits == 4:
        packed = formats.pack_int4_codes(codes.to(torch.uint8), scale, None if symmetric else zero, group)
    else:
        packed = formats.pack_int8_codes((codes - 128).to(torch.int8), scale)
    fused = WeightOnlyLinear(packed, linear.bias)
    dtype = weight.dtype
    fused.back = lambda layer: to_linear(layer, dtype)
    return fused


def to_linear(fused: WeightOnlyLinear, dtype: torch.dtype) -> nn.Linear:
    """An ordinary layer with the expanded weight."""
    with torch.device("meta"):
        linear = nn.Linear(fused.in_features, fused.out_features, bias=fused.bias is not None)
    linear.weight = nn.Parameter(fused.dequantize(dtype), requires_grad=False)
    linear.register_parameter("bias", fused.bias)
    return linear
