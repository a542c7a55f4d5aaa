"""FP4: linear weights as 4-bit floats (one sign, two exponent bits, one mantissa bit) with one scale a block of 64.

The bytes and the speed of NF4, from the same library (Dettmers et al. 2023, arXiv:2305.14314, section 2), with values spaced as a float's
instead of as a normal distribution's quantiles. On normally distributed weights its error is larger than NF4's: take it to compare the
two, or for weights that are far from normal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optkit import Claims, Technique, hookimpl
from optkit_plugins import _bitsandbytes, _fused_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import Machine, TrialContext

technique = Technique(
    name="fp4",
    stage="quantize",
    summary="4-bit float linear weights: a quarter of the bytes, less exact than NF4 on normal weights",
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
    _bitsandbytes.quantize(model, trial, "fp4")


@hookimpl
def save_model(model: PreTrainedModel) -> None:
    """transformers writes 4-bit models; layers of the fused kernel are put back into bitsandbytes' form for that."""
    _fused_kernels.give_back(model)


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    return _bitsandbytes.facts(model, trial)
