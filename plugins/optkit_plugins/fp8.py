"""FP8: linear weights as 8-bit floats (e4m3) with one scale a row (Micikevicius et al. 2022, arXiv:2209.05433).

Half of bfloat16's bytes without calibration; activations keep their dtype. Where int8 spaces its 255 values evenly up to a row's largest
weight, a float's are dense around zero: the relative error of a small weight is that of a large one, at most 1/16, and a row with an
outlier keeps its other weights. On rows without outliers, int8 is the more exact of the two. Not for models that are bound by computing:
the tensor cores' fp8 products, which round activations as well, are not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from optkit import Claims, Options, Technique, UsageError, hookimpl
from optkit_plugins import _fused_kernels, _packed, _torchao

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from optkit import Machine, TrialContext


class Fp8Options(Options):
    min_parameters: int = Field(1000, ge=0, description="leave smaller layers alone")
    head: bool = Field(False, description="quantize the output head as well; a head tied to the embedding never is")
    kernel: _fused_kernels.Kernel = Field("auto", description=_fused_kernels.DESCRIPTION)
    skip: tuple[str, ...] = Field((), description="name patterns of layers to leave alone, such as *.layers.0.*")


technique = Technique(
    name="fp8",
    stage="quantize",
    summary="8-bit float linear weights: half of bfloat16's bytes at little loss, outliers or not; faster where reading weights is what costs",
    roles=frozenset({"weights"}),
    adds=frozenset({"weights-quantized", "weights-opaque"}),
    lossy=True,
    requires=("torchao>=0.17",),
    extra="int8",
    preload=("torchao.quantization",),
    options=Fp8Options,
    paper="https://arxiv.org/abs/2209.05433",
    tested_on=("cpu", "NVIDIA H200"),
    exceptions={"saves[gpt2]": "transformers loads torchao's weights into linear layers alone, and GPT-2 has Conv1D; export refuses"},
)


@hookimpl
def configure(options: Fp8Options, task: str, machine: Machine) -> Claims:
    """Frozen 8-bit weights do not learn: training needs an adapter beside them."""
    problem = _fused_kernels.problem(options.kernel, task, machine)
    if problem:
        return Claims(problem=problem)
    return Claims(needs=frozenset({"adapter"}) if task == "train" else frozenset(), weight_bits=8)


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    options = trial.options
    assert isinstance(options, Fp8Options)
    _packed.refuse_quantized(model, "fp8")
    _torchao.load_torchao()
    from torchao.quantization import Float8WeightOnlyConfig

    names = _packed.chosen(model, min_parameters=options.min_parameters, head=options.head, skip=options.skip)
    trial.notes["left"] = _packed.convert(model, names, fp8_linear)
    if any(True for _ in fp8_layers(model)):
        _torchao.register(model, Float8WeightOnlyConfig(set_inductor_config=False), "Float8Tensor")
    _fused_kernels.take_over(model, trial, options.kernel)


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    return _torchao.facts(model, trial, "Float8Tensor")


@hookimpl
def save_model(model: PreTrainedModel) -> None:
    """transformers writes fp8 models, but of GPT-2's ``Conv1D`` layers."""
    _torchao.refuse_conv1d(model, "Float8Tensor", "fp8")


def fp8_linear(module: nn.Module) -> nn.Module:
    """The layer with a float8 weight in torchao's form.

    Rounded here: torchao takes a row's scale in the weight's own dtype, of which float16 has too few bits for small weights, and makes NaN
    of a row of zeros.

    :raises UsageError: for weights that are no floats.
    """
    import torch
    from torch import nn
    from torchao.quantization import Float8Tensor

    from optkit_plugins.kernels.packed.formats import round_fp8

    linear = _packed.linear(module)
    weight = linear.weight.detach()
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"fp8: weights of {weight.dtype} cannot be read; set load.dtype to float32, bfloat16 or float16")
    codes, scale = round_fp8(weight)
    rounded = Float8Tensor(codes, scale, block_size=[1, linear.in_features], dtype=weight.dtype)
    linear.weight = nn.Parameter(rounded, requires_grad=False)
    if linear.bias is not None:
        linear.bias.requires_grad_(False)
    return linear


def fp8_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Linear layers whose weight is torchao's ``Float8Tensor``."""
    return _torchao.layers(model, "Float8Tensor")
