"""Tensor parallel: each process keeps its slice of every layer, as the model's own plan in transformers says, in a process group of torch's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def sharder(file: Path, device: str, rank: int, world: int) -> Callable[[Any], Any]:
    """What joins the group as process ``rank`` of ``world`` and takes its slices of a model; it can be sent to another process.

    :param file: where the processes meet. It must not exist yet.
    """
    return functools.partial(join_and_shard, file=str(file), device=device, rank=rank, world=world)


def join_and_shard(model: Any, *, file: str, device: str, rank: int, world: int) -> Any:
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh = dist.init_device_mesh(kind, (world,))
    nn.Module.to(model, torch.device(device))
    model = apply_tensor_parallelism(model, mesh)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # without gradients the plan computes with plain tensors; a slice that is a view keeps the whole
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor):
                    module._parameters[name] = nn.Parameter(parameter.to_local().clone(), requires_grad=False)
    return model
