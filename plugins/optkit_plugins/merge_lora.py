"""Merge LoRA: a trained adapter is added into the weights (LoRA, Hu et al. 2021, arXiv:2106.09685).

The two small products of every adapted layer disappear, and what remains is an ordinary model for every later technique. The sum is made
in float64 and rounded once to the weights' own dtype. Price: the adapter can no longer be switched or trained, and in bfloat16 the
rounding takes part of a small update (the proof says how much). Not before training that adapter further, and never into quantized
weights: merge first, quantize afterwards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from optkit import Claims, ModelSource, Options, Technique, UsageError, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class MergeLoraOptions(Options):
    adapter: Path | None = Field(None, description="folder of the adapter, as peft saves it; required")
    adapter_digest: str = Field("", description="digest of the adapter's files, filled in: results belong to contents, not to a path")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_digest(cls, values: dict[str, Any]) -> dict[str, Any]:
        if not values.get("adapter"):
            return values
        folder = Path(values["adapter"]).expanduser().absolute()
        found = str(ModelSource("adapter", "folder", str(folder)).fingerprint()["files"]) if folder.is_dir() else ""
        if values.get("adapter_digest", found) != found:
            raise ValueError(f"the files in {folder} are not those that the plan was made with; make the plan again")
        return {**values, "adapter": folder, "adapter_digest": found}


technique = Technique(
    name="merge-lora",
    stage="merge",
    summary="add a LoRA adapter into the weights: no products beside the layers any more, and it cannot be switched off again",
    adds=frozenset({"weights-changed"}),
    forbids=frozenset({"weights-quantized"}),
    lossy=True,
    requires=("peft>=0.19",),
    extra="lora",
    options=MergeLoraOptions,
    paper="https://arxiv.org/abs/2106.09685",
    tested_on=("cpu",),
)


@hookimpl
def configure(options: MergeLoraOptions) -> Claims | None:
    problem = problem_of(options.adapter)
    return Claims(problem=problem) if problem else None


def problem_of(folder: Path | None) -> str | None:
    """Why this folder cannot be merged, and the way out; ``None`` when it can, as far as its files tell."""
    way_out = "set merge-lora.adapter to a local folder that peft's save_pretrained wrote (nothing is downloaded)"
    if folder is None:
        return f"it needs an adapter; {way_out}"
    try:
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    except FileNotFoundError:
        return f"{folder} holds no adapter_config.json; {way_out}"
    except (OSError, ValueError, AttributeError) as error:
        return f"{folder / 'adapter_config.json'} cannot be read ({error}); {way_out}"
    if kind != "LORA":
        return f"the adapter in {folder} is of the kind {kind}, and only LORA can be merged here"
    if not any((folder / name).is_file() for name in WEIGHTS):
        return f"{folder} holds no {' or '.join(WEIGHTS)}; {way_out}"
    return None


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> PreTrainedModel:
    options = trial.options
    assert isinstance(options, MergeLoraOptions)
    problem = problem_of(options.adapter)
    if problem:
        raise UsageError(f"merge-lora: {problem}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise UsageError(
            "merge-lora: this model's weights are quantized, and a merge into them loses the adapter; merge into the full model"
        )
    adapted = load(model, options.adapter)  # type: ignore[arg-type]
    config = adapted.peft_config["default"]
    layers = adapted_layers(adapted)
    try:
        refuse_tied(model, layers)
        changes = [merge(layer) for layer in layers.values()]
    finally:
        merged = adapted.unload()
    moved = [change for change in changes if change[0]]
    trial.notes["merged"] = {
        "layers": len(moved),
        "rank": config.r,
        "alpha": config.lora_alpha,
        "relative_change": round(sum(change for change, _ in moved) / len(moved), 6) if moved else 0.0,
        "lost_to_rounding": round(sum(lost for _, lost in moved) / len(moved), 6) if moved else 0.0,
    }
    return merged


def load(model: PreTrainedModel, folder: Path) -> Any:
    """The model with the adapter beside it. :raises UsageError: where the adapter was made for another model."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        # Weights that the adapter's file lacks would stay random, or at zero: an error here, not a warning.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        # refuse_tied says what that means here.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
        try:
            return PeftModel.from_pretrained(model, str(folder), is_trainable=False, torch_device=str(model.device))
        except (RuntimeError, ValueError, UserWarning) as error:
            what = " ".join(str(error).split())[:300]
            raise UsageError(
                f"merge-lora: the adapter in {folder} does not fit this model: {what}; name the model that it was trained on"
            ) from error


def adapted_layers(adapted: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in adapted.base_model.model.named_modules() if isinstance(module, LoraLayer)}


def refuse_tied(model: PreTrainedModel, layers: dict[str, Any]) -> None:
    """An embedding that is also the head cannot change in one of its two places."""
    if not getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return
    shared: Any = model.get_input_embeddings()
    shared = shared.get_base_layer() if hasattr(shared, "get_base_layer") else shared
    for name, layer in layers.items():
        if getattr(layer.get_base_layer(), "weight", None) is shared.weight:
            raise UsageError(
                f"merge-lora: the adapter changes {name}, whose weight is both embedding and head, and a merge would change the two alike; "
                "load the model with tie_word_embeddings=false and its head saved on its own"
            )


def merge(layer: Any) -> tuple[float, float]:
    """Add one layer's product to its weight, in float64.

    :return: size of the change relative to the weight, and the part of it that rounding to the weight's dtype took.
    """
    base = layer.get_base_layer()
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    if not all(dtype.is_floating_point for dtype in dtypes.values()):
        raise UsageError(f"merge-lora: {type(base).__name__} stores integers; merge before quantizing")
    layer.double()
    before = {name: parameter.data.clone() for name, parameter in base.named_parameters()}
    layer.merge(safe_merge=True)
    weight = change = lost = 0.0
    for name, parameter in base.named_parameters():
        exact = parameter.data
        parameter.data = exact.to(dtypes[name])
        weight += float(before[name].square().sum())
        change += float((exact - before[name]).square().sum())
        lost += float((exact - parameter.data).square().sum())
    return (change / weight) ** 0.5 if weight else 0.0, (lost / change) ** 0.5 if change else 0.0


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    facts = trial.notes.get("merged")
    if facts is None or not facts["layers"]:
        return {"layers": 0, "summary": "no adapter merged" if facts is None else "the adapter changes nothing (its products are zero)"}
    summary = f"rank {facts['rank']} into {facts['layers']} layers, weights moved by {facts['relative_change']:.2%}"
    if facts["lost_to_rounding"] > 0.01:
        summary += f", rounding took {facts['lost_to_rounding']:.0%} of that"
    return facts | {"summary": summary}
