"""Snapshots of a model: what changed between two of them proves most techniques without code of theirs."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

#: Values looked at in each tensor for the checksum: enough to notice any change of a whole tensor, cheap on 8 billion parameters.
PROBES = 64


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment: module types, parameter shapes and dtypes, stored bytes, and a checksum of probed values."""

    types: dict[str, str]
    shapes: dict[str, str]
    stored_bytes: int
    checksum: str

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        from optkit.modules import stored_bytes

        types = {name: type(module).__qualname__ for name, module in model.named_modules()}
        shapes = {
            name: f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.device.type} {type(tensor.data).__name__}"
            for name, tensor in model.named_parameters()
        }
        return cls(types, shapes, stored_bytes(model), checksum(model))


def checksum(model: nn.Module) -> str:
    """sha256 over a spread of values of each parameter and its mean magnitude over strided rows."""
    from optkit.modules import plain_tensors

    state = hashlib.sha256()
    for name, parameter in model.named_parameters():
        for plain in plain_tensors(parameter.data):
            state.update(name.encode())
            if plain.device.type == "meta" or not plain.numel():
                continue
            flat = plain.detach().reshape(-1) if plain.is_contiguous() else plain.detach().flatten()
            probes = flat[:: max(1, flat.numel() // PROBES)][:PROBES]
            state.update(repr(probes.cpu().double().tolist()).encode())
    return state.hexdigest()


def difference(before: Snapshot, after: Snapshot) -> dict[str, Any]:
    """What changed, as JSON; empty where nothing did."""
    changes: dict[str, Any] = {}
    replaced = Counter(
        f"{before.types[name]} → {kind}" for name, kind in after.types.items() if name in before.types and before.types[name] != kind
    )
    if replaced:
        changes["modules_replaced"] = dict(replaced)
    gone, new = before.types.keys() - after.types.keys(), after.types.keys() - before.types.keys()
    if gone:
        changes["modules_removed"] = len(gone)
    if new:
        changes["modules_added"] = len(new)
    reshaped = [name for name, shape in after.shapes.items() if before.shapes.get(name) != shape]
    if reshaped:
        changes["parameters_changed"] = len(reshaped)
    if before.stored_bytes != after.stored_bytes:
        changes["bytes"] = [before.stored_bytes, after.stored_bytes]
    if before.checksum != after.checksum:
        changes["values_changed"] = True
    return changes
