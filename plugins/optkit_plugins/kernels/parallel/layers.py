"""Layers spread over devices: hidden states move where the device changes, once; nothing is wrapped.

Whatever is not a decoder layer (embeddings, rotary, last norm, head) stays on the first device, so that the model takes and gives tensors
there. In a step the host does one thing more for each layer that is elsewhere: it hands on the masks and positions that the first such
layer has copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def spread(model: Any, devices: list[str]) -> list[str]:
    """Put the layers on the devices, about equally many bytes on each. :return: the devices used."""
    layers = decoder_layers(model)
    places = [torch.device(devices[at]) for at in balanced(model, len(devices))]
    home = torch.device(devices[0])
    place_rest(model, {id(layer) for layer in layers}, home)
    copies: dict[torch.device, Copies] = {}
    for layer, place in zip(layers, places, strict=True):
        nn.Module.to(layer, place)  # transformers' own refuses quantized models
        if place != home:
            copies.setdefault(place, Copies(place, layer))
            layer.register_forward_pre_hook(copies[place].bring, with_kwargs=True)
    layers[-1].register_forward_hook(bring_home(home))
    return sorted({str(place) for place in places} | {str(home)})


def decoder_layers(model: Any) -> list[nn.Module]:
    """In the order in which they run. :raises ValueError: where the model has no list of them."""
    whole = set(getattr(model, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layers in lists:
        if len(layers) and all(type(layer).__name__ in whole for layer in layers):
            return list(layers)
    raise ValueError(f"{type(model).__name__} has no list of decoder layers")


def balanced(model: Any, count: int) -> list[int]:
    """Index of the device of each layer, in order: equal bytes on each, the first one's share holding all that is no layer."""
    sizes = [stored(layer.parameters()) + stored(layer.buffers()) for layer in decoder_layers(model)]
    total = stored(model.parameters()) + stored(model.buffers())
    before, places = total - sum(sizes), []
    for size in sizes:
        middle = before + size / 2
        places.append(min(int(middle * count / total), count - 1))
        before += size
    return places


def stored(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def place_rest(module: nn.Module, layers: set[int], device: torch.device) -> None:
    """Everything but the layers (by ``id``) goes to the device."""
    if id(module) in layers:
        return
    if not any(id(part) in layers for part in module.modules()):
        nn.Module.to(module, device)
        return
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = parameter.data.to(device)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else buffer.to(device)
    for child in module.children():
        place_rest(child, layers, device)


class Copies:
    """What a device's layers are given: the tensors that all of them share (masks, positions, rotary) are copied once a step, by the
    first of them, and handed on as long as they are the very same objects."""

    def __init__(self, device: torch.device, first: nn.Module):
        self.device, self.first = device, first
        self.last: dict[str, tuple[Any, Any]] = {}

    def bring(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook."""
        if module is self.first:  # a new step: a buffer of the last one may hold other values by now
            self.last.clear()
        positional = tuple(self.moved(f"{at}", value) for at, value in enumerate(args))
        return positional, {name: self.moved(name, value) for name, value in kwargs.items()}

    def moved(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.device == self.device:
                return value
        elif not (isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor)):
            return value
        given, copy = self.last.get(name, (None, None))
        if given is not value:
            copy = moved(value, self.device)
            self.last[name] = (value, copy)
        return copy


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def bring_home(device: torch.device) -> Callable[..., Any]:
    """A forward hook that gives the layer's answer on ``device``."""

    def hook(module: nn.Module, args: Any, answer: Any) -> Any:
        return moved(answer, device)

    return hook
