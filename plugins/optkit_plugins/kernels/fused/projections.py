"""One product for linear layers that read the same input: query, key and value of an attention, gate and up of an MLP.

A decode step is a few hundred small kernels, and each costs microseconds that have nothing to do with its bytes. The model's own forward
stays as it is: whichever layer of a group is called first multiplies with the rows of all of them and keeps the others' columns, which
they hand out when they are called with the very same tensor. Once all have been asked nothing is kept, so a compiled graph has no further
outputs. Layers keep their names, types and weights, as views of the joined ones: nothing is stored twice and saving works as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from optkit_plugins.kernels.packed.formats import TILE_ROWS
from optkit_plugins.kernels.packed.linear import Packed, WeightOnlyLinear, fuse, linear

#: Names of layers that read the same input, as decoder-only models call them.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
#: Tensors of a packed layer whose first dimension counts tiles of rows.
TILED = ("words", "scales", "zeros")


class Joined(nn.Module):
    """The weights of several layers, one below the other, and what of the last product has not been asked for.

    Its buffers are not part of a state dict: the layers' own weights are views of them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(self, members: list[Any]):
        super().__init__()
        self.sizes = [member.out_features for member in members]
        self.input: torch.Tensor | None = None
        self.waiting: list[torch.Tensor | None] = [None] * len(members)
        self.packed = isinstance(members[0], WeightOnlyLinear)
        whole = fuse(members) if self.packed else None
        self.format, self.group = ("", 0) if whole is None else (whole.format, whole.group)
        for name in _tensors(members[0]):
            parts = [getattr(member, name) for member in members] if whole is None else [getattr(whole, name)]
            joined = None if parts[0] is None else torch.cat([part.detach() for part in parts]) if whole is None else parts[0].detach()
            self.register_buffer(name, joined, persistent=False)

    def part(self, index: int, member: Any, x: torch.Tensor) -> torch.Tensor:
        """What layer ``index`` answers for ``x``."""
        if torch.is_grad_enabled() and not self.packed:  # the joined weights learn nothing
            return nn.functional.linear(x, member.weight, member.bias)
        kept = self.waiting[index] if self.input is x else None
        if kept is None:
            parts = self.product(x).split(self.sizes, dim=-1)
            self.input, self.waiting = x, list(parts)
            kept = parts[index]
        self.waiting[index] = None
        if all(other is None for other in self.waiting):
            self.input = None
        return kept

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            shape = (sum(self.sizes), x.shape[-1])
            return linear(x, Packed(self.format, shape, self.group, self.words, self.scales, self.zeros), self.bias)
        return nn.functional.linear(x, self.weight, self.bias)


def fuse_projections(model: nn.Module) -> dict[str, Any]:
    """Join the groups of sibling layers in ``GROUPS``, in place and a group at a time. ``split_projections`` takes it back.

    :return: ``groups_fused``, ``layers_fused``, and ``left``: name of a group -> why it stays as it is.
    """
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    joined, layers, left = 0, 0, {}
    for parent, module in list(model.named_modules()):
        for names in GROUPS:
            members: list[Any] = [getattr(module, name, None) for name in names]
            if not all(isinstance(member, nn.Module) for member in members):
                continue
            problem = why_apart(module, members, users)
            if problem:
                left[f"{parent}.{'+'.join(names)}"] = problem
            else:
                join(members)
                joined, layers = joined + 1, layers + len(members)
    return {"groups_fused": joined, "layers_fused": layers, "left": left}


def why_apart(parent: nn.Module, members: list[Any], users: Counter[int]) -> str | None:
    """Why these layers cannot share a product, or ``None``."""
    kinds = sorted({type(member).__name__ for member in members})
    if len(kinds) > 1 or type(members[0]) not in (nn.Linear, WeightOnlyLinear):
        return f"layers of {', '.join(kinds)}"
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in members):
        return "hooks, an offloaded layer or a forward of its own"
    if getattr(parent, "is_kv_shared_layer", False):
        return "the layer takes keys and values from another"
    if any(users[id(parameter)] > 1 for member in members for parameter in member.parameters()):
        return "tied weights"
    if len({member.in_features for member in members}) > 1:
        return "inputs of several widths"
    if len({_form(member) for member in members}) > 1:
        return "weights of several dtypes, devices or formats, or only some with a bias"
    tensors = [getattr(member, name) for member in members for name in _tensors(member)]
    if any(t is not None and (t.device.type == "meta" or type(t.data) is not torch.Tensor) for t in tensors):
        return "weights without data, or of a library's own type"
    if isinstance(members[0], WeightOnlyLinear) and any(member.out_features % TILE_ROWS for member in members):
        return f"packed rows that are no multiple of {TILE_ROWS}"
    return None


def _form(member: Any) -> tuple[Any, ...]:
    """What has to be the same in layers that are joined."""
    tensors = [getattr(member, name) for name in _tensors(member)]
    return getattr(member, "format", None), getattr(member, "group", None), *(None if t is None else (t.dtype, t.device) for t in tensors)


def join(members: list[Any]) -> None:
    """Put the members' weights into one tensor, and let them answer from one product."""
    joined = Joined(members)
    joined.train(members[0].training)
    start = 0
    for index, member in enumerate(members):
        end = start + member.out_features
        for name in _tensors(member):
            whole = getattr(joined, name)
            if whole is not None:
                _set(member, name, whole[start // TILE_ROWS : end // TILE_ROWS] if name in TILED else whole[start:end])
        member.forward = partial(joined.part, index, member)
        start = end
    members[0].joined = joined


def split_projections(model: nn.Module) -> None:
    """Every layer computes for itself again. Weights of 16 and 32 bits stay views of one tensor, which changes nothing for anybody."""
    for module in list(model.modules()):
        function = vars(module).get("forward")
        if isinstance(function, partial) and isinstance(getattr(function.func, "__self__", None), Joined):
            del module.forward
            module._modules.pop("joined", None)


def joined_layers(model: nn.Module) -> Iterator[Joined]:
    yield from (module for module in model.modules() if isinstance(module, Joined))


def _tensors(member: nn.Module) -> tuple[str, ...]:
    return (*TILED, "bias") if isinstance(member, WeightOnlyLinear) else ("weight", "bias")


def _set(member: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter or buffer of the layer another place."""
    if name in member._parameters:
        member._parameters[name] = nn.Parameter(value, requires_grad=member._parameters[name].requires_grad)  # type: ignore[union-attr]
    else:
        member._buffers[name] = value
