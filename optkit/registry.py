"""Entry points -> techniques, each with a status and a reason. A broken plugin never breaks the others."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pluggy

from optkit import hookspecs
from optkit.errors import UnavailableError, UsageError, did_you_mean
from optkit.technique import Technique

GROUP = "optkit.techniques"


@dataclass(frozen=True)
class Found:
    """One entry point: what it is, and whether it can be used.

    :ivar status: ``ready``, ``unavailable`` (a requirement is missing) or ``broken`` (the plugin itself fails).
    :ivar cause: why it is not ready.
    :ivar fix: the command or step that helps.
    """

    name: str
    distribution: str
    version: str
    module: str
    status: str
    technique: Technique | None = None
    plugin: Any = None
    cause: str = ""
    fix: str = ""

    @property
    def ready(self) -> Technique:
        """The technique. :raises UnavailableError: naming the distribution, the cause and the way out."""
        if self.status == "ready" and self.technique is not None:
            return self.technique
        raise UnavailableError(f"plugin '{self.name}' of {self.distribution} {self.version} is {self.status}: {self.cause}. {self.fix}".rstrip())


class Registry:
    """All techniques that are installed here."""

    def __init__(self, found: list[Found], manager: pluggy.PluginManager, problems: list[str]):
        self._found = {row.name: row for row in found}
        self._manager = manager
        #: distributions that could not be read at all
        self.problems = problems

    def __iter__(self) -> Iterator[Found]:
        return iter(sorted(self._found.values(), key=lambda row: row.name))

    def get(self, name: str) -> Found:
        """:raises UsageError: for a name that no entry point has."""
        if name not in self._found:
            raise UsageError(f"unknown plugin '{name}'{did_you_mean(name, self._found)} `optkit list-plugins` shows all")
        return self._found[name]

    def hook(self, name: str, hook: str) -> Callable[..., Any] | None:
        """The named hook of one technique as a function of keyword arguments, or ``None`` where it does not answer that hook."""
        plugin = self.get(name).plugin
        if not any(caller.name == hook for caller in self._manager.get_hookcallers(plugin) or []):
            return None
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        caller = self._manager.subset_hook_caller(hook, others)

        def call(**arguments: Any) -> Any:
            answers = caller(**arguments)
            return answers[0] if answers else None

        return call


def discover() -> Registry:
    """Load every entry point of the group ``optkit.techniques``, each on its own."""
    manager = pluggy.PluginManager("optkit")
    manager.add_hookspecs(hookspecs)
    found: dict[str, Found] = {}
    problems: list[str] = []
    for distribution in importlib.metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if point.group == GROUP]
            if not points:
                continue  # reading the metadata of every distribution would take longer than all the rest
            label, version = distribution.metadata["Name"] or "an unnamed distribution", distribution.version
        except Exception as error:  # a malformed file of any distribution must not stop the others
            problems.append(f"a distribution's entry points cannot be read and are skipped: {error}")
            continue
        for point in points:
            row = _load(point, label, version, manager)
            earlier = found.get(row.name)
            if earlier is None:
                found[row.name] = row
            elif earlier.distribution != row.distribution:
                found[row.name] = _twice(earlier, row, manager)
    return Registry(list(found.values()), manager, problems)


def _load(point: importlib.metadata.EntryPoint, label: str, version: str, manager: pluggy.PluginManager) -> Found:
    facts: dict[str, Any] = {"name": point.name, "distribution": label, "version": version, "module": point.value}
    off = f"Fix or uninstall {label}, or leave it out with --no-plugin {point.name}."
    try:
        plugin = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: a plugin's import must not end the program
        return Found(**facts, status="broken", cause=f"its import failed: {type(error).__name__}: {error}", fix=off)
    technique = getattr(plugin, "technique", None)
    if not isinstance(technique, Technique):
        return Found(**facts, status="broken", cause=f"{point.value} has no `technique = Technique(...)`", fix=off)
    if technique.name != point.name:
        cause = f"its entry point is named '{point.name}' and its technique '{technique.name}'"
        return Found(**facts, status="broken", cause=cause, fix=off)
    try:
        manager.register(plugin, name=point.name)
        unknown = [caller.name for caller in manager.get_hookcallers(plugin) or [] if not caller.has_spec()]
        if unknown:
            manager.unregister(plugin)
            known = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "optkit_spec")]
            raise ValueError(f"unknown hook '{unknown[0]}'{did_you_mean(unknown[0], known)}")
    except Exception as error:
        return Found(**facts, technique=technique, status="broken", cause=" ".join(str(error).split()), fix=off)
    missing = missing_requirements(technique)
    if missing:
        return Found(**facts, technique=technique, plugin=plugin, status="unavailable", cause=missing, fix=_install_hint(technique, label))
    return Found(**facts, technique=technique, plugin=plugin, status="ready")


def _twice(first: Found, second: Found, manager: pluggy.PluginManager) -> Found:
    cause = f"both {first.distribution} and {second.distribution} bring a technique of this name"
    return Found(first.name, f"{first.distribution}, {second.distribution}", first.version, first.module, "broken", None, None, cause,
                 "Uninstall one of them.")  # fmt: skip


def missing_requirements(technique: Technique) -> str:
    """What of ``technique.requires`` is not installed, in words; empty when all is there."""
    from packaging.requirements import Requirement

    problems = []
    for text in technique.requires:
        requirement = Requirement(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is installed, {requirement} is needed")
    return "; ".join(problems)


def _install_hint(technique: Technique, distribution: str) -> str:
    if technique.extra:
        return f"pip install '{distribution}[{technique.extra}]'"
    return "pip install " + " ".join(f"'{requirement}'" for requirement in technique.requires)
