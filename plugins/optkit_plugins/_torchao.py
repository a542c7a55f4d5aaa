"""What ``int8`` and ``fp8`` share: torchao's import, its weights in a model, and folders that transformers reads back."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from optkit import UsageError
from optkit_plugins import _fused_kernels, _packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torchao's two messages at import that mean nothing here.

    It tries to load all of its CUDA libraries, and names each that does not load. Under torch 2.13 its enums are registered twice.
    """

    def drop(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (text.startswith("Failed to load") or "is an Enum subclass" in text)

    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    for logger in loggers:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)


def load_torchao() -> None:
    with _quiet():
        import torchao.quantization  # noqa: F401
    # torchao 0.17 builds its own deprecated layout when it makes a config.
    warnings.filterwarnings("ignore", message="Deprecation: PlainLayout is deprecated", category=UserWarning)
    # Told once by the compiler of each kind of tensor: the hash that it takes instead is right, and slower.
    warnings.filterwarnings("ignore", message=r"(Int8|Float8)Tensor does not implement _stable_hash_for_caching", category=UserWarning)


def layers(model: PreTrainedModel, kind: str) -> Iterator[tuple[str, Any]]:
    """Linear layers whose weight is torchao's tensor of this class name."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight.data).__name__ == kind:
            yield name, module


def register(model: PreTrainedModel, config: Any, kind: str) -> None:
    """Attach what ``from_pretrained`` attaches to a torchao model, so that saving and loading work."""
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    quantized = dict(layers(model, kind))  # still ``nn.Linear``
    wrapped = TorchAoConfig(config, modules_to_not_convert=[name for name in _packed.plain_linears(model) if name not in quantized])
    quantizer = AutoHfQuantizer.from_config(wrapped, pre_quantized=True)
    _packed.attach(model, quantizer)
    if _packed.was_conv1d(quantized.values()):
        quantizer.is_serializable = lambda: False  # save_pretrained refuses, instead of writing a folder that nothing reads


def facts(model: PreTrainedModel, trial: TrialContext, kind: str) -> dict[str, Any]:
    """Layers, bytes, scales and who multiplies, from the model itself."""
    found = dict(layers(model, kind))
    packed = {name: (layer, sum(p.numel() * p.dtype.itemsize for p in layer.parameters())) for name, layer in found.items()}
    fused = _fused_kernels.layers(model)
    packed |= {name: (layer, _fused_kernels.full_bytes(layer, model)) for name, layer in fused.items()}
    result = _packed.packed_facts(model, packed, trial.notes.get("left", {}))
    if packed:
        _fused_kernels.add_facts(result, model, trial, "torchao")
        result["scales"] = sum(layer.weight.scale.numel() for layer in found.values()) + sum(layer.out_features for layer in fused.values())
    return result


def refuse_conv1d(model: PreTrainedModel, kind: str, technique: str) -> None:
    """Refuse to save what could not be read back; everything else goes transformers' own way (safetensors with torchao's metadata).

    :raises UsageError: where a quantized layer was a ``Conv1D``.
    """
    _fused_kernels.give_back(model)
    if _packed.was_conv1d(layer for _, layer in layers(model, kind)):
        raise UsageError(
            f"{technique}: {type(model).__name__} is built of Conv1D layers, into which transformers cannot load torchao's weights; "
            f"export it without {technique}"
        )
