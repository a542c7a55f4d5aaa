"""What techniques share whose packed layers optkit's own kernels can multiply with: when they do, and what the proof says of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import Machine, TrialContext

Kernel = Literal["auto", "library", "triton"]
DESCRIPTION = (
    "who multiplies: the library, or optkit's fused kernel on CUDA from sm_80 (triton); auto is the fused kernel where it generates"
)
#: Tensor cores with bfloat16, and asynchronous copies.
FIRST_CAPABILITY = (8, 0)


def problem(kernel: Kernel, task: str, machine: Machine) -> str | None:
    """Why the fused kernel cannot be had although it was asked for, with the way out."""
    if kernel != "triton":
        return None
    if not has_tensor_cores(machine):
        return "kernel=triton needs a CUDA GPU from sm_80 on; use kernel=library here"
    return "the fused kernel has no backward pass; use kernel=library for training" if task == "train" else None


def wanted(kernel: Kernel, task: str, machine: Machine | None) -> bool:
    """Whether layers go to the fused kernel. Scoring and training are bound by arithmetic, and stay with the library."""
    return kernel == "triton" or (kernel == "auto" and task == "generate" and machine is not None and has_tensor_cores(machine))


def has_tensor_cores(machine: Machine) -> bool:
    return machine.device == "cuda" and (machine.compute_capability or (0, 0)) >= FIRST_CAPABILITY


def take_over(
    model: PreTrainedModel, trial: TrialContext, kernel: Kernel, move: Callable[[PreTrainedModel], dict[str, str]] | None = None
) -> None:
    """Move the model's packed layers to the fused kernel where it is wanted and pays, and note what stays and why.

    :param move: moves the layers and answers name -> why a layer stays; by default those of bitsandbytes and torchao are moved.
    """
    if not wanted(kernel, trial.task, trial.machine):
        return
    from optkit_plugins.kernels.packed.convert import use_fused_kernels

    if kernel == "auto":
        from optkit_plugins.kernels.packed.linear import why_slow

        slow = why_slow(model.dtype)
        if slow:
            trial.notes["kernel"] = f"the library's own: {slow}"
            return
    trial.notes["stay"] = (move or use_fused_kernels)(model)
    if layers(model):
        model.save_pretrained = partial(_save, model)  # type: ignore[method-assign]


def layers(model: PreTrainedModel) -> dict[str, Any]:
    """Name -> layer whose weight was moved to the fused kernel. Nothing is imported for it."""
    kernels = sys.modules.get("optkit_plugins.kernels.packed.linear")
    return {} if kernels is None else {name: m for name, m in model.named_modules() if isinstance(m, kernels.WeightOnlyLinear)}


def full_bytes(layer: Any, model: PreTrainedModel) -> int:
    """Bytes of the layer's parameters before it was quantized."""
    bias = layer.bias.numel() if layer.bias is not None else 0
    return int((layer.in_features * layer.out_features + bias) * model.dtype.itemsize)


def add_facts(facts: dict[str, Any], model: PreTrainedModel, trial: TrialContext, library: str) -> None:
    """Which kernel multiplies, layers that stay with the library and why, and how often the fused one ran in the profiled batch.

    :param library: its name, for models without a fused layer.
    """
    fused = layers(model)
    facts["kernel"] = trial.notes.get("kernel", library)
    if fused:
        facts["kernel"] = f"optkit's fused kernel in {len(fused)} layers"
        facts["fused_formats"] = sorted({f"{layer.format}, group {layer.group}" for layer in fused.values()})
        facts["summary"] += f"; {facts['kernel']}"
        calls = sum(count for name, count in trial.kernels.items() if "weight_only_product" in name)
        if calls:
            facts["fused_kernel_calls"] = calls
    if trial.notes.get("stay"):
        facts["layers_left_with_the_library"] = trial.notes["stay"]


def give_back(model: PreTrainedModel) -> None:
    """Put every layer back into its library's form, codes and scales unchanged: that is what is saved."""
    vars(model).pop("save_pretrained", None)
    kernels = sys.modules.get("optkit_plugins.kernels.packed.convert")
    if kernels is not None:
        kernels.give_back(model)


def _save(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
    """``model.save_pretrained`` while layers are the fused kernel's, whose order of the weights nobody else reads."""
    give_back(model)
    return model.save_pretrained(*args, **options)
