"""INT8: linear weights as 8-bit integers with one scale a row, through torchao (LLM.int8 idea without outliers; Dettmers et al. 2022).

``weight-only`` stores the weights in 8 bits and multiplies in the model's own dtype: a quarter of float32's bytes, half of bfloat16's,
hardly any loss, and faster where reading weights is what costs (decoding few sequences at a time). ``dynamic`` also rounds the
activations to 8 bits, one scale a token, and multiplies integers: it pays for long prompts and large batches on hardware with integer
units, costs more quality, and is slow for single tokens unless it is compiled. Not for models that have room and are not bound by
reading weights.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from optkit import Claims, Options, Technique, UsageError, hookimpl
from optkit_plugins import _fused_kernels, _packed

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
        register(model, config)
    if options.mode == "weight-only" and options.group is None:
        _fused_kernels.take_over(model, trial, options.kernel)


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    layers = dict(int8_layers(model))
    packed = {name: (layer, sum(p.numel() * p.dtype.itemsize for p in layer.parameters())) for name, layer in layers.items()}
    fused = _fused_kernels.layers(model)
    packed |= {name: (layer, _fused_kernels.full_bytes(layer, model)) for name, layer in fused.items()}
    facts = _packed.packed_facts(model, packed, trial.notes.get("left", {}))
    if packed:
        _fused_kernels.add_facts(facts, model, trial, "torchao")
    if fused:
        facts["mode"] = "weight-only"
    if layers:
        rounded = [layer.weight.act_quant_kwargs is not None for layer in layers.values()]
        facts["mode"] = "dynamic" if all(rounded) else "weight-only"
    if packed:
        facts["scales"] = sum(layer.weight.scale.numel() for layer in layers.values()) + sum(layer.out_features for layer in fused.values())
    return facts


@hookimpl
def save_model(model: PreTrainedModel) -> bool | None:
    """Refuse what could not be read back; everything else goes transformers' own way (safetensors with torchao's metadata)."""
    _fused_kernels.give_back(model)
    if _packed.was_conv1d(layer for _, layer in int8_layers(model)):
        raise UsageError(
            f"int8: {type(model).__name__} is built of Conv1D layers, into which transformers cannot load torchao's weights; "
            "export it without int8"
        )
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torchao's two messages at import that mean nothing here.

    It tries to load all of its CUDA libraries, and names each that does not load. Under torch 2.13 its enums are registered twice.
    """

    def drop(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (text.startswith("Failed to load") or "is an Enum subclass" in text)

    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    for logger in loggers:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)


def load_torchao() -> None:
    with _quiet():
        import torchao.quantization  # noqa: F401
    # torchao 0.17 builds its own deprecated layout when it makes a config.
    warnings.filterwarnings("ignore", message="Deprecation: PlainLayout is deprecated", category=UserWarning)
    # Told once by the compiler of each kind of tensor: the hash that it takes instead is right, and slower.
    warnings.filterwarnings("ignore", message="Int8Tensor does not implement _stable_hash_for_caching", category=UserWarning)


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


def register(model: PreTrainedModel, config: Any) -> None:
    """Attach what ``from_pretrained`` attaches to a torchao model, so that saving and loading work."""
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    wrapped = TorchAoConfig(config, modules_to_not_convert=list(_packed.plain_linears(model)))
    quantizer = AutoHfQuantizer.from_config(wrapped, pre_quantized=True)
    _packed.attach(model, quantizer)
    if _packed.was_conv1d(layer for _, layer in int8_layers(model)):
        quantizer.is_serializable = lambda: False  # save_pretrained refuses, instead of writing a folder that nothing reads


def int8_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Linear layers whose weight is torchao's ``Int8Tensor``."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight.data).__name__ == "Int8Tensor":
            yield name, module
