"""GPTQ through llm-compressor: quantize a model in memory, and write it as a compressed-tensors folder.

Afterwards the model is an ordinary one whose linear weights lie exactly on the grid of their bits. The scales are kept beside it, for
``write_folder``: compressed-tensors' own wrapped layers would round the weights again in every forward pass.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

#: Group sizes below this are not tried in place of one that does not divide a layer's width: their scales cost a bit a weight and more.
SMALLEST_GROUP = 32
#: How close a weight divided by its scale has to be to an integer to lie on the grid, in steps, beside the rounding of its dtype.
OFF_GRID = 1e-3


@dataclass
class Grid:
    """The grid of one layer: ``weight = (integer - zero_point) * scale``.

    :ivar scale: (out × groups), in the weight's dtype. :ivar zero_point: (out × groups), int8.
    :ivar scheme: compressed-tensors' description of it.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    scheme: Any

    @property
    def bits(self) -> int:
        return int(self.scheme.weights.num_bits)

    @property
    def group(self) -> int | None:
        """Weights that share a scale; ``None`` for a whole row."""
        return self.scheme.weights.group_size if self.scheme.weights.strategy == "group" else None

    @property
    def stored(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Bits, scale, and the zero point of unsigned integers, as checkpoints store it."""
        return self.bits, self.scale, self.zero_point.int() + 2 ** (self.bits - 1)

    def packed_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the layer in the folder: integers packed into int32 a row, scales, and packed zero points where there are any."""
        rows, columns = shape
        zeros = 0 if self.scheme.weights.symmetric else math.ceil(rows * self.bits / 32) * 4 * self.scale.shape[1]
        return rows * math.ceil(columns * self.bits / 32) * 4 + self.scale.numel() * self.scale.element_size() + zeros

    def holds(self, weight: torch.Tensor, rows: int = 16) -> bool:
        """Whether the first rows of the weight lie on the grid."""
        import torch

        rounding = torch.finfo(weight.dtype).eps / 2
        sample = weight.detach()[:rows].float()
        scale = self.scale[:rows].float().repeat_interleave(sample.shape[1] // self.scale.shape[1], 1)
        zero = self.zero_point[:rows].float().repeat_interleave(sample.shape[1] // self.scale.shape[1], 1)
        steps = sample / scale + zero
        half = 2 ** (self.bits - 1)
        on_grid = (steps - steps.round()).abs() <= OFF_GRID + rounding * (sample / scale).abs()
        return bool((on_grid & (steps >= -half - 0.5) & (steps <= half - 0.5)).all())


def fitting_group(width: int, wanted: int) -> int | None:
    """The wanted group size, or a half, a quarter … of it that divides the width, or ``None``: one scale a row."""
    size = wanted
    while size > 0 and width % size:
        size //= 2
    return size if size == wanted or size >= SMALLEST_GROUP else None


def quantize(
    model: PreTrainedModel, names: list[str], samples: list[list[int]], tokenizer: Any, folder: Path, *,
    bits: int, group_size: int, symmetric: bool, damp: float, act_order: bool,
) -> tuple[dict[str, Grid], list[str]]:  # fmt: skip
    """Run GPTQ on the named ``nn.Linear`` layers, a decoder layer at a time, each with the error of those before it.

    :param samples: token ids, one list a sample. :param folder: an empty folder for the library's look at the configuration.
    :return: the grid of each layer, and the layers for which the Hessian could not be inverted, which were rounded to nearest.
    """
    with _quiet():
        from llmcompressor import oneshot, reset_session

        modifier = _modifier(groups(model, names, bits, group_size, symmetric), damp, act_order)
        tied = shared_parameters(model)
        try:
            with _configuration_in(model, folder):
                oneshot(model=model, dataset=_loader(samples), processor=tokenizer, recipe=[modifier])
        finally:
            rounded = sorted(modifier.rounded)
            reset_session()
            unwrap(model, tied)
    return {name: take_grid(model.get_submodule(name)) for name in names}, rounded


def groups(model: PreTrainedModel, names: list[str], bits: int, group_size: int, symmetric: bool) -> dict[str, dict[str, Any]]:
    """compressed-tensors' ``config_groups``: one a group size, each with its layers."""
    by_size: dict[int | None, list[str]] = {}
    for name in names:
        width = int(model.get_submodule(name).in_features)  # type: ignore[arg-type]
        by_size.setdefault(fitting_group(width, group_size) if group_size > 0 else None, []).append(name)
    found = {}
    for index, (size, targets) in enumerate(by_size.items()):
        scale = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **scale}
        found[f"group_{index}"] = {"targets": targets, "weights": weights}
    return found


def _modifier(config_groups: dict[str, Any], damp: float, act_order: bool) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier

    class Watched(GPTQModifier):  # type: ignore[misc]
        """Remembers the layers that fell back to rounding: the library only logs them."""

        rounded: set[str] = set()

        def on_finalize(self, state: Any, **kwargs: Any) -> bool:
            self.rounded.update(self._rtn_fallback_module_names)
            return super().on_finalize(state, **kwargs)

    return Watched(config_groups=config_groups, dampening_frac=damp, actorder="static" if act_order else None)


def _loader(samples: list[list[int]]) -> Any:
    import torch
    from torch.utils.data import DataLoader

    rows = [{"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long)} for ids in samples]
    return DataLoader(rows, batch_size=1)  # type: ignore[arg-type]


@contextlib.contextmanager
def _configuration_in(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Let the model's name be a folder with its configuration: the library reads it from there, or else asks the hub for it."""
    before = model.config._name_or_path
    model.config.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    try:
        yield
    finally:
        model.config._name_or_path = before


def shared_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Where the same parameter stands in several places (a head tied to the embedding): lists of (module, name)."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def unwrap(model: nn.Module, tied: list[list[tuple[nn.Module, str]]]) -> None:
    """Take off what the library put round every module, quantized or not: offloading (which unties weights), hooks, switches."""
    from compressed_tensors.offload.dispatch import remove_dispatch

    remove_dispatch(model)
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
        vars(module).pop("quantization_enabled", None)
    vars(model).pop("save_pretrained", None)  # its wrapper would restore the configuration of before our changes
    for (first, name), *others in tied:
        for module, other in others:
            module._parameters[other] = first._parameters[name]


def take_grid(layer: nn.Module) -> Grid:
    """Take compressed-tensors' state off a layer, which is a plain ``nn.Linear`` again."""
    grid = Grid(layer.weight_scale.detach(), layer.weight_zero_point.detach(), layer.quantization_scheme)  # type: ignore[union-attr,operator]
    for name in [name for name, _ in layer.named_parameters(recurse=False) if name not in ("weight", "bias")]:
        delattr(layer, name)
    for name in ("forward", "quantization_scheme", "quantization_status"):
        vars(layer).pop(name, None)
    layer.weight.requires_grad_(False)
    return grid


def write_folder(model: PreTrainedModel, grids: dict[str, Grid], folder: Path) -> None:
    """Write the packed weights as a compressed-tensors folder, which transformers and vLLM load. The model is as before afterwards."""
    with _quiet():
        from compressed_tensors.compressors import ModelCompressor

        weights = {name: model.get_submodule(name).weight for name in grids}
        try:
            for name, grid in grids.items():
                _pack(model.get_submodule(name), grid)
            model.save_pretrained(folder)
            ModelCompressor.from_pretrained_model(model).update_config(str(folder))
        finally:
            for name, weight in weights.items():
                _take_packed(model.get_submodule(name), weight)


def _pack(layer: nn.Module, grid: Grid) -> None:
    """The layer with packed integers in place of its weight.

    They are found in float32: at 8 bits, bfloat16 cannot tell a weight's integer from its neighbours.
    """
    import torch
    from compressed_tensors.compressors.base import compress_module

    def frozen(tensor: Any) -> Any:
        return torch.nn.Parameter(tensor, requires_grad=False)

    layer.quantization_scheme = grid.scheme
    layer.weight = frozen(layer.weight.detach().float())  # type: ignore[operator,union-attr]
    layer.weight_scale, layer.weight_zero_point = frozen(grid.scale.float()), frozen(grid.zero_point)
    compress_module(layer)
    layer.weight_scale = frozen(grid.scale)


def _take_packed(layer: nn.Module, weight: Any) -> None:
    for name in [name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))]:
        if name != "bias":
            delattr(layer, name)
    for name in ("quantization_scheme", "quantization_status"):
        vars(layer).pop(name, None)
    layer.register_parameter("weight", weight)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's log on standard output, its progress bars, and torch's remark on its tracing.

    The switch is read when llm-compressor is imported; the environment is as before afterwards.
    """

    def drop(record: logging.LogRecord) -> bool:
        return "is_fx_tracing" not in record.getMessage()

    wanted = {"LLM_COMPRESSOR_LOG_DISABLED": "true", "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false")}
    before = {name: os.environ.get(name) for name in wanted}
    tracing = logging.getLogger("torch.fx._symbolic_trace")
    os.environ.update(wanted)
    tracing.addFilter(drop)
    try:
        import llmcompressor  # noqa: F401
        from loguru import logger

        logger.disable("llmcompressor")
        with contextlib.suppress(ValueError):  # the level exists: somebody switched the log on
            logger.level("METRIC", no=38)  # switched off, the library forgets to make its level, and fails when it logs
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(llmcompressor|compressed_tensors|torch\.fx)")
            yield
    finally:
        tracing.removeFilter(drop)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
