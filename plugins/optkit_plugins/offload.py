"""Offload: the last decoder layers (and, if asked, the KV cache) live where memory is cheap and visit the device for their own forward.

On a GPU they live in pinned host memory; on a CPU in files that the system maps into memory and may drop again. Each layer's weights are
copied before its forward and dropped after it, so the outputs are the same to the bit (FlexGen, Sheng et al. 2023, arXiv:2303.06865, tells
how far such a design can go). Price: speed, a lot of it: every step waits for the offloaded bytes to cross the bus once, however small the
batch. The last resort against out-of-memory: quantize first, take a smaller batch first. Not where the model fits.

The hooks are our own, because accelerate's turn offloaded weights into meta tensors: the model could not be saved or looked at any more,
and tensors of quantizing libraries do not survive it. Here every parameter stays a readable tensor at all times.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from optkit import Claims, Machine, Options, Setting, Technique, UsageError, hookimpl
from optkit.modules import plain_tensors, stored_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from optkit import TrialContext

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

    options = trial.options
    assert isinstance(options, OffloadOptions)
    layers = decoder_layers(model)
    count = layers_that_do_not_fit(model, layers, trial.device) if options.layers == "auto" else options.layers
    if count > len(layers):
        raise UsageError(f"offload.layers is {count}, and this model has {len(layers)}; set it to {len(layers)} or fewer")
    away = layers[len(layers) - count :]
    place(model, away, torch.device(trial.device))
    offloaded = [Offloaded(layer, trial.device, trial.folder / f"layer-{at}") for at, layer in enumerate(away)]
    trial.notes["offloaded"] = {"layers": len(layers), "away": offloaded, "auto": options.layers == "auto"}


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
    """How many of the last layers must stay away so that the others, and one visiting layer, fit."""
    import psutil
    import torch

    total = stored_bytes(model)
    if device == "cpu":
        room = FILL * (psutil.virtual_memory().available + total)  # the model is already in this memory
    else:
        here = sum(parameter.nbytes for parameter in model.parameters() if parameter.device.type == device)
        room = FILL * (torch.cuda.mem_get_info()[0] + here)
    sizes = [stored_bytes(layer) for layer in layers]
    for count in range(len(layers) + 1):
        visiting = max(sizes[len(layers) - count :], default=0)
        if total - sum(sizes[len(layers) - count :]) + visiting <= room:
            return count
    return len(layers)


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
    for name, parameter in module.named_parameters(recurse=False):
        set_tensor(module, name, parameter.data.to(device))
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)


class Offloaded:
    """One layer away from the device, with the hooks that bring it in and send it out.

    :ivar visits: forwards so far. :ivar nbytes: of its weights at home.
    """

    def __init__(self, layer: nn.Module, device: str, file: Path):
        self.device = device
        self.visits = 0
        self.nbytes = 0
        self._home: list[tuple[nn.Module, str, torch.Tensor]] = []
        self._states = [parameter.quant_state for parameter in layer.parameters() if hasattr(parameter, "quant_state")]
        for part_name, part in layer.named_modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                home = rebuilt(parameter.data, self._keeper(f"{file}.{part_name}.{name}"))
                self.nbytes += sum(plain.nbytes for plain in plain_tensors(home))
                self._home.append((part, name, home))
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(device)  # small, and read by Python: they stay
        self._send_out()
        layer.register_forward_pre_hook(self._bring_in)
        layer.register_forward_hook(self._send_out, always_call=True)

    def _keeper(self, file: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """What takes a plain tensor home."""
        if self.device == "cpu":
            at = iter(range(100))
            return lambda tensor: mapped(tensor, Path(f"{file}.{next(at)}"))
        return lambda tensor: tensor.cpu().pin_memory()

    def _bring_in(self, *_: Any) -> None:
        import torch

        self.visits += 1
        with torch.inference_mode(False), torch.no_grad():  # a parameter cannot be made of a tensor of inference mode
            for module, name, home in self._home:
                set_tensor(module, name, rebuilt(home, lambda plain: plain.to(self.device, non_blocking=True, copy=True)))
        for state in self._states:
            state.to(self.device)

    def _send_out(self, *_: Any) -> None:
        import torch

        with torch.inference_mode(False), torch.no_grad():
            for module, name, home in self._home:
                set_tensor(module, name, home)
        for state in self._states:
            state.to("cpu")


def mapped(tensor: torch.Tensor, file: Path) -> torch.Tensor:
    """The tensor in a file that is mapped into memory."""
    import torch

    flat = tensor.detach().contiguous().flatten()
    if not flat.numel():
        return tensor
    data = torch.from_file(str(file), shared=True, size=flat.nbytes, dtype=torch.uint8)
    data.copy_(flat.view(torch.uint8))
    return data.view(tensor.dtype).view(tensor.shape)


def rebuilt(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``change`` applied to a plain tensor, or to the tensors inside a wrapper of a quantizing library."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return change(tensor)
    names, context = tensor.__tensor_flatten__()  # type: ignore[operator]
    inner = {name: rebuilt(getattr(tensor, name), change) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give the parameter ``name`` this data: the same object where it is a plain tensor, since libraries hang their state on it."""
    from torch import nn

    parameter: Any = module._parameters[name]
    if hasattr(tensor, "__tensor_flatten__"):
        module._parameters[name] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    else:
        parameter.data = tensor


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    """Bytes on the device and elsewhere, and whether the offloaded layers really came and went."""
    notes = trial.notes.get("offloaded", {"layers": 0, "away": [], "auto": False})
    away: list[Offloaded] = notes["away"]
    elsewhere = sum(one.nbytes for one in away)
    # Buffers of the model in other dtypes are few; what is not elsewhere is on the device.
    facts: dict[str, Any] = {"layers_away": len(away), "bytes_elsewhere": elsewhere, "bytes_on_device": stored_bytes(model) - elsewhere}
    if not away:
        why = "everything fits the device" if notes["auto"] else "nothing is offloaded"
        return facts | {"summary": f"{why} ({facts['bytes_on_device'] / 1e6:.1f} MB)"}
    where = "disk" if trial.device == "cpu" else "host memory"
    facts |= {"where": where, "visited": all(one.visits for one in away), "dtype": str(model.dtype).removeprefix("torch.")}
    state = "" if facts["visited"] else ", not one forward yet"
    facts["summary"] = (
        f"{len(away)} of {notes['layers']} layers {'on' if where == 'disk' else 'in'} {where}: {elsewhere / 1e6:.1f} MB there, "
        f"{facts['bytes_on_device'] / 1e6:.1f} MB on the device{state}"
    )
    return facts
