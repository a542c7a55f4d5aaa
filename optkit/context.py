"""TrialContext: what one technique may see while a trial runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optkit.engine import Engine
    from optkit.machine import Machine
    from optkit.settings import Settings
    from optkit.sources import ModelSource
    from optkit.technique import Options


@dataclass
class TrialContext:
    """One technique's view of a running trial. ``trial`` in every hook.

    :ivar technique: the technique's name.
    :ivar options: its validated options.
    :ivar settings: the resolved settings, read-only (``trial.settings["load.dtype"]``).
    :ivar task: ``score``, ``generate`` or ``train``.
    :ivar device: torch's name of the compute device, ``"cpu"`` or ``"cuda"``.
    :ivar source: where the model came from.
    :ivar folder: an empty folder for files of this trial; it is removed afterwards.
    :ivar tokenizer: the transformers tokenizer.
    :ivar engine: the engine, once it is built.
    :ivar calibration: token ids of samples that are *not* evaluated, one list a sample, for techniques that calibrate; may be empty.
    :ivar changes: what the model's snapshots showed to have changed in this technique's ``transform_model``.
    :ivar kernels: operator or kernel name -> calls, from the profiling pass; empty before it.
    :ivar notes: the technique's own memory between its hooks.
    """

    technique: str
    options: Options
    settings: Settings
    task: str
    device: str
    seed: int
    machine: Machine
    source: ModelSource
    folder: Path
    tokenizer: Any = None
    engine: Engine | None = None
    calibration: list[list[int]] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    report: Callable[[str], None] = lambda text: None

    @property
    def dtype(self) -> Any:
        """The setting ``load.dtype`` as a ``torch.dtype``, or ``None`` for the checkpoint's own."""
        import torch

        name = self.settings["load.dtype"]
        return getattr(torch, name) if name else None
