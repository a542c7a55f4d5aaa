"""precision: the dtype that this hardware computes fastest in, with the reason.

Half the bytes of float32 a weight, and tensor cores or AMX where the device has them. bfloat16 keeps float32's range and loses digits,
float16 keeps digits and overflows above 65504. Outputs differ by rounding, now and then in a token. Not where the hardware has no such
units (an old CPU converts every number and gets slower), nor where exact agreement with float32 matters.

A Study of BFLOAT16 for Deep Learning Training (Kalamkar et al. 2019).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optkit import Claims, Machine, Options, Setting, Technique, TrialContext, hookimpl

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from optkit.technique import Task

#: CPU features that multiply bfloat16 without converting it first.
BF16_CPU = ("amx_bf16", "avx512_bf16", "bf16")


class PrecisionOptions(Options):
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="dtype of the weights; auto is by hardware")
    tf32: bool = Field(False, description="let float32 matrix products use TF32 (10 bits of mantissa) on a GPU")


technique = Technique(
    name="precision",
    stage="load",
    summary="weights in bfloat16 or float16 by hardware; half the bytes, outputs differ by rounding",
    lossy=True,
    options=PrecisionOptions,
    paper="https://arxiv.org/abs/1905.12322",
    tested_on=("cpu", "NVIDIA H200"),
)


@hookimpl
def configure(options: PrecisionOptions, task: Task, machine: Machine) -> Claims:
    dtype, because = choose(machine) if options.dtype == "auto" else (options.dtype, "asked for with precision.dtype")
    return Claims(
        settings=(Setting(name="load.dtype", value=dtype, because=because, strength="must"),),
        problem=what_is_missing(dtype, options.tf32, machine),
    )


def choose(machine: Machine) -> tuple[str, str]:
    """The dtype for this machine, and why."""
    if machine.device == "cuda":
        capability = machine.compute_capability or (0, 0)
        shown = f"{machine.name} has compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return "bfloat16", f"{shown}: tensor cores for bfloat16"
        if capability >= (7, 0):
            return "float16", f"{shown}: tensor cores for float16, none for bfloat16"
        return "float32", f"{shown}: no tensor cores, half precision gains nothing"
    feature = next((name for name in BF16_CPU if name in machine.cpu_features), None)
    if feature:
        return "bfloat16", f"this CPU has {feature}"
    return "float32", "this CPU has neither avx512_bf16 nor amx_bf16, so bfloat16 would be converted number by number"


def what_is_missing(dtype: str, tf32: bool, machine: Machine) -> str | None:
    """Why this cannot run here, with the way out."""
    modern = machine.device == "cuda" and (machine.compute_capability or (0, 0)) >= (8, 0)
    if tf32 and not modern:
        return f"TF32 needs a GPU of compute capability 8.0, and this run computes on {machine.name}; set precision.tf32=false"
    if dtype == "bfloat16" and machine.device == "cuda" and not modern:
        return f"bfloat16 needs compute capability 8.0, and {machine.name} emulates it slowly; set precision.dtype=float16"
    return None


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    """Convert a model that was loaded by somebody else; one that the loader read in this dtype stays as it is."""
    import torch

    options = trial.options
    assert isinstance(options, PrecisionOptions)
    if trial.dtype is not None and model.dtype != trial.dtype:
        model.to(trial.dtype)
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    trial.notes["bytes"] = bytes_by_dtype(model)  # now: techniques that quantize come later


def bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """dtype -> bytes of the parameters that are stored in it."""
    from optkit.modules import plain_tensors

    found: dict[str, int] = {}
    for parameter in model.parameters():
        for plain in plain_tensors(parameter.data):
            name = str(plain.dtype).removeprefix("torch.")
            found[name] = found.get(name, 0) + plain.numel() * plain.element_size()
    return found


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    import torch

    found = trial.notes.get("bytes") or bytes_by_dtype(model)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    parts = [f"{count / 1e6:.1f} MB {name}" for name, count in sorted(found.items())]
    return {"bytes": found, "tf32": tf32, "summary": ", ".join(parts + (["TF32"] if tf32 else []))}
