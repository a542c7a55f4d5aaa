"""profile + names + options -> Plan: the ordered techniques with options, each choice with its reason. Made without importing torch."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from optkit.errors import PlanConflict, UsageError, did_you_mean
from optkit.machine import Machine
from optkit.registry import Registry
from optkit.settings import Setting, Settings, resolve
from optkit.technique import STAGES, Claims, Devices, Options, Technique

#: What is read when no technique owns the role.
#: Settings that transformers itself has nothing for: only a technique can read them.
NOT_BY_DEFAULT = frozenset({"generate.slots"})
#: The role whose owner reads a group of settings.
READER = {"load": "load", "generate": "engine", "batch": "batching", "train": "engine"}


@dataclass(frozen=True)
class Choice:
    """A technique that somebody asked for, with options and where each came from."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    because: str = "asked for"


@dataclass(frozen=True)
class Step:
    """One technique in its place."""

    technique: Technique
    options: Options
    claims: Claims
    choice: Choice
    version: str

    @property
    def name(self) -> str:
        return self.technique.name

    @property
    def adds(self) -> Set[str]:
        return self.technique.adds | self.claims.adds

    @property
    def roles(self) -> Set[str]:
        return self.technique.roles | self.claims.roles


@dataclass(frozen=True)
class Plan:
    """The ordered techniques, the resolved settings with their reasons, and notes for the reader."""

    task: str
    steps: tuple[Step, ...]
    settings: Settings
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "+".join(step.name for step in self.steps) or "baseline"

    @property
    def lossy(self) -> bool:
        return any(step.technique.lossy if step.claims.lossy is None else step.claims.lossy for step in self.steps)

    @property
    def devices(self) -> Devices | None:
        """The devices that compute together, where a technique says that there are several."""
        return next((step.claims.devices for step in self.steps if step.claims.devices and step.claims.devices.count > 1), None)

    def owner(self, role: str) -> Step | None:
        return next((step for step in self.steps if role in step.roles), None)

    def to_json(self) -> dict[str, Any]:
        """What a trial's process needs, and what decides its results."""
        return {
            "task": self.task,
            "steps": [{"name": step.name, "options": step.options.model_dump(mode="json")} for step in self.steps],
            "settings": self.settings.to_json(),
        }


def make_plan(
    registry: Registry, machine: Machine, task: str, choices: Iterable[Choice], wishes: Iterable[Setting] = (), *, check: bool = True
) -> Plan:
    """Order the techniques, resolve their settings and find every conflict.

    :param wishes: settings from flags, files and the profile.
    :param check: without it conflicts are not raised: a trial's process builds the plan that was checked before.
    :raises PlanConflict: with every reason at once.
    :raises UsageError: for unknown techniques or options. :raises UnavailableError: for a technique that is not ready.
    """
    steps, problems = [], []
    for choice in choices:
        technique = registry.get(choice.name).ready
        options = parse_options(technique, choice)
        configure = registry.hook(choice.name, "configure")
        claims = (configure(options=options, task=task, machine=machine) if configure else None) or Claims()
        steps.append(Step(technique, options, claims, choice, registry.get(choice.name).version))
        if claims.problem:
            problems.append(f"{choice.name}: {claims.problem}")
        if task not in technique.tasks:
            problems.append(
                f"{choice.name} does nothing in the task '{task}' (it works in: {', '.join(sorted(technique.tasks))}); leave it out"
            )
        if machine.device not in technique.devices:
            problems.append(
                f"{choice.name} needs {' or '.join(sorted(technique.devices))}, this machine computes on {machine.device}; leave it out"
            )
    ordered = order(steps)
    techniques_wishes = [setting.model_copy(update={"by": step.name}) for step in ordered for setting in step.claims.settings]
    limits = [limit.model_copy(update={"by": step.name}) for step in ordered for limit in step.claims.limits]
    settings, conflicts = resolve([*wishes, *techniques_wishes], limits)
    problems += conflicts + role_conflicts(ordered) + property_conflicts(ordered) + unread_settings(ordered, settings)
    if problems and check:
        raise PlanConflict(problems)
    notes = tuple(f"{step.name}: {note}" for step in ordered for note in step.claims.notes)
    return Plan(task, tuple(ordered), settings, notes)


def parse_options(technique: Technique, choice: Choice) -> Options:
    """Validated options. :raises UsageError: with every wrong or unknown option, each with what is known."""
    try:
        return technique.options(**choice.options)
    except ValidationError as error:
        known = list(technique.options.model_fields)
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            where = choice.origins.get(key, "")
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown option '{technique.name}.{key}'{did_you_mean(key, known)} known: {', '.join(known) or 'none'}")
            else:
                lines.append(
                    f"option '{technique.name}.{key}' = {problem['input']!r}: {problem['msg']}" + (f" (from {where})" if where else "")
                )
        raise UsageError("\n".join(lines)) from None


def order(steps: list[Step]) -> list[Step]:
    """By stage, then by ``before``/``after`` a property, then as asked."""
    ordered = sorted(steps, key=lambda step: STAGES.index(step.technique.stage))
    for _ in ordered:
        for index in range(len(ordered) - 1):
            first, second = ordered[index : index + 2]
            if first.technique.stage == second.technique.stage and (
                first.technique.after & second.adds or second.technique.before & first.adds
            ):
                ordered[index : index + 2] = [second, first]
    return ordered


def role_conflicts(steps: list[Step]) -> list[str]:
    conflicts = []
    for role in sorted({role for step in steps for role in step.roles}):
        owners = [step.name for step in steps if role in step.roles]
        if len(owners) > 1:
            conflicts.append(f"role '{role}' has one owner, and {' and '.join(owners)} claim it; keep one of them")
    return conflicts


def property_conflicts(steps: list[Step]) -> list[str]:
    conflicts = []
    for index, step in enumerate(steps):
        everyone = {name: other.name for other in steps if other is not step for name in other.adds}
        earlier = {name: other.name for other in steps[:index] for name in other.adds}
        for name in sorted((step.technique.refuses | step.claims.refuses) & everyone.keys()):
            conflicts.append(f"{step.name} cannot work with the property '{name}' that {everyone[name]} adds; leave out one of them")
        for name in sorted((step.technique.forbids | step.claims.forbids) & earlier.keys()):
            conflicts.append(
                f"{step.name} must come before anything that adds '{name}', and {earlier[name]} comes first; leave out one of them"
            )
        for name in sorted((step.technique.needs | step.claims.needs) - everyone.keys()):
            conflicts.append(f"{step.name} needs the property '{name}', which no technique of this plan adds; add one that does")
    return conflicts


def unread_settings(steps: list[Step], settings: Settings) -> list[str]:
    """Settings that somebody asked for and that their reader does not read: they would be ignored in silence."""
    conflicts = []
    for setting in settings.chosen():
        group = setting.name.partition(".")[0]
        role = READER[group]
        owner = next((step for step in steps if role in step.roles), None)
        if setting.strength == "default":
            continue
        if owner is None and setting.name in NOT_BY_DEFAULT and setting.value is not None:
            conflicts.append(
                f"setting '{setting.name}' = {setting.value} ({setting.by}) is not read without a technique that owns the role '{role}' and "
                f"honours it; add one (`optkit plugins info NAME` shows what it honours), or leave out {setting.by}"
            )
        elif owner is not None and not {setting.name, f"{group}.*"} & owner.technique.honours:
            conflicts.append(
                f"setting '{setting.name}' = {setting.value} ({setting.by}) is not read by {owner.name}, which owns the role '{role}'; "
                f"leave out {owner.name}, or {setting.by}"
            )
    return conflicts
