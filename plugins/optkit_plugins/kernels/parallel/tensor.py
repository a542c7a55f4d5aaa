"""Tensor parallel: each process keeps its slice of the linear layers, as the model's own plan in transformers says.

The plan is data: which layers are cut by outputs (``colwise``: query, key, value, gate, up) and which by inputs (``rowwise``: the
projections that follow them), so that two sums a layer put everything together (Megatron-LM, Shoeybi et al. 2019). Layers stay plain
``nn.Linear``s of fewer rows, attention counts its heads by the shapes that it gets, and nothing waits for Python: a step can be compiled and
recorded as on one GPU. (transformers' wrappers for the same plan run Python at every layer.)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from optkit import UnavailableError
from optkit_plugins.kernels.parallel import exchange as parallel_exchange
from optkit_plugins.kernels.parallel.exchange import Exchange, gather_parts, sum_parts

#: Parts of a plan that leave a module whole. An embedding is read a row a token: nothing would be gained.
WHOLE = ("embedding_rowwise", "replicated_with_grad_allreduce")
#: Largest difference of the sliced model's logits from the whole one's, as a share of the largest: rounding, not another model.
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-3}


def sharder(file: Path, device: str, rank: int, world: int) -> Callable[[Any], Any]:
    """What joins the group as process ``rank`` of ``world`` and takes its slices of a model; it can be sent to another process.

    :param file: where the processes meet. It must not exist yet.
    """
    return functools.partial(join_and_slice, file=str(file), device=device, rank=rank, world=world)


def join_and_slice(model: Any, *, file: str, device: str, rank: int, world: int) -> Any:
    """:raises UnavailableError: where the slices together do not compute what the whole model does."""
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    kind, own = ("nccl", place) if place.type == "cuda" else ("gloo", None)
    dist.init_process_group(kind, init_method=f"file://{file}", rank=rank, world_size=world, device_id=own)
    parallel_exchange.join(Exchange(place))
    with torch.inference_mode():
        expected = first_logits(model) if rank == 0 else None  # the first process has the whole model on its device
    slice_layers(model, place, rank, world)
    with torch.inference_mode():
        found = first_logits(model)
    if expected is not None:
        check(model, found, expected)
    return model


def first_logits(model: Any) -> torch.Tensor:
    """(1, 8, vocabulary), float32, of the first tokens of the vocabulary."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    return model(input_ids=ids, use_cache=False).logits.float()


def check(model: Any, found: torch.Tensor, expected: torch.Tensor) -> None:
    largest = float((found - expected).abs().max() / expected.abs().max())
    if not largest <= AGREEMENT.get(model.dtype, 0.1):
        raise UnavailableError(
            f"the slices of {type(model).__name__} do not add up to it: logits differ by {largest:.2g} of the largest; "
            "set parallel.mode=replicas or parallel.mode=layers"
        )


# ---------------------------------------------------------------- the plan


def planned(model: Any) -> Iterator[tuple[str, str, Any]]:
    """(name, style, module or parameter) of everything that the model's plan cuts."""
    plan = {name: style for name, style in (model.tp_plan or {}).items() if style not in WHOLE}
    for things in (model.named_modules(), model.named_parameters()):
        for name, thing in things:
            style = plan.get(re.sub(r"\d+", "*", name))
            if style is not None:
                yield name, style, thing


def why_whole(model: Any, world: int) -> str:
    """What of the plan cannot be sliced here for ``world`` processes, or ""."""
    head = model.get_output_embeddings()
    for name, style, thing in planned(model):
        if style not in SLICES:
            return f"its plan has '{style}' for {name}, and only {', '.join(SLICES)} are done here"
        if type(thing) is not nn.Linear:
            return f"{name} is a {type(thing).__name__}"
        cut = thing.in_features if style.startswith("rowwise") else thing.out_features
        if cut % world and thing is not head:
            return f"{cut} of {name} cannot be shared by {world} devices"
    return ""


# ---------------------------------------------------------------- slices


class Summed(nn.Linear):
    """The product with some of the inputs, added up over all processes; the bias comes once. ``first``: the first of these inputs, where
    it is given all of them."""

    first: int | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.first is not None:
            input = input.narrow(-1, self.first, self.in_features)
        whole = sum_parts(nn.functional.linear(input, self.weight))
        return whole if self.bias is None else whole + self.bias


class Gathered(nn.Linear):
    """Some of the outputs, and those of the others behind or before them."""

    world = 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return gather_parts(super().forward(input), self.world)


class Head(nn.Linear):
    """A head of which each process computes its part of the vocabulary where one token a row is asked for.

    The weight stays whole: it may be the embedding's, and over many tokens the product costs less than to collect their logits.
    """

    rank, world = 0, 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dim() != 3 or input.shape[1] != 1:
            return super().forward(input)
        size = self.out_features // self.world
        bias = None if self.bias is None else self.bias.narrow(0, self.rank * size, size)
        return gather_parts(nn.functional.linear(input, self.weight.narrow(0, self.rank * size, size), bias), self.world)


def slice_layers(model: Any, device: torch.device, rank: int, world: int) -> None:
    """Put this process's part of the model on its device, in place. What is not cut goes there whole."""
    head = model.get_output_embeddings()
    for name, style, linear in list(planned(model)):
        if linear is not head:
            new = SLICES[style](linear, device, rank, world)
        elif linear.out_features % world:
            continue
        else:
            new = Head(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
            new.weight, new.bias, new.rank, new.world = linear.weight, linear.bias, rank, world
        new.train(linear.training)
        model.set_submodule(name, new)
    nn.Module.to(model, device)


def by_outputs(linear: nn.Linear, device: torch.device, rank: int, world: int, kind: type[Any] = nn.Linear) -> Any:
    size = linear.out_features // world
    new = kind(linear.in_features, size, linear.bias is not None, device="meta")
    new.weight = part(linear.weight, 0, rank * size, size, device)
    if linear.bias is not None:
        new.bias = part(linear.bias, 0, rank * size, size, device)
    return new


def by_inputs(linear: nn.Linear, device: torch.device, rank: int, world: int) -> Summed:
    size = linear.in_features // world
    new = Summed(size, linear.out_features, linear.bias is not None, device="meta")
    new.weight = part(linear.weight, 1, rank * size, size, device)
    if linear.bias is not None:
        new.bias = linear.bias
    return new


def by_outputs_gathered(linear: nn.Linear, device: torch.device, rank: int, world: int) -> Gathered:
    new = by_outputs(linear, device, rank, world, Gathered)
    new.world = world
    return new


def by_inputs_cut(linear: nn.Linear, device: torch.device, rank: int, world: int) -> Summed:
    new = by_inputs(linear, device, rank, world)
    new.first = rank * new.in_features
    return new


def part(whole: torch.Tensor, dim: int, first: int, size: int, device: torch.device) -> nn.Parameter:
    """A copy: a view would keep the whole."""
    view = whole.detach().narrow(dim, first, size)
    return nn.Parameter(torch.empty(view.shape, dtype=view.dtype, device=device).copy_(view), requires_grad=False)


#: Style of a plan -> what makes a process's slice of such a layer.
SLICES: dict[str, Callable[[nn.Linear, torch.device, int, int], nn.Linear]] = {
    "colwise": by_outputs,
    "rowwise": by_inputs,
    "colwise_gather_output": by_outputs_gathered,
    "rowwise_split_input": by_inputs_cut,
}


def sliced(model: nn.Module) -> dict[str, int]:
    """How many layers hold which slices: the proof."""
    return {
        "summed_layers": sum(isinstance(module, Summed) for module in model.modules()),
        "gathered_layers": sum(isinstance(module, Gathered | Head) for module in model.modules()),
    }
