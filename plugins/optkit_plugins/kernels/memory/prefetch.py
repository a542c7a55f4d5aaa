"""Layers whose weights wait in host memory and are copied to the device ahead of time, on a stream of their own.

Two buffers on the device take turns: while a layer computes from one, the next layer's weights are copied into the other, and a layer
that is done leaves its buffer to the one after that. Each layer is one block of bytes at home (pinned memory for a GPU, a mapped file for
a CPU), so a visit is one copy, and the bus never waits for the host. Events keep the two streams in order; the loop allocates nothing.
On a CPU streams do nothing: the copies are made in order, and the same code runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optkit.modules import plain_tensors

#: Bytes to which tensors within a block are aligned: as torch's own allocator does for small ones, and kernels want 16 at least.
ALIGN = 256


class AwayLayer:
    """One layer's travelling tensors: parameters and saved buffers. Buffers that are not saved are small and read by Python: they stay.

    Quantization states that libraries hang on a parameter stay on the device, too: a few per cent of the weights, and read by Python.

    :ivar home: their bytes between visits. :ivar visits: forwards so far.
    """

    def __init__(self, layer: nn.Module, device: torch.device, file: Path):
        self.visits = 0
        self.names = travelling(layer)
        tensors = [current(module, name).data for module, name in self.names]
        self.home = home_block(sum(aligned(plain.nbytes) for tensor in tensors for plain in plain_tensors(tensor)), device, file)
        self.at_home = over(self.home, tensors, fill=True)
        self.on_device: list[list[torch.Tensor]] = []  # one list a buffer of the ring
        self.put(self.at_home)
        for module in layer.modules():
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers[name]) is not None:
                    module._buffers[name] = buffer.to(device)
            for parameter in module.parameters(recurse=False):
                if (state := getattr(parameter, "quant_state", None)) is not None:
                    state.to(device)

    def put(self, tensors: list[torch.Tensor]) -> None:
        """Give the layer these tensors."""
        for (module, name), tensor in zip(self.names, tensors, strict=True):
            if name in module._buffers:
                module._buffers[name] = tensor
            elif hasattr(tensor, "__tensor_flatten__"):  # a wrapper cannot be another's ``data``
                module._parameters[name] = tensor  # type: ignore[assignment]
            else:
                module._parameters[name].data = tensor  # type: ignore[union-attr]  # the same object: libraries hang their state on it


class Ring:
    """The device's buffers and the layers that take turns in them; hooks on each layer bring it in and send it home.

    :ivar slots: the buffers, two at most.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device, folder: Path):
        self.backend: Any = torch.get_device_module(device)
        self.stream = self.backend.Stream()
        self.layers = [AwayLayer(layer, device, folder / f"layer-{at}") for at, layer in enumerate(layers)]
        size = max(layer.home.nbytes for layer in self.layers)
        self.slots = [Slot(size, device, self.backend, self.stream) for _ in layers[:2]]
        for away in self.layers:
            away.on_device = [over(slot.block, away.at_home, fill=False) for slot in self.slots]
        self.coming: deque[tuple[int, int]] = deque()  # (layer, slot), copied or being copied, in order of their visits
        self.visiting: int | None = None  # the slot of the layer that computes now
        for at, layer in enumerate(layers):
            layer.register_forward_pre_hook(hook(self.enter, at))
            layer.register_forward_hook(hook(self.leave, at), always_call=True)

    def enter(self, at: int) -> None:
        """Layer ``at`` computes next: its kernels wait until its bytes are there."""
        if not self.coming or self.coming[0][0] != at:  # the first pass, or one after a pass that broke off
            self.coming.clear()
            for slot in range(len(self.slots)):
                self.fetch((at + slot) % len(self.layers), slot)
        _, self.visiting = self.coming.popleft()
        self.backend.current_stream().wait_event(self.slots[self.visiting].copied)
        away = self.layers[at]
        away.put(away.on_device[self.visiting])
        away.visits += 1

    def leave(self, at: int) -> None:
        """Layer ``at`` is done, once its kernels are: its slot takes the next layer that is not on its way yet."""
        if self.visiting is None:
            return
        slot, self.visiting = self.visiting, None
        self.layers[at].put(self.layers[at].at_home)
        self.slots[slot].free.record(self.backend.current_stream())
        last = self.coming[-1][0] if self.coming else at
        self.fetch((last + 1) % len(self.layers), slot)

    def fetch(self, at: int, slot: int) -> None:
        """Copy layer ``at`` into ``slot`` as soon as the slot is free, without waiting for it here."""
        buffer, home = self.slots[slot], self.layers[at].home
        self.stream.wait_event(buffer.free)
        with self.backend.stream(self.stream):
            buffer.block[: home.nbytes].copy_(home, non_blocking=True)
        buffer.copied.record(self.stream)
        self.coming.append((at, slot))


class Slot:
    """A buffer on the device. :ivar copied: its bytes are there. :ivar free: nothing reads it any more."""

    def __init__(self, size: int, device: torch.device, backend: Any, stream: Any):
        self.block = torch.empty(size, dtype=torch.uint8, device=device)
        self.copied, self.free = backend.Event(), backend.Event()
        self.free.record(backend.current_stream())  # earlier kernels may still use the memory that the block was given
        if device.type != "cpu":
            self.block.record_stream(stream)  # a copy may be under way when the model is dropped


def hook(call: Callable[[int], None], at: int) -> Callable[..., None]:
    """``call(at)`` as a forward hook; parameters cannot be given tensors of inference mode."""

    def run(*_: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            call(at)

    return run


def travelling(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules and names of the tensors that leave the device: parameters, and the buffers that are saved with them."""
    found = []
    for module in layer.modules():
        found += [(module, name) for name, parameter in module._parameters.items() if parameter is not None]
        found += [
            (module, name)
            for name, value in module._buffers.items()
            if value is not None and name not in module._non_persistent_buffers_set
        ]
    return found


def travelling_bytes(layer: nn.Module) -> int:
    """Bytes of a layer that leave the device."""
    return sum(plain.nbytes for module, name in travelling(layer) for plain in plain_tensors(current(module, name).data))


def current(module: nn.Module, name: str) -> torch.Tensor:
    tensor = module._parameters[name] if name in module._parameters else module._buffers[name]
    assert tensor is not None
    return tensor


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def home_block(nbytes: int, device: torch.device, file: Path) -> torch.Tensor:
    """Bytes where memory is cheap: pinned, so that a GPU copies them by itself, or in a file that the system maps and may drop."""
    if device.type == "cpu":
        return torch.from_file(str(file), shared=True, size=nbytes, dtype=torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def over(block: torch.Tensor, tensors: list[torch.Tensor], *, fill: bool) -> list[torch.Tensor]:
    """Tensors like these whose bytes lie in ``block``, one after another; with ``fill`` they get the values, too."""
    at = 0

    def take(plain: torch.Tensor) -> torch.Tensor:
        nonlocal at
        view = block[at : at + plain.nbytes].view(plain.dtype).view(plain.shape)
        at += aligned(plain.nbytes)
        return view.copy_(plain) if fill else view

    made = [rebuilt(tensor, take) for tensor in tensors]
    return [nn.Parameter(tensor, requires_grad=False) if hasattr(tensor, "__tensor_flatten__") else tensor for tensor in made]


def rebuilt(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``change`` applied to a plain tensor, or to the tensors inside a wrapper of a quantizing library."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return change(tensor)
    names, context = tensor.__tensor_flatten__()  # type: ignore[operator]
    inner = {name: rebuilt(getattr(tensor, name), change) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
