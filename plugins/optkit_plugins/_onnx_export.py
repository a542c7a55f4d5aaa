"""A causal language model as one ONNX graph: prefill and decode in the same graph, keys and values as inputs and outputs."""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optkit import OptkitError
from optkit_plugins._cache_inputs import cache_shapes, with_cache_inputs

#: Sizes of the example that is traced: all different, and none of them 0 or 1, which torch.export takes for constants.
BATCH, TOKENS, PAST = 2, 3, 5
#: The loggers of the exporter that tell of operators it leaves out because torchvision is not there. Language models use none.
NOISY_LOGGER = "torch.onnx._internal.exporter._registration"


def input_names(layers: int) -> list[str]:
    return ["input_ids", "attention_mask", "position_ids", *_pairs("past_key_values", layers)]


def output_names(layers: int) -> list[str]:
    return ["logits", *_pairs("present", layers)]


def _pairs(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def export(model: Any, path: Path, *, opset: int) -> int:
    """Write ``model`` to ``path``; weights of more than 2 GB go to a file beside it.

    Inputs: ``input_ids`` (batch, sequence), ``attention_mask`` (batch, past + sequence), ``position_ids`` (batch, sequence), all int64, and
    ``past_key_values.{layer}.key`` / ``.value`` (batch, heads, past, width). Outputs: ``logits`` (batch, sequence, vocabulary) and
    ``present.{layer}.key`` / ``.value`` (batch, heads, past + sequence, width). Past may be 0 (prefill).

    :return: the number of nodes of the graph.
    :raises OptkitError: where the model cannot be traced or an operator has no ONNX counterpart.
    """
    import torch

    shapes = cache_shapes(model)
    device, dtype = model.device, model.dtype
    past = [torch.zeros(BATCH, heads, PAST, width, device=device, dtype=dtype) for heads, *widths in shapes for width in widths]
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long, device=device)
    mask = torch.ones(BATCH, PAST + TOKENS, dtype=torch.long, device=device)
    positions = torch.arange(PAST, PAST + TOKENS, device=device).expand(BATCH, TOKENS)
    dynamic = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "sequence"},
        "past": tuple({0: "batch", 2: "past"} for _ in past),
    }
    with quiet_export(), torch.no_grad():
        try:
            program = torch.onnx.export(
                with_cache_inputs(model),
                (ids, mask, positions, *past),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=input_names(len(shapes)),
                output_names=output_names(len(shapes)),
                opset_version=opset,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise OptkitError(f"{type(model).__name__} cannot be exported to ONNX: {' '.join(str(error).split())[:400]}") from error
        assert program is not None  # only the old exporter gives None
        program.save(str(path))
    return sum(1 for _ in program.model.graph)


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Leave out what the exporter says on every export of a language model."""
    logger = logging.getLogger(NOISY_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # one dimension has one name in all inputs: the exporter remarks on the second use
            warnings.filterwarnings("ignore", message=".*The axis name: .* will not be used", category=UserWarning)
            # torch copies its own tree specs
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def copy_export(source: Path, folder: Path) -> None:
    """Copy an exported graph and the weights beside it (the graph names them by their file name)."""
    for file in source.parent.glob(source.name + "*"):
        shutil.copyfile(file, folder / file.name)
