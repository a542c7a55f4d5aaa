"""NF4: linear weights as 4-bit NormalFloat with one scale a block of 64 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

The 16 values are quantiles of a normal distribution, which trained weights resemble. Linear weights take a bit more than a quarter of
their bf16 bytes, without calibration and in place. Price: a little quality, and speed: bitsandbytes expands the weights for every
product, so decoding is usually slower than bf16. Take it to fit a model into memory, or to fine-tune adapters on a frozen base; not to
make a model that fits faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optkit import Claims, Technique, hookimpl
from optkit_plugins import _bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import Machine, TrialContext

technique = Technique(
    name="nf4",
    stage="quantize",
    summary="4-bit NormalFloat linear weights: a quarter of the bytes, a little quality, usually slower to decode",
    roles=frozenset({"weights"}),
    adds=frozenset({"weights-quantized", "weights-opaque"}),
    lossy=True,
    requires=("bitsandbytes>=0.50",),
    extra="nf4",
    preload=("bitsandbytes",),
    options=_bitsandbytes.FourBitOptions,
    paper="https://arxiv.org/abs/2305.14314",
    tested_on=("cpu", "NVIDIA H200"),
)


@hookimpl
def configure(options: _bitsandbytes.FourBitOptions, task: str, machine: Machine) -> Claims:
    return _bitsandbytes.claims(options, task, machine)


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    _bitsandbytes.quantize(model, trial, "nf4")


@hookimpl
def save_model(model: PreTrainedModel, trial: TrialContext) -> None:
    _bitsandbytes.save(model, trial)


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    return _bitsandbytes.facts(model, trial)
