"""Linear layers whose weights stay packed in 4 or 8 bits: ``pack``, ``WeightOnlyLinear``, ``fuse``.

Decoding few sequences reads every weight once a token and does little else, so bytes are time. The layer multiplies packed weights
directly up to 256 activations (``launch``) and expands the weight for more. Formats: ``nf4`` and ``fp4`` (bitsandbytes' values
and blocks), ``int4`` (groups with scale and zero, as GPTQ and AWQ store them), ``int8`` and ``fp8`` (one scale a row).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from optkit_plugins.kernels.device import starts_early
from optkit_plugins.kernels.fused import product as fused_product
from optkit_plugins.kernels.packed import formats
from optkit_plugins.kernels.packed.formats import FORMATS, Packed, dequantize, pack, pack_nf4, why_not
from optkit_plugins.kernels.packed.variants import FUSED_BATCH, VERY_MANY

__all__ = ["FORMATS", "Packed", "WeightOnlyLinear", "dequantize", "fuse", "pack", "pack_nf4", "weight_only_linear", "why_not"]

#: First compute capability with ``mma.m16n8k16``, bfloat16 and ``cp.async``.
FAST_CAPABILITY = (8, 0)


@torch.library.custom_op("optkit::weight_only_linear", mutates_args=())
def weight_only_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    rows: int,
    group: int,
) -> torch.Tensor:
    """``x`` (…, columns) times the packed weight's transpose plus bias: (…, rows) in x's dtype. Opaque to ``torch.compile``."""
    packed = Packed(format, (rows, x.shape[-1]), group, words, scales, zeros)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.shape[0] == 1:
        fused_product.count()
    return _multiply(flat, packed, bias).reshape(*x.shape[:-1], rows)


@weight_only_linear.register_fake
def _(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    rows: int,
    group: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("optkit::fused_weight_only_linear", mutates_args=())
def fused_weight_only_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    rows: int,
    group: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """``weight_only_linear`` of one activation with what ``fused.product`` names: (…, rows), half as many where ``gated``."""
    fused_product.count(norm_weight, residual, gated)
    packed = Packed(format, (rows, x.shape[-1]), group, words, scales, zeros)
    flat = x.reshape(1, x.shape[-1]).contiguous()
    outputs = rows // 2 if gated else rows
    added = None if residual is None else residual.reshape(1, outputs).contiguous()
    if fuses(flat, packed, norm_weight, added, gated):
        from optkit_plugins.kernels.packed import launch

        bias = bias if bias is None else bias.to(x.dtype)
        try:
            # compiled steps alone come here, and their weights were written long before
            fused = launch.Fused(norm_weight, eps, added, gated, starts_early(x.device))
            result = launch.product(flat, packed, bias, fused=fused)
            return result.reshape(*x.shape[:-1], outputs)
        except launch.LayoutError:
            pass  # the plain product warns of it
    result = fused_product.plain_fused(lambda x: _multiply(x, packed, bias), flat, norm_weight, eps, added, gated)
    return result.reshape(*x.shape[:-1], outputs)


@fused_weight_only_linear.register_fake
def _(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    rows: int,
    group: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows // 2 if gated else rows)


def of_one_activation(node: torch.fx.Node) -> bool:
    """Whether a ``weight_only_linear`` in a graph multiplies a single activation in bfloat16, in which a norm can be fused.

    Not the head: its many programs would each normalize, which costs more than a kernel that does it once.
    """
    arguments: Any = node.args
    x, rows = arguments[0].meta["val"], arguments[6]
    return x.dtype == torch.bfloat16 and rows < VERY_MANY * formats.TILE_ROWS and statically_known_true(x.numel() == x.shape[-1])


fused_product.register(torch.ops.optkit.weight_only_linear.default, torch.ops.optkit.fused_weight_only_linear.default, of_one_activation)


def linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """``weight_only_linear`` without the dispatcher's and its checks' 20 microseconds, where nobody traces or differentiates."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or (torch.is_grad_enabled() and x.requires_grad):
        return weight_only_linear(x, packed.words, packed.scales, packed.zeros, bias, packed.format, packed.shape[0], packed.group)
    return _multiply(x.reshape(-1, x.shape[-1]).contiguous(), packed, bias).reshape(*x.shape[:-1], packed.shape[0])


def _multiply(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, packed.shape[0])
    if x.is_cuda and has_triton():
        from optkit_plugins.kernels.packed import launch, whole

        bias = bias if bias is None else bias.to(x.dtype)
        if x.shape[0] <= FUSED_BATCH and fast(x, packed):
            try:
                return launch.product(x if x.data_ptr() % 16 == 0 else x.clone(), packed, bias)
            except launch.LayoutError as error:
                warnings.warn(f"{error}; packed weights are expanded for every product instead, which is slow", stacklevel=2)
        elif x.shape[0] == 1:
            return whole.plain_product(x, packed, bias)
        expand = whole.expand if fast(x, packed) else whole.plain_expand
        return nn.functional.linear(x, expand(packed, x.dtype), bias)
    weight = dequantize(packed, x.dtype)
    return nn.functional.linear(x, weight, bias if bias is None else bias.to(x.dtype))


def fuses(x: torch.Tensor, packed: Packed, norm_weight: torch.Tensor | None, residual: torch.Tensor | None, gated: bool) -> bool:
    """Whether the kernel for one activation takes tensors like these, with what stands round the product."""
    tensors = [x, *(tensor for tensor in (norm_weight, residual) if tensor is not None)]
    return (
        x.is_cuda
        and has_triton()
        and fast(x, packed)
        and x.data_ptr() % 16 == 0
        and all(tensor.dtype == x.dtype and tensor.is_contiguous() for tensor in tensors)
        and (norm_weight is None or (x.dtype == torch.bfloat16 and norm_weight.data_ptr() % 16 == 0))
        and (not gated or packed.shape[0] % (2 * formats.TILE_ROWS) == 0)
    )


@lru_cache
def has_triton() -> bool:
    from torch.utils._triton import has_triton as found

    return bool(found())


def why_slow(dtype: torch.dtype) -> str | None:
    """Why layers on activations of this dtype would expand their weights for every product here, or ``None``."""
    if not has_triton():
        return "Triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the fused kernel takes activations of 16 bits, not {str(dtype).removeprefix('torch.')}"
    return None


def fast(x: torch.Tensor, packed: Packed) -> bool:
    """Whether the fused kernel takes activations like these: 16 bits, on an NVIDIA GPU from sm_80 on."""
    return x.dtype in (torch.bfloat16, torch.float16) and packed.words.data_ptr() % 16 == 0 and fast_device(x.device)


@lru_cache
def fast_device(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= FAST_CAPABILITY


class WeightOnlyLinear(nn.Module):
    """A linear layer with a packed weight: saved, moved and copied like any module, without a gradient for its weight.

    Buffers: ``words``, ``scales``, ``zeros`` (``int4`` with zeros) as in ``Packed``; ``bias`` is a frozen parameter.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    #: Makes the layer of the library that the weights came from again.
    back: Callable[[WeightOnlyLinear], nn.Module] | None = None

    def __init__(self, packed: Packed, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.format, self.group = packed.format, packed.group
        self.register_buffer("words", packed.words)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zeros", packed.zeros)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._make_tables()

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: str = "nf4", group_size: int | None = None) -> WeightOnlyLinear:
        """:raises ValueError: where the shape does not fit (``why_not`` tells beforehand)."""
        return cls(pack(linear.weight, format, group_size), linear.bias)

    @classmethod
    def from_bitsandbytes(cls, linear: Any) -> WeightOnlyLinear:
        """From a quantized ``Linear4bit``: the same values, from its own bytes."""
        state = linear.weight.quant_state
        absmax = state.absmax
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        shape = (state.shape[0], state.shape[1])
        packed = formats.pack_bitsandbytes(linear.weight.data, absmax, shape, state.quant_type, state.blocksize)
        return cls(packed, linear.bias)

    @property
    def packed_weights(self) -> int:
        """How many weights the buffers stand for."""
        return self.out_features * self.in_features

    @property
    def packed(self) -> Packed:
        return Packed(self.format, (self.out_features, self.in_features), self.group, self.words, self.scales, self.zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.packed, self.bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the layer multiplies with, (out_features, in_features)."""
        return dequantize(self.packed, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> WeightOnlyLinear:
        """Move, but never cast the scales: ``model.half()`` must not round them."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self._make_tables()
        return self

    def _make_tables(self) -> None:
        """Put what the kernels look up on the layer's GPU now: made in a first product, it could land in a CUDA graph's memory pool."""
        if self.words.is_cuda:
            from optkit_plugins.kernels.packed.lookup import make_tables

            make_tables(self.format, self.words.device)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}, group={self.group}"


def fuse(layers: Sequence[WeightOnlyLinear]) -> WeightOnlyLinear:
    """One layer that computes several on the same input (query, key and value; gate and up): outputs side by side.

    :raises ValueError: where formats, groups or widths differ, or a layer's rows are no multiple of 16.
    """
    first = layers[0]
    for layer in layers:
        if (layer.format, layer.group, layer.in_features) != (first.format, first.group, first.in_features):
            raise ValueError(f"cannot fuse {layer.extra_repr()} with {first.extra_repr()}")
        if layer.out_features % formats.TILE_ROWS:
            raise ValueError(f"cannot fuse a layer of {layer.out_features} rows: no multiple of {formats.TILE_ROWS}")
        if (layer.bias is None, layer.zeros is None) != (first.bias is None, first.zeros is None):
            raise ValueError("cannot fuse layers of which only some have a bias or zeros")
    scales = torch.cat([layer.scales.float() for layer in layers]) if len({p.scales.dtype for p in layers}) > 1 else None
    zeros = None if first.zeros is None else torch.cat([layer.zeros for layer in layers if layer.zeros is not None])
    packed = Packed(
        first.format,
        (sum(layer.out_features for layer in layers), first.in_features),
        first.group,
        torch.cat([layer.words for layer in layers]),
        torch.cat([layer.scales for layer in layers]) if scales is None else scales,
        zeros,
    )
    return WeightOnlyLinear(packed, None if first.bias is None else torch.cat([layer.bias for layer in layers if layer.bias is not None]))
