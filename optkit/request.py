"""A request made concrete, without torch: profile, model, samples and plans, each value with where it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optkit.errors import PlanConflict, UsageError, quoted
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

    :ivar plugins: technique names, or ``None`` for the profile's (none where ``plans`` says what to measure).
    :ivar plans: further plans to measure, names of each. :ivar each: also each technique of ``plugins`` alone.
    :ivar set: options and settings by dotted name. :ivar reference: a plan (names joined by ``+``) that ratios are taken to.
    :ivar timeout: seconds for one step of a trial. :ivar time_limit: seconds after which no further process pair is started. :ivar fresh: time again. :ivar force: compute predictions again.
    """

    model: str | None = None
    profile: str = "auto"
    plugins: list[str] | None = None
    plans: list[list[str]] = field(default_factory=list)
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
    time_limit: float | None = None
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
    source = model_source(request.model, shrink=request.shrink)
    samples = sample_set(request.samples, source, limit=request.limit or DEFAULT_LIMIT)
    task = request.task or ("generate" if samples.has_prompts else "score")
    if task not in ("generate", "score"):
        raise UsageError(f"task {quoted(task)} is not run by this version; choose generate or score")
    if task == "generate" and not samples.has_prompts:
        raise UsageError(
            "these samples are texts without prompts, which can be scored but not continued; use --task score, or samples with 'prompt'"
        )
    if missing_for(profile, machine, folders) or profile.device != machine.device:
        machine = profile.as_machine(machine)  # a plan for another machine, or for the CPU of a machine that has a GPU
    named, wishes = choose(request, profile, task)
    registry = discover(named)
    choices = [named[name] for name in plan_names(request, profile)]
    baseline = make_plan(registry, machine, task, [], wishes)
    together = make_plan(registry, machine, task, choices, wishes)
    plans = [together] if choices else []
    if request.each and len(choices) > 1:
        plans = [*(plan for choice in choices if (plan := alone(registry, machine, task, choice, wishes))), together]
    others = [make_plan(registry, machine, task, [named[name] for name in names], wishes) for names in request.plans if names]
    if request.reference:
        rival = make_plan(registry, machine, task, [named[name] for name in reference_names(request)], wishes)
        others.insert(0, rival)
    for plan in reversed(others):
        if plan.name not in {other.name for other in plans}:
            plans.insert(0, plan)
    return Setup(request, machine, profile, registry, source, samples, task, baseline, plans)


def plan_names(request: Request, profile: Profile) -> list[str]:
    """Techniques of the plan as a whole."""
    default = [] if request.plans else list(profile.defaults)
    names = dict.fromkeys(default if request.plugins is None else request.plugins)
    return [name for name in names if name not in request.without]


def reference_names(request: Request) -> list[str]:
    return request.reference.replace(",", "+").split("+") if request.reference else []


def alone(registry: Registry, machine: Machine, task: str, choice: Choice, wishes: list[Setting]) -> Plan | None:
    """The plan of one technique, or ``None`` where it needs others."""
    try:
        return make_plan(registry, machine, task, [choice], wishes)
    except PlanConflict:
        return None


def choose(request: Request, profile: Profile, task: str) -> tuple[dict[str, Choice], list[Setting]]:
    """Every technique of every plan with its options, by name, and settings, each with where it came from."""
    from optkit.api import split_options

    options, wishes = split_options(request.set, origin=request.origins.get("set", "--set"))
    defaults = profile.defaults
    named: dict[str, Choice] = {}
    for name in [*plan_names(request, profile), *(name for names in request.plans for name in names), *reference_names(request)]:
        if name in named:
            continue
        base = dict(defaults[name].options) if name in defaults else {}
        origins = dict.fromkeys(base, f"profile {profile.name}")
        mine = options.pop(name, {})
        named[name] = Choice(
            name, base | mine, origins | dict.fromkeys(mine, request.origins.get("set", "--set")), why_chosen(name, request, profile)
        )
    from_file = request.origins.get("set", "--set").endswith((".toml", "]"))
    if options and not from_file:  # a file's options wait for a plan that has use for them
        name = next(iter(options))
        raise UsageError(f"--set names an option of '{name}', which is not in this plan ({', '.join(named) or 'no techniques'})")
    wishes += profile_settings(profile, task)
    return named, wishes


def why_chosen(name: str, request: Request, profile: Profile) -> str:
    if request.plugins is None and name in plan_names(request, profile):
        return f"profile {profile.name}: {profile.defaults[name].because}"
    if name in (request.plugins or []):
        return f"asked for ({request.origins.get('plugins', '--plugins')})"
    return f"asked for ({'--plan' if any(name in names for names in request.plans) else '--reference'})"


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
