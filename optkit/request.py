"""A request made concrete, without torch: profile, model, samples and plans, each value with where it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optkit.errors import PlanConflict, UsageError
from optkit.machine import Machine, detect
from optkit.plan import Choice, Plan, make_plan
from optkit.profile import Profile, load_profile, missing_for
from optkit.registry import Registry, discover
from optkit.samples import SampleSet, sample_set
from optkit.settings import Setting
from optkit.sources import ModelSource, model_source

DEFAULT_LIMIT = 200


@dataclass
class Request:
    """What somebody wants measured. Every field has a default; ``origins`` says where a value came from.

    :ivar plugins: technique names, or ``None`` for the profile's. :ivar each: also each technique alone.
    :ivar set: options and settings by dotted name. :ivar reference: a plan (names joined by ``+``) that ratios are taken to.
    :ivar timeout: seconds for one step of a trial. :ivar fresh: time again. :ivar force: compute predictions again.
    """

    model: str | None = None
    profile: str = "auto"
    plugins: list[str] | None = None
    without: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    samples: str | None = None
    limit: int | None = None
    repeats: int | None = None
    seed: int = 0
    each: bool = False
    reference: str | None = None
    thorough: bool = False
    fresh: bool = False
    force: bool = False
    shrink: bool = False
    metric: str | None = None
    cache_dir: str | None = None
    cache_max_age: float | None = None
    timeout: float = 900.0
    store_text: bool = True
    profiles_dir: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    progress: Callable[[int, int, str], None] = lambda done, total, text: None
    warn: Callable[[str], None] = lambda text: None


@dataclass
class Setup:
    """A request made concrete, without torch: what would run, and on what."""

    request: Request
    machine: Machine
    profile: Profile
    registry: Registry
    source: ModelSource
    samples: SampleSet
    task: str
    baseline: Plan
    plans: list[Plan]

    @property
    def all_plans(self) -> list[Plan]:
        return [self.baseline, *self.plans]


def prepare(request: Request) -> Setup:
    """Plans and sources. :raises OptkitError: for anything that is wrong with the request, before anything heavy runs."""
    machine = detect()
    folders = [Path(folder) for folder in request.profiles_dir]
    profile = load_profile(request.profile, folders, machine)
    registry = discover()
    source = model_source(request.model, shrink=request.shrink)
    samples = sample_set(request.samples, source, limit=request.limit or DEFAULT_LIMIT)
    task = request.task or ("generate" if samples.has_prompts else "score")
    if task not in ("generate", "score"):
        raise UsageError(f"task '{task}' is not run by this version; choose generate or score")
    if task == "generate" and not samples.has_prompts:
        raise UsageError(
            "these samples are texts without prompts, which can be scored but not continued; use --task score, or samples with 'prompt'"
        )
    if missing_for(profile, machine, folders) or profile.device != machine.device:
        machine = profile.as_machine(machine)  # a plan for another machine, or for the CPU of a machine that has a GPU
    choices, wishes = choose(request, profile, task)
    baseline = make_plan(registry, machine, task, [], wishes)
    together = make_plan(registry, machine, task, choices, wishes)
    plans = [together] if choices else []
    if request.each and len(choices) > 1:
        plans = [*(plan for choice in choices if (plan := alone(registry, machine, task, choice, wishes))), together]
    if request.reference:
        wanted = {choice.name: choice for choice in choices}
        names = request.reference.replace(",", "+").split("+")
        rival = make_plan(registry, machine, task, [wanted.get(name, Choice(name)) for name in names], wishes)
        if rival.name not in {plan.name for plan in plans}:
            plans.insert(0, rival)
    return Setup(request, machine, profile, registry, source, samples, task, baseline, plans)


def alone(registry: Registry, machine: Machine, task: str, choice: Choice, wishes: list[Setting]) -> Plan | None:
    """The plan of one technique, or ``None`` where it needs others."""
    try:
        return make_plan(registry, machine, task, [choice], wishes)
    except PlanConflict:
        return None


def choose(request: Request, profile: Profile, task: str) -> tuple[list[Choice], list[Setting]]:
    """Techniques with options, and settings, each with where it came from."""
    from optkit.api import split_options

    options, wishes = split_options(request.set, origin=request.origins.get("set", "--set"))
    defaults = profile.defaults
    asked = request.plugins is not None
    names = list(dict.fromkeys(request.plugins if request.plugins is not None else list(defaults)))
    choices = []
    for name in names:
        if name in request.without:
            continue
        base = dict(defaults[name].options) if name in defaults else {}
        origins = dict.fromkeys(base, f"profile {profile.name}")
        mine = options.pop(name, {})
        because = (
            f"asked for ({request.origins.get('plugins', '--plugins')})" if asked else f"profile {profile.name}: {defaults[name].because}"
        )
        choices.append(Choice(name, base | mine, origins | dict.fromkeys(mine, request.origins.get("set", "--set")), because))
    if options and not request.origins.get("set", "--set").endswith(
        (".toml", "]")
    ):  # a file's options wait for a plan that has use for them
        name = next(iter(options))
        raise UsageError(f"--set names an option of '{name}', which is not in this plan ({', '.join(names) or 'no techniques'})")
    wishes += profile_settings(profile, task)
    return choices, wishes


def profile_settings(profile: Profile, task: str) -> list[Setting]:
    """Batch size and length that the profile begins with."""
    default = profile.tasks.get(task)  # type: ignore[call-overload]
    if default is None:
        return []
    why = {"because": default.because, "by": f"profile {profile.name}", "strength": "profile"}
    return [
        Setting(name="batch.size", value=default.batch_size, **why),
        Setting(name="batch.max_length", value=default.sequence_length, **why),
    ]
