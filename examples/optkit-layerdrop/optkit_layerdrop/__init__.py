"""Layerdrop: the decoder layers whose removal hurts least are taken out.

Which ones is measured: one after the other, the layer goes without which calibration text stays most probable. Where there is no
calibration text, the layers that change the hidden states least go (their block influence, Men et al. 2024, arXiv:2403.03853), seen on
random tokens; the facts say so.

Price: quality, much of it beyond a tenth of the layers. Gain: weights, KV cache and time of every layer that goes. Not for a model
that is to answer exactly as before, nor for a shallow one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from optkit import Claims, Options, Technique, UsageError, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext


class LayerdropOptions(Options):
    layers: int = Field(1, ge=1, description="decoder layers to take out")
    keep_last: int = Field(1, ge=0, description="layers at the end that stay whatever is measured")
    calibration_tokens: int = Field(2048, ge=0, description="tokens of calibration text to measure on; 0 goes by hidden states alone")


technique = Technique(
    name="layerdrop",
    stage="architecture",
    summary="take out the decoder layers whose removal hurts least: less of everything, costs quality",
    adds=frozenset({"architecture-changed"}),
    forbids=frozenset({"weights-quantized", "adapter"}),
    calibrates=True,
    lossy=True,
    options=LayerdropOptions,
    paper="https://arxiv.org/abs/2403.03853",
    tested_on=("cpu",),
)


@hookimpl
def configure(options: LayerdropOptions) -> Claims:
    return Claims(notes=(f"measures every layer that is left, {options.layers} times over: the loading takes as many passes",))


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    from optkit_layerdrop.layers import Decoder
    from optkit_layerdrop.measuring import least_harmful

    options: Any = trial.options
    decoder = Decoder(model)
    before = len(decoder)
    if options.layers + options.keep_last >= before:
        raise UsageError(
            f"layerdrop: {options.layers} of {before} layers cannot go while the last {options.keep_last} stay; "
            f"set layerdrop.layers to at most {max(before - options.keep_last - 1, 0)}"
        )
    texts, measure = trial.calibration, "loss on calibration text"
    if not any(len(text) > 1 for text in texts) or not options.calibration_tokens:
        measure = "change of the hidden states on random tokens, for want of calibration text"
        trial.report(f"layerdrop goes by the {measure}")
        texts = []
    kept, steps = least_harmful(decoder, options.layers, options.keep_last, texts, options.calibration_tokens, trial.seed)
    decoder.keep(kept)
    gone = [index for index in range(before) if index not in kept]
    trial.notes["dropped"] = {"layers_before": before, "dropped": gone, "measured_by": measure, "harm": steps}


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    from optkit.modules import stored_bytes

    layers = model.config.get_text_config(decoder=True).num_hidden_layers if model is not None else 0
    facts = {"layers": layers} | trial.notes.get("dropped", {})
    if model is not None:
        facts["bytes_stored"] = stored_bytes(model)
    if "dropped" not in facts:
        return facts | {"summary": f"all {layers} layers"}
    names = ", ".join(str(index) for index in facts["dropped"])
    return facts | {"summary": f"{facts['layers_before']} → {layers} layers (without {names}), by {facts['measured_by']}"}
