"""Entry points -> techniques, each with a status and a reason. A broken plugin never breaks the others."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from optkit import hookspecs, plugin_importing, plugin_loading
from optkit.errors import OptkitError, UnavailableError, UsageError, did_you_mean, quoted
from optkit.plugin_loading import Point, one_line
from optkit.settings import KNOWN
from optkit.technique import Claims, Technique

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

GROUP = "optkit.techniques"


@dataclass(frozen=True)
class Found:
    """One entry point: what it is, and whether it can be used.

    :ivar status: ``ready``, ``unavailable`` (a requirement is missing), ``broken`` (the plugin itself fails) or ``disabled`` (by the user).
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
    def where(self) -> str:
        """Distribution and module, or the file."""
        return self.module if self.version == plugin_loading.A_FILE else f"{self.distribution} ({self.module})"

    @property
    def ready(self) -> Technique:
        """The technique. :raises UnavailableError: naming the distribution, the cause and the way out."""
        if self.status == "ready" and self.technique is not None:
            return self.technique
        text = f"plugin '{self.name}' of {self.distribution} {self.version} is {self.status}: {self.cause}. {self.fix}"
        raise UnavailableError(text.rstrip())


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
            raise UsageError(f"unknown plugin {quoted(name)}{did_you_mean(name[:64], self._found)} `optkit list-plugins` shows all")
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

        if hook not in CHECKED:
            return call
        return lambda **arguments: checked(self.get(name), hook, call, arguments)


def checked(row: Found, hook: str, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What a hook answers that runs in the command's own process, where a plugin's fault must be named and end nothing.

    :raises UnavailableError: naming the plugin, where it fails, exits, or answers with what is not wanted.
    """
    try:
        with plugin_importing.stdout_kept(row.name):
            return CHECKED[hook](call(**arguments))
    except (OptkitError, KeyboardInterrupt):
        raise
    except BaseException as error:
        text = f"plugin '{row.name}' of {row.distribution} {row.version} fails in `{hook}`: {one_line(error)}. "
        raise UnavailableError(text + switch_off(row.name, row)) from error


def checked_claims(claims: Any) -> Claims | None:
    if claims is None:
        return None
    if not isinstance(claims, Claims):
        raise TypeError(f"it answered with {type(claims).__name__}, and optkit.Claims or None is wanted")
    named = [setting.name for setting in claims.settings] + [limit.name for limit in claims.limits]
    unknown = [name for name in named if name not in KNOWN]
    if unknown:
        raise ValueError(f"it names the setting '{unknown[0]}', which does not exist{did_you_mean(unknown[0], KNOWN)}")
    claims.model_dump_json()  # it becomes part of the record
    return claims


def checked_metrics(metrics: Any) -> dict[str, float]:
    if metrics is None:
        return {}
    if not isinstance(metrics, dict):
        raise TypeError(f"it answered with {type(metrics).__name__}, and a dictionary of numbers by name is wanted")
    return {str(name): float(value) for name, value in metrics.items()}


#: Hooks that do not run in a trial's process -> what looks at their answer.
CHECKED: dict[str, Callable[[Any], Any]] = {"configure": checked_claims, "evaluate": checked_metrics}


def discover(names: Collection[str] | None = None, *, files: bool = True) -> Registry:
    """Load every entry point of the group ``optkit.techniques`` and every plugin file that was named, each on its own.

    :param names: import these techniques alone: one that is not asked for must not cost anything, least of all where its import cannot be
        tried in a copy of the process first.
    :param files: without it, plugin files are looked at only for a name that no entry point has.
    :raises UsageError: for a plugin file that is not there.
    """
    manager = pluggy.PluginManager("optkit")
    manager.add_hookspecs(hookspecs)
    switches = plugin_loading.switches()
    found: dict[str, Found] = {}
    problems = list(switches.problems)
    points = list(plugin_loading.entry_points(GROUP, problems))
    if files or not set(names or ()) <= {point.name for point in points}:
        points += plugin_loading.named_files()
    for point in points:
        off = switches.off(point)
        if names is not None and point.name and point.name not in names:
            off = "it was not asked for here", ""
        if off:
            cause, fix = off
            row = Found(point.name, point.distribution, point.version, point.module, "disabled", cause=cause, fix=fix)
        else:
            row = _load(point, manager)
        earlier = found.get(row.name)
        if earlier is None or earlier.status == "disabled":
            found[row.name] = row
        elif row.status != "disabled":
            found[row.name] = _twice(earlier, row)
    if switches.only:
        problems += switches.unknown({name for row in found.values() for name in (row.name, row.distribution)})
    return Registry(list(found.values()), manager, problems)


def _load(point: Point, manager: pluggy.PluginManager) -> Found:
    name = point.name or Path(point.module).stem
    facts: dict[str, Any] = {"name": name, "distribution": point.distribution, "version": point.version, "module": point.module}
    if point.unfit:
        fix = f"Update {point.distribution}, or install the optkit that it needs, or `optkit plugins disable {quote(name)}`."
        return Found(**facts, status="unavailable", cause=point.unfit, fix=fix)
    off = switch_off(name, point)
    technique: Technique | None = None
    try:
        plugin = plugin_importing.imported(point)
        technique = getattr(plugin, "technique", None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: a plugin's import must not end the program
        return Found(**facts, status="broken", cause=f"its import failed: {one_line(error)}", fix=off)
    if not isinstance(plugin, ModuleType) or not getattr(plugin, "__file__", None):
        return Found(**facts, status="broken", cause=f"its entry point names {point.module}, which is no module with a file", fix=off)
    if not isinstance(technique, Technique):
        return Found(**facts, status="broken", cause=f"{point.module} has no `technique = Technique(...)`", fix=off)
    facts["name"] = point.name or technique.name
    if technique.name != facts["name"]:
        cause = f"its entry point is named '{point.name}' and its technique '{technique.name}'"
        return Found(**facts, status="broken", cause=cause, fix=off)
    try:
        technique.options().model_dump(mode="json")
        missing = missing_requirements(technique)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        cause = f"its options have no usable defaults, or its requirements cannot be read: {one_line(error)}"
        return Found(**facts, technique=technique, status="broken", cause=cause, fix=off)
    try:
        manager.register(plugin, name=technique.name)
        problem = hook_problem(plugin, manager)
        if problem:
            manager.unregister(plugin)
            raise ValueError(problem)
    except Exception as error:
        return Found(**facts, technique=technique, status="broken", cause=" ".join(str(error).split()), fix=off)
    if missing:
        fix = _install_hint(technique, point.distribution)
        return Found(**facts, technique=technique, plugin=plugin, status="unavailable", cause=missing, fix=fix)
    return Found(**facts, technique=technique, plugin=plugin, status="ready")


def switch_off(name: str, plugin: Point | Found) -> str:
    """The ways out of a plugin that fails."""
    distribution = plugin.distribution
    if plugin.version == plugin_loading.A_FILE:
        return f"Fix {distribution}, or leave it out of --plugin-file and {plugin_loading.FILES}."
    return f"Fix or uninstall {distribution}, or `optkit plugins disable {quote(name)}`; for one run --no-plugin {quote(name)}."


def hook_problem(plugin: ModuleType, manager: pluggy.PluginManager) -> str:
    """A hook that would never be called, or not as its author thinks; empty when there is none."""
    known = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "optkit_spec")]
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        if not caller.has_spec():
            return f"unknown hook '{caller.name}'{did_you_mean(caller.name, known)}"
        if any(impl.wrapper or impl.hookwrapper for impl in caller.get_hookimpls() if impl.plugin is plugin):
            return f"hook '{caller.name}' is marked as a wrapper: hooks are called one technique at a time, so there is nothing to wrap"
    unmarked = [name for name in known if name in vars(plugin) and name not in {caller.name for caller in callers}]
    if unmarked:
        return f"'{unmarked[0]}' bears a hook's name and is no function marked with optkit's @hookimpl: it would never be called"
    return ""


def _twice(first: Found, second: Found) -> Found:
    both = f"{first.distribution}, {second.distribution}"
    cause = f"both {first.where} and {second.where} bring a technique of this name"
    fix = f"Uninstall one of them, or `optkit plugins disable {quote(second.distribution)}`."
    if second.version == plugin_loading.A_FILE:
        fix = f"Give the technique of {second.distribution} another name, or leave the file out."
    return Found(first.name, both, first.version, first.module, "broken", cause=cause, fix=fix)


def missing_requirements(technique: Technique) -> str:
    """What of ``technique.requires`` is not installed, in words; empty when all is there."""
    problems = []
    for text in technique.requires:
        name, versions = _requirement(text)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed")
            continue
        if not versions.contains(version, prereleases=True):
            problems.append(f"{name} {version} is installed, {text} is needed")
    return "; ".join(problems)


def _requirement(text: str) -> tuple[str, SpecifierSet]:
    """Name and versions. The parser of the whole grammar takes a tenth of ``list-plugins``, so it is for extras and markers only."""
    from packaging.specifiers import SpecifierSet

    plain = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s*((?:[<>=!~][^;@\[]*)?)", text)
    if plain:
        return plain[1], SpecifierSet(plain[2])
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    return requirement.name, requirement.specifier


def _install_hint(technique: Technique, distribution: str) -> str:
    if technique.extra:
        return f"pip install '{distribution}[{technique.extra}]'"
    return "pip install " + " ".join(f"'{requirement}'" for requirement in technique.requires)
