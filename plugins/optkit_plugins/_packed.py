"""What techniques that store weights in fewer bits share: which layers they touch, and what they can say of the result."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optkit import UsageError
from optkit.modules import as_linear, linears, replace, stored_bytes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

#: From this share of the parameter bytes on, experts that stay as they were are worth a warning.
EXPERTS_WORTH_A_WORD = 0.05


def chosen(model: PreTrainedModel, *, min_parameters: int, head: bool, skip: tuple[str, ...]) -> list[str]:
    """Names of the linear layers to quantize.

    Names, not modules, so that each layer's full-precision weight can be freed as soon as the layer is replaced.

    :param skip: patterns of names to leave alone, as in a shell: ``*.layers.0.*`` or ``*down_proj``.
    """
    names = [name for name, _ in linears(model, min_parameters=min_parameters, head=head)]
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)]


def refuse_quantized(model: PreTrainedModel, technique: str) -> None:
    """:raises UsageError: for a model whose weights are quantized already, such as one loaded from a quantized checkpoint."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", "")
    method = getattr(method, "value", method)
    raise UsageError(
        f"{technique}: the model's weights are quantized already ({method}); leave {technique} out, or load the full-precision model"
    )


def convert(model: PreTrainedModel, names: list[str], make: Any) -> dict[str, str]:
    """Replace each named layer by ``make(module)``, one at a time.

    :param make: gives the new layer, or a sentence that says why the layer stays as it is.
    :return: name -> reason of the layers that stay.
    """
    left: dict[str, str] = {}
    for name in names:
        made = make(model.get_submodule(name))
        if isinstance(made, str):
            left[name] = made
        else:
            replace(model, name, made)
    return left


def linear(module: nn.Module) -> nn.Linear:
    """The layer as an ``nn.Linear`` that remembers what it was."""
    made = as_linear(module)
    made.source_cls = type(module)  # type: ignore[assignment]  # transformers marks quantized layers by the same name
    made.train(module.training)
    return made


def was_conv1d(layers: Iterable[Any]) -> bool:
    """Whether a layer was a ``Conv1D``: transformers builds it again when it loads a folder, and its weight is the other way round."""
    from transformers.pytorch_utils import Conv1D

    return any(getattr(layer, "source_cls", None) is Conv1D for layer in layers)


def attach(model: Any, quantizer: Any) -> None:
    """Make the model known to transformers as ``from_pretrained`` does, so that saving, loading, peft and ``generate`` know what it is."""
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def plain_linears(model: PreTrainedModel) -> Iterator[str]:
    """Names of the linear layers that are in full precision, the tied head included (it is a view of the embedding)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D):
            yield name


def packed_facts(model: PreTrainedModel, packed: Mapping[str, tuple[nn.Module, int]], left: Mapping[str, str]) -> dict[str, Any]:
    """Counts, bytes and shares, from the model itself.

    :param packed: name -> (quantized layer, bytes of its parameters before).
    :param left: name -> reason of layers that the technique wanted and had to leave.
    """
    from torch import nn

    plain = [name for name, _ in linears(model, min_parameters=0, head=True) if name not in packed]
    total = len(packed) + len(plain)
    stored = stored_bytes(model)
    quantized = sum(before for _, before in packed.values())
    layers = nn.ModuleList(layer for layer, _ in packed.values())  # together: joined projections share their storage
    full = stored - stored_bytes(layers) + quantized
    experts = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() >= 3)
    facts: dict[str, Any] = {
        "linears_quantized": len(packed),
        "linears": total,
        "bytes_full_precision": full,
        "bytes_stored": stored,
        "quantized_share_of_parameter_bytes": round(quantized / full, 4) if full else 0.0,
        "summary": f"{len(packed)} of {total} linears, {megabytes(full)} → {megabytes(stored)}",
    }
    if left:
        facts["left_in_full_precision"] = dict(left)
    if packed and full and experts / full > EXPERTS_WORTH_A_WORD:
        facts["experts_share_of_parameter_bytes"] = round(experts / full, 4)
        facts["summary"] += f"; experts stay in full precision ({experts / full:.0%} of the bytes)"
    return facts


def megabytes(count: int) -> str:
    """Bytes as people write them: ``10.1 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count < 1e7 else f"{count / 1e6:.1f} MB"
