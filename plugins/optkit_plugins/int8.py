"""INT8: linear weights as 8-bit integers with one scale a row, through torchao (LLM.int8 idea without outliers; Dettmers et al. 2022).

``weight-only`` stores the weights in 8 bits and multiplies in the model's own dtype: a quarter of float32's bytes, half of bfloat16's,
hardly any loss, and faster where reading weights is what costs (decoding few sequences at a time). ``dynamic`` also rounds the
activations to 8 bits, one scale a token, and multiplies integers: it pays for long prompts and large batches on hardware with integer
units, costs more quality, and is slow for single tokens unless it is compiled. Not for models that have room and are not bound by
reading weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from optkit import Claims, Options, Technique, hookimpl
from optkit_plugins import _fused_kernels, _packed, _torchao
from optkit_plugins._torchao import load_torchao

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from optkit import Machine, TrialContext


class Int8Options(Options):
    mode: Literal["weight-only", "dynamic"] = Field(
        "weight-only", description="weight-only multiplies in the model's dtype; dynamic rounds activations too and multiplies integers"
    )
    group: int | None = Field(None, ge=8, description="weights that share one scale (weight-only); default a whole row, which is faster")
    min_parameters: int = Field(1000, ge=0, description="leave smaller layers alone")
    head: bool = Field(False, description="quantize the output head as well; a head tied to the embedding never is")
    kernel: _fused_kernels.Kernel = Field("auto", description=_fused_kernels.DESCRIPTION)
    skip: tuple[str, ...] = Field((), description="name patterns of layers to leave alone, such as *.layers.0.*")

    @model_validator(mode="after")
    def _options_go_together(self) -> Int8Options:
        if self.group is not None and self.mode == "dynamic":
            raise ValueError("group goes with mode=weight-only: dynamic has one scale a row")
        if self.kernel == "triton" and (self.mode == "dynamic" or self.group is not None):
            raise ValueError("kernel=triton goes with mode=weight-only and one scale a row: leave out mode and group, or the kernel")
        return self


technique = Technique(
    name="int8",
    stage="quantize",
    summary="8-bit integer linear weights: a quarter of float32's bytes at hardly any loss, faster where reading weights is what costs",
    roles=frozenset({"weights"}),
    adds=frozenset({"weights-quantized", "weights-opaque"}),
    lossy=True,
    requires=("torchao>=0.17",),
    extra="int8",
    preload=("torchao.quantization",),
    options=Int8Options,
    paper="https://arxiv.org/abs/2208.07339",
    tested_on=("cpu", "NVIDIA H200"),
    exceptions={"saves[gpt2]": "transformers loads torchao's weights into linear layers alone, and GPT-2 has Conv1D; export refuses"},
)


@hookimpl
def configure(options: Int8Options, task: str, machine: Machine) -> Claims:
    """Frozen integer weights do not learn: training needs an adapter beside them."""
    problem = _fused_kernels.problem(options.kernel, task, machine)
    if problem:
        return Claims(problem=problem)
    needs = frozenset({"adapter"}) if task == "train" else frozenset()
    return Claims(needs=needs, weight_bits=8 + 32 / options.group if options.group else 8)


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    options = trial.options
    assert isinstance(options, Int8Options)
    _packed.refuse_quantized(model, "int8")
    load_torchao()
    config = torchao_config(options, trial.device)
    names = _packed.chosen(model, min_parameters=options.min_parameters, head=options.head, skip=options.skip)
    trial.notes["left"] = _packed.convert(model, names, lambda module: int8_linear(module, config, options.group))
    if any(True for _ in int8_layers(model)):
        _torchao.register(model, config, "Int8Tensor")
    if options.mode == "weight-only" and options.group is None:
        _fused_kernels.take_over(model, trial, options.kernel)


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    facts = _torchao.facts(model, trial, "Int8Tensor")
    if _fused_kernels.layers(model):
        facts["mode"] = "weight-only"
    layers = dict(int8_layers(model))
    if layers:
        rounded = [layer.weight.act_quant_kwargs is not None for layer in layers.values()]
        facts["mode"] = "dynamic" if all(rounded) else "weight-only"
    return facts


@hookimpl
def save_model(model: PreTrainedModel) -> None:
    """transformers writes int8 models, but of GPT-2's ``Conv1D`` layers."""
    _torchao.refuse_conv1d(model, "Int8Tensor", "int8")


def torchao_config(options: Int8Options, device: str) -> Any:
    """torchao's config. ``set_inductor_config`` is off: it would change the compiler's settings for the whole process."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, PerGroup, PerRow

    if options.mode == "weight-only":
        granularity = PerRow() if options.group is None else PerGroup(options.group)
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False, version=2)
    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, version=2, **_range(device))


def _range(device: str) -> dict[str, bool]:
    """Seven bits instead of eight on CPUs without VNNI, whose 16-bit sums would overflow (torchao has the option since 0.18)."""
    import torchao.utils

    should_reduce = getattr(torchao.utils, "should_reduce_range", None)
    if should_reduce is None:
        return {}
    import torch

    return {"reduce_range": should_reduce(torch.device(device))}


def int8_linear(module: nn.Module, config: Any, group: int | None) -> nn.Module | str:
    """The layer with an int8 weight, or why it stays as it is."""
    from torchao.quantization import quantize_

    linear = _packed.linear(module)
    if group is not None and linear.in_features % group:
        return f"input width {linear.in_features} is not divided by the group of {group}"
    quantize_(linear, config, filter_fn=None)
    vars(linear).pop("extra_repr", None)  # torchao's is bound to a partial, which no other process can be sent
    if linear.bias is not None:
        linear.bias.requires_grad_(False)
    return linear


def int8_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Linear layers whose weight is torchao's ``Int8Tensor``."""
    return _torchao.layers(model, "Int8Tensor")
