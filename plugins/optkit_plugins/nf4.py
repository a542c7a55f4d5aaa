"""NF4: linear weights as 4-bit NormalFloat with one scale a block of 64 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

The 16 values are quantiles of a normal distribution, which trained weights resemble. Linear weights take a bit more than a quarter of
their bf16 bytes, without calibration and in place. Price: a little quality. Speed: on CUDA from sm_80 a fused kernel multiplies few
sequences without expanding the weights, faster than bf16; bitsandbytes expands them for every product, usually slower. Take it to fit a
model into memory, to decode few sequences on a GPU, or to fine-tune adapters on a frozen base; not for large batches or long prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optkit import Claims, Technique, hookimpl
from optkit_plugins import _bitsandbytes, _fused_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import Machine, TrialContext

technique = Technique(
    name="nf4",
    stage="quantize",
    summary="4-bit NormalFloat linear weights: a quarter of the bytes, a little quality; faster for few sequences on a GPU from sm_80",
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
def save_model(model: PreTrainedModel) -> None:
    """transformers writes 4-bit models; layers of the fused kernel are put back into bitsandbytes' form for that."""
    _fused_kernels.give_back(model)


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    return _bitsandbytes.facts(model, trial)
