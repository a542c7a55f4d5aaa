"""Every hook: when it is called, by whom it is answered, and what it gives. All bodies are empty.

A plugin is a module with a ``technique`` and any of these functions, marked with ``@optkit.hookimpl``. It may take fewer arguments
than are listed. ``trial`` is an ``optkit.TrialContext``: what one technique may see.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from optkit.context import TrialContext
    from optkit.engine import Engine
    from optkit.machine import Machine
    from optkit.samples import Sample
    from optkit.sources import ModelSource
    from optkit.technique import Claims, Options, Task

hookspec = pluggy.HookspecMarker("optkit")
hookimpl = pluggy.HookimplMarker("optkit")


@hookspec
def configure(options: Options, task: Task, machine: Machine) -> Claims | None:  # type: ignore[empty-body]
    """What this technique wants: settings, limits, roles, properties. Called for every technique while the plan is made, without torch."""


@hookspec
def load_model(source: ModelSource, trial: TrialContext) -> PreTrainedModel:  # type: ignore[empty-body]
    """The model, on ``trial.device``. Called once, for the owner of the role ``load``; by default transformers loads it."""


@hookspec
def transform_model(model: PreTrainedModel, trial: TrialContext) -> PreTrainedModel | None:  # type: ignore[empty-body]
    """The changed model, or ``None`` when it was changed in place. Called in plan order, each with the result of the one before.

    What changed (types, shapes, bytes, values) is recorded round each call and shown as proof.
    """


@hookspec
def prepare_samples(samples: list[Sample], trial: TrialContext) -> list[Sample]:  # type: ignore[empty-body]
    """The training samples, changed. Called in plan order in the task ``train`` only, never with validation samples."""


@hookspec
def build_engine(model: PreTrainedModel, trial: TrialContext) -> Engine:  # type: ignore[empty-body]
    """What generates and scores batches. Called once, for the owner of the role ``engine``; by default ``optkit.TransformersEngine``."""


@hookspec
def batch_strategy(samples: list[Sample], trial: TrialContext) -> list[list[int]]:  # type: ignore[empty-body]
    """Indices of the samples of each batch; every index exactly once. Called for the owner of ``batching``; ``trial.engine`` exists."""


@hookspec
def wrap_engine(engine: Engine, trial: TrialContext) -> Engine | None:  # type: ignore[empty-body]
    """The engine wrapped, or ``None``. Called in plan order after ``build_engine``."""


@hookspec
def build_optimizer(model: PreTrainedModel, trial: TrialContext) -> torch.optim.Optimizer:  # type: ignore[empty-body]
    """The optimizer. Called in the task ``train``, for the owner of the role ``optimizer``."""


@hookspec
def build_loss(model: PreTrainedModel, trial: TrialContext) -> Any:  # type: ignore[empty-body]
    """A function of (model, batch) that gives the loss. Called in the task ``train``, for the owner of the role ``loss``."""


@hookspec
def evaluate(outputs: list[dict[str, Any]], samples: list[Sample], trial: TrialContext) -> dict[str, float]:  # type: ignore[empty-body]
    """Further metrics of this engine's outputs, by name. All answers are merged; a name given twice is an error."""


@hookspec
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:  # type: ignore[empty-body]
    """Facts (JSON values, no timings) that show whether the technique is at work, after the timed repeats.

    Called for the optimized model *and for the untouched baseline*: where both give the same facts and the model did not change, the
    verdict is "no effect". ``trial.kernels`` holds the operators and kernels that a profiler saw in a pass of its own.
    """


@hookspec
def save_model(model: PreTrainedModel, folder: Path, trial: TrialContext) -> bool | None:  # type: ignore[empty-body]
    """Write the model as an ordinary Hugging Face folder (or the engine's own format); return ``True`` when done.

    Called by ``optkit export`` in reverse plan order until one answers; by default ``model.save_pretrained(folder)``.
    """
