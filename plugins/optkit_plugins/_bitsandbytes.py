"""What ``nf4`` and ``fp4`` share: bitsandbytes' 4-bit linear layers, put into a model in place."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optkit import Claims, Options, UsageError
from optkit_plugins import _fused_kernels, _packed

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from optkit import Machine, TrialContext

#: What bitsandbytes' kernels take, largest first.
BLOCK_SIZES = (4096, 2048, 1024, 512, 256, 128, 64, 32)


class FourBitOptions(Options):
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="weights that share one scale; where it does not divide a layer's width, the next smaller size that does is taken"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype that weights are expanded to for the product; auto is the model's own"
    )
    double_quant: bool = Field(False, description="quantize the scales too, to 8 bits: 0.37 bits a weight less at block size 64")
    min_parameters: int = Field(1000, ge=0, description="leave smaller layers alone")
    head: bool = Field(False, description="quantize the output head as well; a head tied to the embedding never is")
    kernel: _fused_kernels.Kernel = Field("auto", description=_fused_kernels.DESCRIPTION)
    skip: tuple[str, ...] = Field((), description="name patterns of layers to leave alone, such as *.layers.0.*")


def claims(options: FourBitOptions, task: str, machine: Machine) -> Claims:
    """Frozen 4-bit weights do not learn: training needs an adapter beside them. The fused kernel wants a GPU with bf16 tensor cores."""
    problem = _fused_kernels.problem(options.kernel, task, machine)
    if options.kernel == "triton" and options.double_quant:
        problem = "the fused kernel reads plain scales; leave out double_quant, or use kernel=library"
    if problem:
        return Claims(problem=problem)
    scale_bits = 8 + 32 / 256 if options.double_quant else 32
    needs = frozenset({"adapter"}) if task == "train" else frozenset()
    return Claims(needs=needs, weight_bits=4 + scale_bits / options.blocksize)


@contextlib.contextmanager
def _no_hub_kernel() -> Iterator[None]:
    """Keep bitsandbytes' import from asking the hub for a kernel.

    On CPUs with AVX512-BF16 its import calls ``kernels.get_kernel``, which downloads code. It survives the package's absence with a
    logged warning, so the package is hidden, and the warning filtered, while bitsandbytes is imported.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hidden = sys.modules.get("kernels")

    def drop(record: logging.LogRecord) -> bool:
        return "gemm_4bit_forward" not in record.getMessage()

    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
        if hidden is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = hidden


def load_bitsandbytes() -> Any:
    """The package, imported without a look at the network."""
    if "bitsandbytes" not in sys.modules:
        with _no_hub_kernel():
            import bitsandbytes
    import bitsandbytes

    return bitsandbytes


def quantize(model: PreTrainedModel, trial: TrialContext, quant_type: Literal["nf4", "fp4"]) -> None:
    """Replace the model's linear layers by 4-bit ones and make it known to transformers as a 4-bit model."""
    options = trial.options
    assert isinstance(options, FourBitOptions)
    _packed.refuse_quantized(model, quant_type)
    load_bitsandbytes()
    # Told at every product on CUDA; the facts say of how many layers.
    warnings.filterwarnings("ignore", message="inner dimension .* is not aligned for fast kernel", category=UserWarning)
    names = _packed.chosen(model, min_parameters=options.min_parameters, head=options.head, skip=options.skip)
    trial.notes["left"] = _packed.convert(model, names, lambda module: four_bit(module, options, quant_type))
    if any(True for _ in four_bit_layers(model)):
        register(model, options, quant_type)
    reason = why_library(options, model)
    if options.kernel == "auto" and reason:
        trial.notes["kernel"] = f"bitsandbytes: {reason}"
    else:
        _fused_kernels.take_over(model, trial, options.kernel)


def why_library(options: FourBitOptions, model: PreTrainedModel) -> str | None:
    """Why ``kernel=auto`` leaves the product to bitsandbytes whatever the machine is."""
    if options.double_quant:
        return "double_quant saves memory that the fused kernel's plain scales would take again"
    if options.compute_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        return f"compute_dtype is {options.compute_dtype}, and the fused kernel multiplies in the model's own"
    return None


def four_bit(module: nn.Module, options: FourBitOptions, quant_type: str) -> nn.Module | str:
    """The layer as bitsandbytes' ``Linear4bit``, or why it has to stay."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = _packed.linear(module)
    width = linear.in_features
    if linear.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"{quant_type}: weights of {linear.weight.dtype} cannot be read; set load.dtype to float32, bfloat16 or float16")
    if width % 2:
        return f"odd input width {width}: two weights share a byte"
    blocksize = fitting_blocksize(width, options.blocksize)
    dtype = linear.weight.dtype if options.compute_dtype == "auto" else getattr(torch, options.compute_dtype)
    with torch.device("meta"):
        packed = Linear4bit(width, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype, quant_type=quant_type)
    weight: Any = Params4bit(
        linear.weight.detach(),
        quant_type=quant_type,
        blocksize=blocksize,
        compress_statistics=options.double_quant,
        module=packed,
    )
    packed.weight = weight.to(linear.weight.device)  # quantizes
    if linear.bias is not None:
        # The forward pass would cast it, in place, under the feet of torch.compile.
        packed.bias = torch.nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    packed.train(module.training)
    packed.source_cls = linear.source_cls  # type: ignore[assignment]
    # The AVX512-BF16 path repacks the weights in the first forward pass: that fails on narrow layers, computes in bfloat16 whatever the
    # compute dtype, and breaks torch.compile.
    packed.support_avx512bf16_for_cpu = False
    if width % blocksize and not reads_back(packed):
        return f"input width {width} is a multiple of no block size, and bitsandbytes' kernel here misplaces the scales of such layers"
    return packed


def fitting_blocksize(width: int, wanted: int) -> int:
    """The largest block size up to ``wanted`` that divides the width, or ``wanted`` where none does.

    Blocks run through the flattened weight. Where they straddle rows, the fused CUDA kernel is not used, and the AVX512 kernel takes
    scales of the wrong block (``width // blocksize`` scales a row).
    """
    return next((size for size in BLOCK_SIZES if size <= wanted and width % size == 0), wanted)


def reads_back(layer: Any) -> bool:
    """Whether bitsandbytes expands the layer's weight to what its codes and scales say."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    expanded = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return bool(torch.allclose(expanded, expand(layer.weight), rtol=2e-2, atol=1e-6))


def expand(weight: Any) -> torch.Tensor:
    """The float32 weight (out × in) by the definition: code value times scale of its block. High nibble first."""
    import torch
    from bitsandbytes.functional import dequantize_blockwise

    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = weight.data.view(torch.uint8).reshape(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[: state.shape.numel()].long()
    scales = absmax.float().repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code.float()[codes] * scales).reshape(state.shape)


def register(model: PreTrainedModel, options: FourBitOptions, quant_type: str) -> None:
    """Attach what ``from_pretrained`` attaches to a 4-bit model, so that saving, loading, peft and ``generate`` know what it is."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    layers = dict(four_bit_layers(model))
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=next(iter(layers.values())).compute_dtype,
        llm_int8_skip_modules=skip_list(list(_packed.plain_linears(model)), list(layers)),
    )
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    _packed.attach(model, quantizer)


def skip_list(plain: list[str], packed: list[str]) -> list[str]:
    """The plain layers' names as transformers reads them: as prefixes, suffixes and patterns.

    A name that would catch a quantized layer too (``fc`` and ``fc2``) is anchored.
    """
    import re

    from transformers.quantizers.quantizers_utils import should_convert_module

    return [name if all(should_convert_module(other, [name]) for other in packed) else re.escape(name) + "$" for name in plain]


def four_bit_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.nn import Linear4bit

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))


def facts(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    """What ``prove_effect`` answers; on a model without 4-bit layers it counts none."""
    layers = dict(four_bit_layers(model))
    packed: dict[str, tuple[Any, int]] = {name: (layer, full_bytes(layer)) for name, layer in layers.items()}
    packed |= {name: (layer, _fused_kernels.full_bytes(layer, model)) for name, layer in _fused_kernels.layers(model).items()}
    result = _packed.packed_facts(model, packed, trial.notes.get("left", {}))
    if packed:
        _fused_kernels.add_facts(result, model, trial, "bitsandbytes")
    if layers:
        states = [layer.weight.quant_state for layer in layers.values()]
        result["format"] = sorted({state.quant_type for state in states})
        result["blocksizes"] = {str(size): sum(s.blocksize == size for s in states) for size in sorted({s.blocksize for s in states})}
        straddling = sum(layer.in_features % layer.weight.quant_state.blocksize != 0 for layer in layers.values())
        if straddling:
            result["layers_with_straddling_blocks"] = straddling
        result["double_quant"] = any(state.nested for state in states)
        result["compute_dtype"] = sorted({str(layer.compute_dtype).removeprefix("torch.") for layer in layers.values()})
    return result


def full_bytes(layer: Any) -> int:
    """Bytes of the layer's parameters before it was quantized."""
    state = layer.weight.quant_state
    count = state.shape.numel() + (layer.bias.numel() if layer.bias is not None else 0)
    return count * state.dtype.itemsize
