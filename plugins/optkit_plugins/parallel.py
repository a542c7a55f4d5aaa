"""Parallel: several GPUs. A replica on each, the layers spread over them, or a slice of every layer on each.

``replicas``: each device holds the model and takes its rows of every batch: near-linear where a batch has rows for all, nothing for a
single prompt. ``layers``: each device holds some of the layers, one after another: for a model that does not fit one GPU.
``tensor``: each device holds a slice of every layer (as the model's own plan in transformers says) and they add their parts up twice a
layer (Megatron-LM, Shoeybi et al. 2019): every prompt gets faster, where the step is compiled; else decoding waits for Python. Not for
one GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optkit import Claims, Devices, Engine, Machine, Options, Setting, Settings, Technique, UnavailableError, UsageError, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext

TITLES = {"replicas": "a replica a device", "layers": "layers spread", "tensor": "a slice of every layer a device"}
SHARES: dict[str, Literal["rows", "layers", "slices"]] = {"replicas": "rows", "layers": "layers", "tensor": "slices"}


class ParallelOptions(Options):
    mode: Literal["replicas", "layers", "tensor"] = Field("replicas", description="what each device holds: the model, layers, slices")
    devices: str = Field("auto", description="such as cuda:0,cuda:1; auto: every GPU of the first one's model")


technique = Technique(
    name="parallel",
    stage="placement",
    summary="several GPUs: a replica each, layers spread, or tensor parallel; nothing for a single prompt on replicas",
    refuses=frozenset({"outside-torch", "weights-elsewhere"}),
    tasks=frozenset({"score", "generate"}),
    options=ParallelOptions,
    paper="https://arxiv.org/abs/1909.08053",
    tested_on=("cpu", "NVIDIA H200"),
)


def devices_of(options: ParallelOptions, machine: Machine) -> list[str]:
    if options.devices != "auto":
        return [name.strip() for name in options.devices.split(",") if name.strip()]
    return [f"cuda:{at}" for at in range(machine.count)] if machine.device == "cuda" else ["cpu"]


@hookimpl
def configure(options: ParallelOptions, machine: Machine) -> Claims:
    devices = devices_of(options, machine)
    problem = what_is_wrong(devices, machine, options)
    settings, adds = [], set()
    if options.mode == "replicas":
        size = len(devices) * Settings({})["batch.size"]
        settings.append(Setting(name="batch.size", value=size, because=f"rows of a batch are shared out over {len(devices)} devices"))
    if options.mode == "layers":
        adds.add("python-in-forward")
        settings.append(
            Setting(name="load.device_map", value="cpu", because="the whole model need not fit one GPU: layers are spread later")
        )
    return Claims(
        settings=tuple(settings),
        adds=frozenset(adds),
        refuses=frozenset({"weights-quantized"}) if options.mode == "tensor" else frozenset(),
        notes=(f"{TITLES[options.mode]}: {', '.join(devices)}",),
        devices=Devices(count=max(1, len(set(devices))), share=SHARES[options.mode]),
        problem=problem,
    )


def what_is_wrong(devices: list[str], machine: Machine, options: ParallelOptions) -> str | None:
    """Why these devices cannot be used, with the way out."""
    if len(devices) < 2:
        many = f"this machine has {machine.count} GPU" if machine.device == "cuda" else "this machine computes on its CPU"
        return f"several devices are needed, and {many}; leave out parallel (or, to try it, set parallel.devices={machine.device},{machine.device})"
    kinds = {name.partition(":")[0] for name in devices}
    if kinds != {machine.device}:
        return (
            f"parallel.devices = {options.devices} are not all of the kind '{machine.device}' that this machine computes on; leave it out"
        )
    missing = [name for name in devices if name.startswith("cuda:") and int(name[5:]) >= machine.count]
    if missing:
        return f"there is no {missing[0]}: this machine has {machine.count} GPU(s); leave out parallel.devices, or leave out parallel"
    if machine.device == "cpu" and options.mode == "layers":
        return "layers on one CPU are where they were; leave out parallel, or set parallel.mode=replicas"
    return None


# ---------------------------------------------------------------- the model


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> PreTrainedModel | None:
    """Start the other devices' processes with the model as it is now, or spread it here."""
    options = trial.options
    assert isinstance(options, ParallelOptions)
    devices = devices_of(options, trial.machine)
    if options.mode == "layers":
        trial.notes["parallel"] = {"devices": spread_layers(model, devices)}
        return None
    if options.mode == "tensor":
        return slice_up(model, trial, devices)

    from optkit_plugins.kernels.parallel.workers import Worker

    workers = [Worker(model, device, seed=trial.seed + rank) for rank, device in enumerate(devices[1:], 1)]
    trial.notes["parallel"] = {"devices": devices, "workers": workers}
    return None


def spread_layers(model: PreTrainedModel, devices: list[str]) -> list[str]:
    """:return: the devices used. :raises UnavailableError: for a model that is no stack of layers."""
    from optkit_plugins.kernels.parallel.layers import spread

    try:
        return spread(model, devices)
    except ValueError as error:
        raise UnavailableError(f"{error} that could be spread; set parallel.mode=replicas") from None


def slice_up(model: PreTrainedModel, trial: TrialContext, devices: list[str]) -> PreTrainedModel:
    """This process's slices of the model; each other device's process takes its own."""
    from optkit_plugins.kernels.parallel.tensor import sharder
    from optkit_plugins.kernels.parallel.workers import Worker, joined_already, leave

    check_sliceable(model, len(devices))
    if joined_already():
        raise UnavailableError("this process is in a group of processes already: close the other engine of parallel.mode=tensor first")
    meeting, world = trial.folder / "meeting", len(devices)
    meeting.unlink(missing_ok=True)
    notes = trial.notes["parallel"] = {"devices": devices, "workers": []}
    try:
        for rank, device in enumerate(devices[1:], 1):
            notes["workers"].append(Worker(model, device, seed=trial.seed, prepare=sharder(meeting, device, rank, world)))
        return sharder(meeting, devices[0], 0, world)(model)
    except Exception:
        leave()
        for worker in notes["workers"]:
            worker.close()
        raise


def check_sliceable(model: PreTrainedModel, count: int) -> None:
    """:raises UnavailableError: for a model without a plan, or with one that holds more than linear layers of a divisible size (experts,
    say). :raises UsageError: where slices are not whole heads."""
    from optkit_plugins.kernels.parallel.tensor import why_whole

    if not model.tp_plan:
        raise UnavailableError(
            f"transformers has no tensor parallel plan for {type(model).__name__}; set parallel.mode=replicas or parallel.mode=layers"
        )
    config: Any = model.config.get_text_config(decoder=True)
    heads = (config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    if any(number % count for number in heads):
        raise UsageError(
            f"{count} devices cannot share {heads[0]} query heads and {heads[1]} KV heads evenly; give a number of parallel.devices "
            "that divides both, or set parallel.mode=layers"
        )
    problem = why_whole(model, count)
    if problem:
        raise UnavailableError(f"{type(model).__name__} cannot be sliced: {problem}; set parallel.mode=replicas or parallel.mode=layers")


# ---------------------------------------------------------------- the engine


@hookimpl
def wrap_engine(engine: Engine, trial: TrialContext) -> Engine | None:
    """The other processes build the engine that this one has built, and answer together with it."""
    from optkit import TransformersEngine

    options = trial.options
    assert isinstance(options, ParallelOptions)
    if options.mode == "layers":
        return None
    if not isinstance(engine, TransformersEngine):
        raise UnavailableError(f"another process cannot build the engine '{engine.name}' as this one did; leave out its technique")

    from optkit_plugins.kernels.parallel.engines import Lockstep, Replicas
    from optkit_plugins.kernels.parallel.workers import portable, settle

    notes = trial.notes["parallel"]
    for worker in notes["workers"]:
        worker.ask("build", portable(engine.trial))
    settle(notes["workers"])
    release()
    if options.mode == "tensor":
        return Lockstep(engine, notes["workers"])
    notes["engine"] = Replicas(engine, notes["devices"][0], notes["workers"])
    return notes["engine"]


def release() -> None:
    """Free the memory of tensors that other processes have copied by now."""
    import gc

    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    """The devices that hold a part, and those that have answered rows of batches."""
    notes = trial.notes.get("parallel")
    if notes is None:
        return {"devices": [trial.device], "summary": "one device"}
    options = trial.options
    assert isinstance(options, ParallelOptions)
    facts: dict[str, Any] = {"mode": options.mode, "devices": notes["devices"]}
    said = f"{TITLES[options.mode]}: {', '.join(notes['devices'])}"
    if "engine" in notes:
        served = sorted(notes["engine"].served)
        facts["served"] = [notes["devices"][at] for at in served]
        said += f"; {len(served)} of {len(notes['devices'])} answered rows"
    if options.mode == "tensor":
        facts |= tensor_facts(model)
        said += f"; sums by {facts['exchange']}"
    return facts | {"summary": said}


def tensor_facts(model: PreTrainedModel) -> dict[str, Any]:
    """The slices of this process, and how processes exchange what they have computed."""
    from optkit_plugins.kernels.parallel.exchange import joined
    from optkit_plugins.kernels.parallel.tensor import sliced

    exchange = joined()
    facts: dict[str, Any] = {**sliced(model), "exchange": exchange.form}
    return facts | ({"not_direct": exchange.problem} if exchange.problem else {})


@hookimpl
def save_model(trial: TrialContext) -> None:
    """:raises UnavailableError: for slices, of which this process holds its own alone."""
    options = trial.options
    assert isinstance(options, ParallelOptions)
    if options.mode == "tensor":
        raise UnavailableError("a process of parallel.mode=tensor holds a slice of the model alone; leave out parallel to save it")
