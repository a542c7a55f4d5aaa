"""What a plugin declares of its technique. Facts only: importing a plugin must not import torch."""

from __future__ import annotations

from collections.abc import Set
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from optkit.settings import Limit, Setting

Task = Literal["score", "generate", "train"]
Stage = Literal[
    "load", "merge", "architecture", "quantize", "adapter", "attention", "placement", "engine", "generation", "batching", "cache"
]
Role = Literal["load", "weights", "engine", "batching", "optimizer", "loss"]

Name = TypeVar("Name", bound=str)
#: Any set is taken, and kept as a frozen one.
Names = Annotated[Set[Name], AfterValidator(frozenset)]

#: The order in which techniques are applied.
STAGES: tuple[str, ...] = Stage.__args__  # type: ignore[attr-defined]
ROLES: tuple[str, ...] = Role.__args__  # type: ignore[attr-defined]

#: Properties by which techniques that never heard of each other decide whether they go together.
PROPERTIES: dict[str, str] = {
    "weights-quantized": "linear weights are stored in fewer bits",
    "weights-opaque": "weights are in a form that exporters and other engines cannot read",
    "weights-changed": "values of the full-precision weights were changed",
    "architecture-changed": "shapes or modules differ from the checkpoint's",
    "random-output": "the same prompt may get another text",
    "many-paths": "several continuations of a prompt are kept at once (beams)",
    "draft-tokens": "several tokens are proposed and verified a step",
    "python-in-forward": "Python hooks run inside the forward pass",
    "positions-restart": "several samples share a row, their positions start again",
    "adapter": "trainable adapter weights beside frozen ones",
    "weights-elsewhere": "some weights are not on the compute device",
    "outside-torch": "the computation does not run in torch",
}


class Options(BaseModel):
    """Base of a technique's options: unknown keys are errors, values are validated, each field has a description."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Devices(BaseModel):
    """Several devices that compute one plan together, and what of its work each of them takes.

    :param share: ``rows``: the whole model, and its rows of every batch. ``layers``: some of the layers, one device after another.
        ``slices``: a slice of every layer, all at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=1)
    share: Literal["rows", "layers", "slices"]


class Claims(BaseModel):
    """What ``configure`` answers: what this technique, with these options, wants on this machine.

    ``roles``, ``adds``, ``needs``, ``forbids`` and ``refuses`` add to those that the technique declares. ``notes`` are shown by ``plan``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: tuple[Setting, ...] = ()
    limits: tuple[Limit, ...] = ()
    roles: Names[Role] = frozenset()
    adds: Names[str] = frozenset()
    needs: Names[str] = frozenset()
    forbids: Names[str] = frozenset()
    refuses: Names[str] = frozenset()
    notes: tuple[str, ...] = ()
    lossy: bool | None = Field(default=None, description="whether outputs may differ beyond rounding, where the options decide it")
    weight_bits: float | None = Field(default=None, description="bits that a linear weight takes afterwards, for the memory estimate")
    devices: Devices | None = Field(
        default=None, description="several devices that compute together, for the limit and the memory estimate"
    )
    undescribed: str | None = Field(default=None, description="what decides the outputs and cannot be described: nothing is then memoized")
    problem: str | None = Field(default=None, description="why this technique cannot run here with these options, and the way out")


class Technique(BaseModel):
    """The facts of one technique.

    :param name: as users type it: lower case, digits and hyphens.
    :param stage: when it is applied (``STAGES``).
    :param roles: what it owns alone; two owners of one role are a conflict.
    :param honours: for the owner of ``load``, ``engine`` or ``batching``: the settings that it reads, ``"generate.*"`` for all of a group.
    :param adds: properties that the model or run has after it.
    :param needs: properties that some technique of the plan must add.
    :param forbids: properties that no *earlier* technique may have added.
    :param refuses: properties that no technique of the plan may add.
    :param after: properties whose techniques are applied before this one within the stage; ``before`` likewise.
    :param calibrates: it reads ``trial.calibration``, which is empty otherwise: what decides a result must be declared.
    :param lossy: outputs are expected to differ from the untouched model's beyond rounding.
    :param requires: distributions needed, as PEP 508 strings.
    :param extra: the extra of the plugin's distribution that installs them.
    :param preload: modules that its trials import anyway, and that only define things when imported: the server imports them once.
    :param exceptions: checks of ``optkit.testing`` that it cannot pass, each with the reason (``{"gpt2": "has no rotary positions"}``).
    :param tested_on: the devices on which it was really run, such as ``"cpu"`` or ``"NVIDIA H200"``; empty when nobody ran it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    stage: Stage
    summary: str
    roles: Names[Role] = frozenset()
    honours: Names[str] = frozenset()
    adds: Names[str] = frozenset()
    needs: Names[str] = frozenset()
    forbids: Names[str] = frozenset()
    refuses: Names[str] = frozenset()
    before: Names[str] = frozenset()
    after: Names[str] = frozenset()
    calibrates: bool = False
    lossy: bool = False
    tasks: Names[Task] = frozenset({"score", "generate", "train"})
    devices: Names[Literal["cpu", "cuda"]] = frozenset({"cpu", "cuda"})
    requires: tuple[str, ...] = ()
    extra: str | None = None
    preload: tuple[str, ...] = ()
    options: type[Options] = Options
    paper: str = ""
    exceptions: dict[str, str] = {}
    tested_on: tuple[str, ...] = ()

    @field_validator("summary")
    @classmethod
    def _one_line(cls, summary: str) -> str:
        if "\n" in summary or not summary.strip():
            raise ValueError("the summary is one line that says what the technique does and what it costs")
        return summary
