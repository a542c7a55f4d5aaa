"""Offload: the last decoder layers (and, if asked, the KV cache) live where memory is cheap and visit the device for their own forward.

On a GPU they live in pinned host memory; on a CPU in files that the system maps into memory and may drop again. While one layer computes,
the next one's weights are copied on a second stream into one of two buffers (``kernels.memory.prefetch``), so the outputs are the same to the bit
and the bus is never idle (FlexGen, Sheng et al. 2023, arXiv:2303.06865, tells how far such a design can go). Price: speed, a lot of it:
every step waits for the offloaded bytes to cross the bus once, however small the batch. The last resort against out-of-memory: quantize
first, take a smaller batch first. Not where the model fits.

The hooks are our own, because accelerate's do not prefetch, and turn offloaded weights into meta tensors: the model could not be saved or
looked at any more, and tensors of quantizing libraries do not survive it. Here every parameter stays a readable tensor at all times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from optkit import Claims, Machine, Options, Setting, Technique, UsageError, hookimpl
from optkit.modules import stored_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from optkit import TrialContext
    from optkit_plugins.kernels.memory.prefetch import Ring

#: Share of the free memory that weights may take; the rest is for activations and the KV cache.
FILL = 0.85


class OffloadOptions(Options):
    layers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="how many of the last decoder layers to offload; auto: as many as do not fit 85 % of the free memory"
    )
    kv: bool = Field(False, description="keep the KV cache in host memory, too (GPU only)")


technique = Technique(
    name="offload",
    stage="placement",
    summary="keep the last layers' weights in host memory (or on disk): the last resort against out-of-memory, slow",
    adds=frozenset({"weights-elsewhere", "python-in-forward"}),
    tasks=frozenset({"score", "generate"}),
    options=OffloadOptions,
    paper="https://arxiv.org/abs/2303.06865",
    tested_on=("cpu", "NVIDIA H200"),
    exceptions={"effect": "by default nothing moves while the whole model fits, as a tiny one does"},
)


@hookimpl
def configure(options: OffloadOptions, machine: Machine) -> Claims:
    if machine.device == "cpu":
        if options.kv:
            return Claims(problem="offload.kv keeps the KV cache out of a GPU's memory, and this machine has none; leave offload.kv out")
        return Claims(notes=("on a CPU, offloaded layers live in files of the trial's folder",))
    wishes = [Setting(name="load.device_map", value="cpu", because="the whole model need not fit the GPU: layers are placed afterwards")]
    if options.kv:
        wishes.append(Setting(name="generate.cache", value="offloaded", because="offload.kv", strength="must"))
    return Claims(settings=tuple(wishes))


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    import torch

    from optkit_plugins.kernels.memory.prefetch import Ring

    options = trial.options
    assert isinstance(options, OffloadOptions)
    layers = decoder_layers(model)
    count = layers_that_do_not_fit(model, layers, trial.device) if options.layers == "auto" else options.layers
    if count > len(layers):
        raise UsageError(f"offload.layers is {count}, and this model has {len(layers)}; set it to {len(layers)} or fewer")
    away = layers[len(layers) - count :]
    place(model, away, torch.device(trial.device))
    ring = Ring(away, torch.device(trial.device), trial.folder) if away else None
    trial.notes["offloaded"] = {"layers": len(layers), "ring": ring, "auto": options.layers == "auto"}


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks, first to last. :raises UsageError: for a model without a plain list of them."""
    from torch import nn

    number = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)
    raise UsageError(f"offload: {type(model).__name__} has no list of its {number} decoder layers; leave offload out for this model")


def layers_that_do_not_fit(model: PreTrainedModel, layers: list[nn.Module], device: str) -> int:
    """How many of the last layers must stay away so that the others, and two buffers for visitors, fit."""
    from optkit_plugins.kernels.memory.prefetch import travelling_bytes

    total, room = stored_bytes(model), FILL * memory_for_weights(model, device)
    sizes = [travelling_bytes(layer) for layer in layers]
    for count in range(len(layers) + 1):
        away = sizes[len(layers) - count :]
        if total - sum(away) + min(2, count) * max(away, default=0) <= room:
            return count
    return len(layers)


def memory_for_weights(model: PreTrainedModel, device: str) -> int:
    """Bytes of the device that are free, or would be without this model; torch's limit on this process counts."""
    import psutil
    import torch

    if device == "cpu":
        return psutil.virtual_memory().available + stored_bytes(model)  # the model is already in this memory
    here = sum(parameter.nbytes for parameter in model.parameters() if parameter.device.type == device)
    free, memory = torch.cuda.mem_get_info()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * memory) - torch.cuda.memory_allocated()
    return min(free, allowed) + here


def place(module: nn.Module, away: list[nn.Module], device: torch.device) -> None:
    """Move everything to ``device``, except the modules that stay away."""
    from torch import nn

    if any(module is one for one in away):
        return
    inside = {id(part) for part in module.modules()}
    if not any(id(one) in inside for one in away):
        # nn.Module's own: transformers' refuses quantized models, whose tensors move well.
        nn.Module.to(module, device)
        return
    for child in module.children():
        place(child, away, device)
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    """Bytes on the device and elsewhere, and whether the offloaded layers really came and went."""
    notes = trial.notes.get("offloaded", {"layers": 0, "ring": None, "auto": False})
    ring: Ring | None = notes["ring"]
    away = ring.layers if ring else []
    elsewhere = sum(layer.home.nbytes for layer in away)
    facts: dict[str, Any] = {"layers_away": len(away), "bytes_elsewhere": elsewhere, "bytes_on_device": stored_bytes(model) - elsewhere}
    if ring is None:
        why = "everything fits the device" if notes["auto"] else "nothing is offloaded"
        return facts | {"summary": f"{why} ({facts['bytes_on_device'] / 1e6:.1f} MB)"}
    where = "disk" if trial.device == "cpu" else "host memory"
    facts |= {"where": where, "visited": all(layer.visits for layer in away), "dtype": str(model.dtype).removeprefix("torch.")}
    facts["bytes_of_buffers"] = sum(slot.block.nbytes for slot in ring.slots)
    state = "" if facts["visited"] else ", not one forward yet"
    facts["summary"] = (
        f"{len(away)} of {notes['layers']} layers {'on' if where == 'disk' else 'in'} {where}: {elsewhere / 1e6:.1f} MB there, "
        f"{facts['bytes_on_device'] / 1e6:.1f} MB on the device and {facts['bytes_of_buffers'] / 1e6:.1f} MB of buffers{state}"
    )
    return facts
