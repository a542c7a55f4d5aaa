"""What a profile holds: a machine's facts with their sources, and the techniques, batch sizes and lengths to begin with there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

from optkit.machine import Machine
from optkit.technique import Task

Dtype = Literal["fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "fp6", "fp4", "int8", "int4"]
#: Facts and their units; each may have an entry in ``sources``, and in the built-in profiles each has.
FACTS = {
    "memory_gb": "GB a device",
    "host_memory_gb": "GB",
    "bandwidth_gb_s": "GB/s",
    "measured_bandwidth_gb_s": "GB/s",
    "compute_capability": "",
    "peak_tflops": "TFLOP/s",
    "measured_tflops": "TFLOP/s",
}


def _readable(text: str) -> str:
    if any(not (char.isprintable() or char == "\n") for char in text):
        raise ValueError("holds control or invisible characters: remove them")
    return " ".join(text.split())


def _json_options(options: dict[str, Any]) -> dict[str, Any]:
    _check_option(options, depth=0)
    return options


def _check_option(value: Any, depth: int) -> None:
    if depth > 8:
        raise ValueError("is nested deeper than 8 levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _readable(key)
            _check_option(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_option(item, depth + 1)
    elif isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"holds {value}, which is no finite number")
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            raise ValueError("holds a whole number beyond 64 bits")
    elif isinstance(value, str):
        _readable(value)
    else:
        raise ValueError(f"holds a {type(value).__name__}: only strings, numbers, true, false, lists and tables can be options")


Text = Annotated[str, Field(max_length=2000), AfterValidator(_readable)]
Line = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_readable)]
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
TechniqueName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Matches(_Table):
    """Which machines this profile describes, beside ``device``, ``compute_capability``, ``count`` and ``memory_gb``.

    :param names: the device's name holds one of these as whole words (``H200`` is not in ``GH200``); any name where the list is empty.
    :param excludes: the name holds none of these.
    :param environment: only there.
    """

    names: Annotated[tuple[Line, ...], Strict(False)] = ()
    excludes: Annotated[tuple[Line, ...], Strict(False)] = ()
    environment: Literal["colab", "kaggle"] | None = None


class TechniqueDefault(_Table):
    """A technique that runs begin with on this machine."""

    options: Annotated[dict[str, Any], AfterValidator(_json_options)] = {}
    because: Text = ""


class TaskDefault(_Table):
    """Samples a batch, and the most tokens that a sample (prompt and answer) takes."""

    batch_size: int = Field(ge=1, le=100_000)
    sequence_length: int = Field(ge=1, le=100_000_000)
    because: Text = ""


class Expected(_Table):
    """A published or measured speed on this machine, for comparison. ``conditions`` say what else it depends on."""

    task: Task
    model: Line
    dtype: Line
    batch_size: int = Field(ge=1, le=100_000)
    tokens_per_second: Positive
    conditions: Text = ""
    source: Line


class Profile(_Table):
    """One machine's facts and defaults. Rates are dense (no structured sparsity) and a device's, not the machine's.

    :param count: devices that the defaults are made for.
    :param memory_gb: a device's memory as it is sold; drivers count it in units of 2**30 bytes. ``None``: what the machine has.
    :param bandwidth_gb_s: the data sheet's memory bandwidth, in 10**9 bytes a second.
    :param max_memory_fraction: the share of a device's memory that a run may plan with.
    :param cleanup_every: batches between two cleanups of the allocator's cache; 0 for never.
    :param sources: fact -> the document that it is from; ``"peak_tflops.bf16"`` for one dtype alone.
    :param reasons: why ``max_memory_fraction`` and ``cleanup_every`` are what they are.
    :param defaults: technique -> options and why, in the file's order.
    :param origin: ``"built-in"``, ``"detected"``, or the file.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    summary: Line
    extends: str | None = None
    matches: Matches = Matches()
    device: Literal["cuda", "cpu"]
    count: int = Field(1, ge=1, le=1024)
    memory_gb: Positive | None = None
    host_memory_gb: Positive | None = None
    bandwidth_gb_s: Positive | None = None
    measured_bandwidth_gb_s: Positive | None = None
    compute_capability: Annotated[tuple[int, int], Strict(False)] | None = None
    peak_tflops: dict[Dtype, Positive] = {}
    measured_tflops: dict[Dtype, Positive] = {}
    max_memory_fraction: float = Field(0.85, gt=0, le=0.98, allow_inf_nan=False)
    cleanup_every: int = Field(0, ge=0, le=1_000_000)
    sources: dict[str, Line] = {}
    reasons: dict[Literal["max_memory_fraction", "cleanup_every"], Text] = {}
    expected: Annotated[tuple[Expected, ...], Strict(False)] = ()
    defaults: dict[TechniqueName, TechniqueDefault] = {}
    tasks: dict[Task, TaskDefault] = {}
    origin: str = "built-in"

    @property
    def memory_bytes(self) -> int | None:
        """One device's memory in bytes."""
        return None if self.memory_gb is None else int(self.memory_gb * 2**30)

    def source_of(self, fact: str) -> str | None:
        """The document that a fact is from: ``"memory_gb"``, ``"peak_tflops"`` or ``"peak_tflops.bf16"``."""
        return self.sources.get(fact) or self.sources.get(fact.partition(".")[0])

    def facts(self) -> list[Fact]:
        """Every fact that is stated, with unit and source, for ``profiles show``."""
        rows: list[Fact] = []
        for name, unit in FACTS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                rows += [Fact(f"{name}.{dtype}", rate, unit, self.source_of(f"{name}.{dtype}")) for dtype, rate in value.items()]
            elif value is not None:
                shown = "sm_{}{}".format(*value) if isinstance(value, tuple) else value
                rows.append(Fact(name, shown, unit, self.source_of(name)))
        return rows

    def as_machine(self, here: Machine) -> Machine:
        """The machine that this profile describes, with ``here`` for all that it leaves open: for plans of a machine one does not have."""
        if self.device == "cpu":
            return replace(here, device="cpu", name=here.cpu_model, count=1, compute_capability=None, memory_bytes=here.host_memory_bytes)
        return replace(
            here,
            device="cuda",
            name=self.matches.names[0] if self.matches.names else self.name,
            count=self.count,
            compute_capability=self.compute_capability,
            memory_bytes=self.memory_bytes or here.memory_bytes,
            host_memory_bytes=int(self.host_memory_gb * 2**30) if self.host_memory_gb else here.host_memory_bytes,
            gpu_problem=None,
        )


@dataclass(frozen=True)
class Fact:
    name: str
    value: float | str
    unit: str
    source: str | None
