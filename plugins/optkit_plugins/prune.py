"""Prune: weights or whole MLP channels that matter least are taken out.

  structured  MLP channels, the same number in every layer (``intermediate_size`` shrinks): fewer parameters, smaller and faster everywhere
  magnitude   the smallest weights of each layer become zero (Han et al. 2015, arXiv:1506.02626)
  wanda       the same, each weight weighed by the inputs that it meets (Sun et al. 2023, arXiv:2306.11695); needs calibration text

Zeros bring no speed and no memory by themselves: dense kernels multiply them like any number. They are for measuring what a sparse format
would cost, or for training with a mask afterwards. Price: quality, the more the larger the share, unless the model is trained again. Not
for a model that is to answer exactly as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optkit import Claims, Options, Technique, UsageError, hookimpl
from optkit.modules import linears

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from optkit import TrialContext


class PruneOptions(Options):
    method: Literal["structured", "magnitude", "wanda"] = Field(
        "structured", description="take out MLP channels, zero the smallest weights, or zero by weight and input"
    )
    share: float = Field(0.2, gt=0, lt=1, description="share of the channels, or of each layer's weights, that goes")
    multiple: int = Field(64, ge=1, description="the new MLP width is a multiple of this (kernels like 64; narrow models need 8)")
    calibration_tokens: int = Field(4096, ge=0, description="tokens of calibration text that weigh the inputs; 0 goes by weights alone")


technique = Technique(
    name="prune",
    stage="architecture",
    summary="take out the least important MLP channels, or zero single weights: costs quality, and zeros alone bring no speed",
    adds=frozenset({"weights-changed"}),
    forbids=frozenset({"weights-quantized"}),
    calibrates=True,
    lossy=True,
    options=PruneOptions,
    paper="https://arxiv.org/abs/2306.11695",
    tested_on=("cpu", "NVIDIA H200"),
)

#: (first layers, whose outputs are the channels; last layer) of the MLPs of transformers' models, fused gate and up among them.
LAYOUTS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
#: Names of the MLP width in configs.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


@hookimpl
def configure(options: PruneOptions) -> Claims:
    if options.method == "structured":
        return Claims(adds=frozenset({"architecture-changed"}))
    return Claims(notes=("zeros bring no speed by themselves: dense kernels multiply them like any other number",))


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    options = trial.options
    assert isinstance(options, PruneOptions)
    before = sum(parameter.numel() for parameter in model.parameters())
    facts = take_channels(model, trial) if options.method == "structured" else zero_weights(model, trial)
    after = sum(parameter.numel() for parameter in model.parameters())
    trial.notes["pruned"] = facts | {"parameters_before": before, "parameters": after, "zero_share": zero_share(model)}


# ------------------------------------------------------------ single weights


def zero_weights(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    """Set the least important ``share`` of each linear layer to zero: of the whole layer by magnitude, of each output for wanda."""
    import torch

    options: Any = trial.options
    layers = dict(linears(model))
    if not layers:
        raise UsageError("prune found no plain linear layer in this model; a model that is already quantized cannot be pruned")
    sizes, tokens = input_sizes(model, layers, trial) if options.method == "wanda" else ({}, 0)
    if options.method == "wanda" and not tokens:
        raise UsageError("prune: wanda needs calibration text and none was given; set prune.method to magnitude, or give samples")
    with torch.no_grad():
        for name, module in layers.items():
            weight = by_outputs(module)
            if options.method == "wanda":
                importance = weight.abs().float() * sizes[name].sqrt().float()
                count = int(options.share * weight.shape[1])
                mask = torch.zeros_like(importance, dtype=torch.bool)
                mask.scatter_(1, importance.topk(count, dim=1, largest=False).indices, True)
                weight[mask] = 0
            else:
                # A copy in one row: kthvalue and masks of the transposed view would make several.
                threshold = weight.abs().flatten().kthvalue(max(1, int(options.share * weight.numel()))).values
                weight[weight.abs() <= threshold] = 0
    return {"method": options.method, "layers": len(layers), "calibration_tokens": tokens}


def by_outputs(module: nn.Module) -> torch.Tensor:
    """The weight as a view of shape (outputs, inputs); GPT-2's ``Conv1D`` stores it the other way round."""
    from torch import nn

    weight: Any = module.weight.data  # type: ignore[union-attr]
    return weight if isinstance(module, nn.Linear) else weight.t()


def zero_share(model: PreTrainedModel) -> float:
    """Zeros among the weights of the plain linear layers."""
    zeros = total = 0
    for _, module in linears(model):
        weight = by_outputs(module)
        zeros += weight.numel() - int(weight.count_nonzero())
        total += weight.numel()
    return round(zeros / total, 6) if total else 0.0


# ------------------------------------------------------------ channels


@dataclass
class Mlp:
    """One MLP. ``fused``: the first layer holds gate and up, one after the other."""

    name: str
    module: nn.Module
    first: list[nn.Module]
    last: nn.Module
    fused: bool

    @property
    def width(self) -> int:
        return int(by_outputs(self.last).shape[1])


def take_channels(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    """Keep the most important channels of every MLP, equally many everywhere, in their order."""
    import torch

    options: Any = trial.options
    config = model.config.get_text_config(decoder=True)
    found = mlps(model)
    width = found[0].width
    keep = max(1, round((1 - options.share) * width / options.multiple)) * options.multiple
    if keep >= width:
        raise UsageError(
            f"prune: a share of {options.share:g} leaves {(1 - options.share) * width:.0f} of {width} channels, and the nearest multiple "
            f"of {options.multiple} is {keep}; set prune.multiple to 8 or less, or a larger prune.share"
        )
    key = next(name for name in WIDTHS if hasattr(config, name))
    sizes, tokens = input_sizes(model, {mlp.name: mlp.last for mlp in found}, trial)
    with torch.no_grad():
        for mlp in found:
            kept = importance(mlp, sizes.get(mlp.name)).topk(keep).indices.sort().values
            for module in mlp.first:
                rows = torch.cat([kept, kept + width]) if mlp.fused else kept
                shrink(module, rows, dim=0)
            shrink(mlp.last, kept, dim=1)
            if hasattr(mlp.module, key):
                setattr(mlp.module, key, keep)
    setattr(config, key, keep)
    return {
        "method": "structured", "layers": len(found), "width_before": width, "width": keep,
        "importance": "activations" if tokens else "weights", "calibration_tokens": tokens,
    }  # fmt: skip


def mlps(model: PreTrainedModel) -> list[Mlp]:
    """Every MLP of the decoder. :raises UsageError: where the model is not of one width in every layer, with the reason."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for first, last in LAYOUTS:
            parts = [children.get(child) for child in (*first, last)]
            if all(type(part) in (nn.Linear, Conv1D) for part in parts):
                found.append(Mlp(name, module, parts[:-1], parts[-1], fused=first == ("gate_up_proj",)))  # type: ignore[arg-type]
    config = model.config.get_text_config(decoder=True)
    stated = next((getattr(config, key) for key in WIDTHS if getattr(config, key, None)), None)
    way_out = "set prune.method to magnitude, or leave prune out"
    if not found or len(found) != config.num_hidden_layers or any(parameter.dim() == 3 for parameter in model.parameters()):
        raise UsageError(
            f"prune: {type(model).__name__} does not have one plain MLP a layer (experts of a mixture are not handled); {way_out}"
        )
    if stated is None and not hasattr(config, "n_inner"):
        raise UsageError(
            f"prune: the config of {type(model).__name__} holds no MLP width, so a narrower model could not be loaded; {way_out}"
        )
    widths = {mlp.width for mlp in found}
    if len(widths) != 1 or stated not in (None, *widths):
        raise UsageError(f"prune: the MLPs have the widths {sorted(widths)}, and the config says {stated}; {way_out}")
    width = widths.pop()
    for mlp in found:
        theirs = {id(parameter) for part in (*mlp.first, mlp.last) for parameter in part.parameters()}
        for name, parameter in mlp.module.named_parameters():
            if id(parameter) not in theirs and width in parameter.shape and width != config.hidden_size:
                raise UsageError(f"prune: {mlp.name}.{name} has a value a channel, and what it does to the others is not known; {way_out}")
    return found


def importance(mlp: Mlp, sizes: torch.Tensor | None) -> torch.Tensor:
    """(channels,): norm of the channel's output column, times its mean activation, or times the norms of its input rows."""
    column = by_outputs(mlp.last).double().norm(dim=0)
    if sizes is not None:
        return column * sizes.sqrt()
    for module in mlp.first:
        norms = by_outputs(module).double().norm(dim=1)
        column = column * (norms.unflatten(0, (2, -1)).prod(0) if mlp.fused else norms)
    return column


def shrink(module: Any, kept: torch.Tensor, dim: int) -> None:
    """Keep the outputs (``dim`` 0) or inputs (``dim`` 1) ``kept`` of a linear layer or ``Conv1D``."""
    from torch import nn

    plain = isinstance(module, nn.Linear)
    old = module.weight
    module.weight = nn.Parameter(old.data.index_select(dim if plain else 1 - dim, kept).contiguous(), requires_grad=old.requires_grad)
    if dim == 0 and module.bias is not None:
        module.bias = nn.Parameter(module.bias.data[kept].contiguous(), requires_grad=module.bias.requires_grad)
    setattr(module, ("out_features", "in_features")[dim] if plain else ("nf", "nx")[dim], len(kept))


# ------------------------------------------------------------ calibration and proof


def input_sizes(model: PreTrainedModel, layers: dict[str, nn.Module], trial: TrialContext) -> tuple[dict[str, torch.Tensor], int]:
    """Name -> mean square of each input of the layer on calibration text, and the tokens used; empty without any."""
    import torch

    limit, texts, tokens = trial.options.calibration_tokens, [], 0  # type: ignore[attr-defined]
    for text in trial.calibration:
        text = text[: limit - tokens]
        texts += [text] if text else []
        tokens += len(text)
    sums: dict[str, torch.Tensor] = {}

    def adder(name: str) -> Any:
        def add(_: Any, arguments: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + arguments[0].detach().flatten(0, -2).double().square().sum(0)

        return add

    hooks = [module.register_forward_pre_hook(adder(name)) for name, module in layers.items()]
    try:
        with torch.no_grad():
            for text in texts:
                model(input_ids=torch.tensor([text], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / tokens for name, total in sums.items()}, tokens


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    facts = trial.notes.get("pruned")
    if facts is None:
        parameters, zeros = sum(parameter.numel() for parameter in model.parameters()), zero_share(model)
        return {"parameters": parameters, "zero_share": zeros, "summary": f"{parameters:,} parameters, {zeros:.1%} zeros"}
    if facts["method"] == "structured":
        summary = (
            f"MLP width {facts['width_before']} → {facts['width']}, {facts['parameters_before']:,} → {facts['parameters']:,} parameters"
        )
    else:
        summary = f"{facts['zero_share']:.1%} zeros in {facts['layers']} layers, {facts['parameters']:,} parameters as before"
    return facts | {"summary": summary}
