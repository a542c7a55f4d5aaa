"""What techniques need of a model's modules: its linear layers, replacing one, and the bytes that it really stores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def linears(model: PreTrainedModel, *, min_parameters: int = 1000, head: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the plain linear layers (``nn.Linear`` and GPT-2's ``Conv1D``) that a weight technique should touch.

    Exact types only: a layer that another technique replaced is no plain linear any more.

    :param min_parameters: smaller layers are left alone: they cost more than they save.
    :param head: include the output head. A tied head is never included: quantizing it would untie it and *add* bytes.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    output: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    tied = output is not None and embedding is not None and output.weight is embedding.weight
    for name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, Conv1D) or module.weight.numel() < min_parameters:
            continue
        if module is output and (tied or not head):
            continue
        yield name, module


def as_linear(module: Any) -> nn.Linear:
    """A ``Conv1D`` (weight in × out) as the ``nn.Linear`` (weight out × in) of the same function; a linear as it is."""
    import torch
    from torch import nn

    if isinstance(module, nn.Linear):
        return module
    rows, columns = module.weight.shape
    with torch.device("meta"):
        linear = nn.Linear(rows, columns, bias=module.bias is not None)
    linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return linear


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where the dotted ``name`` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The ordinary tensors of a (possibly wrapped) tensor; ``numel * element_size`` of a wrapper says nothing about its bytes."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [plain for name in names for plain in plain_tensors(getattr(tensor, name))]
    return [tensor]


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers and the tensors of quantization states that libraries hang beside them (bitsandbytes' ``quant_state``)."""
    for parameter in module.parameters():
        yield from plain_tensors(parameter.data)
        yield from _state_tensors(getattr(parameter, "quant_state", None))
    yield from (plain for buffer in module.buffers() for plain in plain_tensors(buffer))


def _state_tensors(state: object) -> Iterator[torch.Tensor]:
    import torch

    if state is None:
        return
    for name in ("absmax", "code", "offset"):
        value = getattr(state, name, None)
        if isinstance(value, torch.Tensor):
            yield value
    yield from _state_tensors(getattr(state, "state2", None))


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the distinct storages behind a module's parameters, buffers and quantization states."""
    seen: dict[int, int] = {}
    for tensor in tensors_of(module):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr() if tensor.device.type != "meta" else id(storage)] = storage.nbytes()
    return sum(seen.values())
