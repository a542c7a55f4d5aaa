"""Techniques as a list, and one as a page: what ``optkit list-plugins`` and ``optkit plugins info`` show."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from optkit import hookspecs
from optkit.errors import OptkitError, PlanConflict
from optkit.machine import Machine, detect
from optkit.plan import Choice, make_plan
from optkit.report.terminal import plain_table
from optkit.report.text import clean

if TYPE_CHECKING:
    from optkit.registry import Found, Registry
    from optkit.technique import Technique

#: Facts of a technique that are sets of words, as they are shown.
WORDS = ("roles", "honours", "adds", "needs", "forbids", "refuses", "before", "after", "tasks", "devices", "requires", "tested_on")


def plugins_json(registry: Registry) -> dict[str, list[Any]]:
    """``plugins``: facts of each technique. ``problems``: distributions and switches that could not be read, in words."""
    machine = detect()
    return {"plugins": [_row_json(registry, row, machine) for row in registry], "problems": registry.problems}


def _row_json(registry: Registry, row: Found, machine: Machine) -> dict[str, Any]:
    technique = row.technique
    problem = set_up_problem(registry, row, machine)
    facts: dict[str, Any] = {
        "name": row.name, "version": row.version, "source": row.distribution, "module": row.module,
        "status": "unavailable" if problem else row.status, "cause": problem or row.cause, "fix": row.fix,
    }  # fmt: skip
    if technique is None:
        nothing: dict[str, Any] = {"stage": None, "summary": None, "lossy": None, "tasks": [], "tested_on": [], "requires": []}
        return facts | nothing | {"exceptions": {}, "paper": None, "options": {}}
    return facts | {
        "stage": technique.stage, "summary": technique.summary, "lossy": technique.lossy, "tasks": sorted(technique.tasks),
        "tested_on": list(technique.tested_on), "requires": list(technique.requires), "exceptions": dict(technique.exceptions),
        "paper": technique.paper,
        "options": {name: {"default": repr(field.default), "description": field.description}
                    for name, field in technique.options.model_fields.items()},
    }  # fmt: skip


def set_up_problem(registry: Registry, row: Found, machine: Machine) -> str:
    """Why a technique that is installed cannot run here as it is: a program, a file or an address that is missing."""
    configure = registry.hook(row.name, "configure") if row.status == "ready" else None
    if configure is None or row.technique is None:
        return ""
    try:
        claims = configure(options=row.technique.options(), task="generate", machine=machine)
    except OptkitError as error:
        return str(error)
    except Exception as error:  # a plugin's own fault, shown as such
        return f"{type(error).__name__}: {error}"
    return (claims and claims.problem) or ""


def plugins_view(registry: Registry) -> Group:
    """A row a technique; below it the checks that techniques declare they cannot pass, and what could not be read."""
    listed = plugins_json(registry)
    rows, exceptions = [], []
    for row in listed["plugins"]:
        tested = ", ".join(row["tested_on"]) or "nowhere yet"
        status = row["status"] if row["status"] == "ready" else f"{row['status']}: {row['cause']}"
        rows.append(
            [row["name"], row["stage"] or "–", status, tested if row["stage"] else "–", f"{row['source']} {row['version']}",
             row["summary"] or "", row["fix"]]
        )  # fmt: skip
        exceptions += [[row["name"], check, reason] for check, reason in row["exceptions"].items()]
    parts: list[Any] = [plain_table("", ["technique", "stage", "status", "run on", "source", "what it does", "fix"], rows)]
    if exceptions:
        parts.append(plain_table("checks that a technique says it cannot pass", ["technique", "check", "because"], exceptions))
    return Group(*parts, *(Text(f"! {clean(problem, 600)}", style="red") for problem in listed["problems"]))


def plugin_json(registry: Registry, row: Found) -> dict[str, Any]:
    """All that is known of a technique, as JSON; a broken one has a cause and a fix, and perhaps nothing else."""
    technique = row.technique
    problem = set_up_problem(registry, row, detect())
    facts: dict[str, Any] = {
        "name": row.name, "distribution": row.distribution, "version": row.version, "module": row.module,
        "status": "unavailable" if problem else row.status, "cause": problem or row.cause, "fix": row.fix,
    }  # fmt: skip
    if technique is None:
        return facts
    facts |= {"stage": technique.stage, "summary": technique.summary, "lossy": technique.lossy, "paper": technique.paper}
    facts |= {name: sorted(getattr(technique, name)) for name in WORDS}
    facts |= {
        "exceptions": technique.exceptions,
        "hooks": [
            name for name, spec in vars(hookspecs).items() if hasattr(spec, "optkit_spec") and row.plugin and registry.hook(row.name, name)
        ],
        "options": options_of(technique),
        "conflicts": conflicts(registry, row),
    }
    return facts


def options_of(technique: Technique) -> list[dict[str, str]]:
    """Name, type, default, limits and meaning of each option."""
    rows = []
    for name, field in technique.options.model_fields.items():
        kind = getattr(field.annotation, "__name__", None) if not getattr(field.annotation, "__args__", None) else None
        limits = ", ".join(re.sub(r"^\w+\((.*)\)$", r"\1", repr(limit)) for limit in field.metadata)
        rows.append(
            {"name": name, "type": kind or str(field.annotation).replace("typing.", ""), "limits": limits,
             "default": repr(field.get_default(call_default_factory=True)), "description": field.description or ""}
        )  # fmt: skip
    return rows


def conflicts(registry: Registry, row: Found) -> dict[str, list[str]]:
    """Technique -> why the two cannot be in one plan on this machine. Reasons that either has alone are left out."""
    if row.status != "ready":
        return {}
    own = _reasons(registry, [row.name])
    found = {}
    for other in registry:
        if other.status == "ready" and other.name != row.name:
            reasons = [
                reason for reason in _reasons(registry, [row.name, other.name]) if reason not in {*own, *_reasons(registry, [other.name])}
            ]
            if reasons:
                found[other.name] = reasons
    return found


def _reasons(registry: Registry, names: list[str]) -> list[str]:
    try:
        make_plan(registry, detect(), "generate", [Choice(name) for name in names])
    except PlanConflict as conflict:
        return conflict.conflicts
    except OptkitError as error:
        return [str(error)]
    return []


def plugin_view(facts: dict[str, Any]) -> Group:
    about = [["status", facts["status"] + (f": {facts['cause']}" if facts["cause"] else "")], ["fix", facts["fix"]]]
    about += [["from", f"{facts['distribution']} {facts['version']}, {facts['module']}"]]
    about += [[name, facts.get(name, "")] for name in ("stage", "paper")]
    about += [["lossy", "yes: outputs differ beyond rounding" if facts["lossy"] else "no"]] if "lossy" in facts else []
    about += [[name.replace("_", " "), ", ".join(facts.get(name, []))] for name in (*WORDS, "hooks")]
    heading = f"{facts['name']}: {facts['summary']}" if "summary" in facts else facts["name"]
    parts: list[Any] = [Text(clean(heading, 400), style="bold"), plain_table("", ["what", "value"], [row for row in about if row[1]])]
    if facts.get("options"):
        keys = ["name", "type", "default", "limits", "description"]
        parts.append(plain_table("options", keys, [[row[key] for key in keys] for row in facts["options"]]))
    if facts.get("exceptions"):
        parts.append(plain_table("checks that it cannot pass", ["check", "because"], [list(row) for row in facts["exceptions"].items()]))
    if facts.get("conflicts"):
        parts.append(
            plain_table("not together with", ["technique", "because"], [[name, "; ".join(why)] for name, why in facts["conflicts"].items()])
        )
    return Group(*parts)
