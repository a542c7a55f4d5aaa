"""Plans, profiles and checks as tables and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from optkit.estimate import estimate
from optkit.plan import Plan
from optkit.report.terminal import plain_table, safe
from optkit.report.text import megabytes

if TYPE_CHECKING:
    from optkit.doctor import Check
    from optkit.profile import Profile
    from optkit.registry import Registry
    from optkit.request import Setup


def final_plan(setup: Setup) -> Plan:
    return setup.plans[-1] if setup.plans else setup.baseline


def plan_json(setup: Setup) -> dict[str, Any]:
    plan = final_plan(setup)
    return {
        "profile": setup.profile.name,
        "machine": setup.machine.describe(),
        "model": setup.source.to_json(),
        "samples": {"name": setup.samples.name, "n": len(setup.samples.samples)},
        "task": setup.task,
        "steps": [
            {"name": step.name, "stage": step.technique.stage, "version": step.version, "options": step.options.model_dump(mode="json"),
             "origins": option_origins(step), "because": step.choice.because, "roles": sorted(step.roles), "adds": sorted(step.adds)}
            for step in plan.steps
        ],
        "settings": plan.settings.to_json(),
        "notes": list(plan.notes),
        "memory": estimate(setup.source, plan, setup.machine.device),
        "origins": setup.request.origins,
    }  # fmt: skip


def plan_view(setup: Setup) -> Group:
    plan = final_plan(setup)
    origins = setup.request.origins
    asked = [
        ("profile", setup.profile.name, origins.get("profile", "")), ("model", setup.source.name, origins.get("model", "")),
        ("samples", f"{setup.samples.name} ({len(setup.samples.samples)})", origins.get("samples", "")),
        ("task", setup.task, origins.get("task", "") if setup.request.task else "the samples"), ("machine", setup.machine.describe(), "detected"),
    ]  # fmt: skip
    parts: list[Any] = [plain_table("", ["what", "value", "from"], [list(row) for row in asked])]
    steps = [
        [str(index), step.name, step.technique.stage, ", ".join(f"{key}={value}" for key, value in step.options.model_dump().items()),
         ", ".join(f"{key}: {origin}" for key, origin in option_origins(step).items() if origin != "default"), step.choice.because]
        for index, step in enumerate(plan.steps, 1)
    ]  # fmt: skip
    parts.append(
        plain_table("techniques, in order", ["", "technique", "stage", "options", "from", "because"], steps)
        if steps
        else Text("no techniques: the baseline alone")
    )
    chosen = [[s.name, str(s.value), s.by, s.because] for s in plan.settings.chosen()]
    if chosen:
        parts.append(plain_table("settings", ["setting", "value", "from", "because"], chosen))
    memory = estimate(setup.source, plan, setup.machine.device)
    before = estimate(setup.source, setup.baseline, setup.machine.device)
    if memory and before:
        rows = [[name.replace("_", " "), megabytes(before[name]), megabytes(memory[name])] for name in memory]
        each = f", on each of {plan.devices.count} devices" if plan.devices else ""
        parts.append(plain_table("memory estimate", ["", "baseline", f"this plan{each}"], rows))
        if memory["total"] > setup.profile.max_memory_fraction * setup.machine.memory_bytes:
            parts.append(
                Text(
                    f"! more than {setup.profile.max_memory_fraction:.0%} of {megabytes(setup.machine.memory_bytes)}: expect to run out of memory",
                    style="red",
                )
            )
    parts += [safe(f"· {note}", style="dim") for note in plan.notes]
    return Group(*parts)


def option_origins(step: Any) -> dict[str, str]:
    return {name: step.choice.origins.get(name, "default") for name in type(step.options).model_fields}


def profiles_view(rows: list[dict[str, Any]]) -> Any:
    cells = [
        [
            row["name"] + (" (this machine)" if row["auto"] else ""),
            "yes" if row["fits"] else "no",
            row["problem"] or row["summary"],
            row["source"],
        ]
        for row in rows
    ]
    return plain_table("", ["profile", "can run here", "what it is", "source"], cells)


def profile_view(profile: Profile) -> Group:
    facts = [[fact.name, str(fact.value), fact.unit, fact.source or "–"] for fact in profile.facts()]
    defaults = [
        [name, ", ".join(f"{k}={v}" for k, v in default.options.items()), default.because] for name, default in profile.defaults.items()
    ]
    tasks = [[name, str(task.batch_size), str(task.sequence_length), task.because] for name, task in profile.tasks.items()]
    return Group(
        safe(f"{profile.name}: {profile.summary}", style="bold"),
        plain_table("facts", ["fact", "value", "unit", "source"], facts),
        plain_table("default techniques", ["technique", "options", "because"], defaults),
        plain_table("batches", ["task", "batch size", "tokens a sample", "because"], tasks),
    )


def doctor_rows(found: list[Check], registry: Registry) -> list[dict[str, Any]]:
    from optkit.report.plugin import plugins_json

    listed = plugins_json(registry)
    rows = [check.model_dump() for check in found]
    rows += [
        {"name": f"plugin {row['name']}", "status": "warn", "detail": f"{row['status']}: {row['cause']}", "fix": row["fix"]}
        for row in listed["plugins"] if row["status"] != "ready"
    ]  # fmt: skip
    return rows + [{"name": "plugins", "status": "warn", "detail": problem, "fix": ""} for problem in listed["problems"]]


def doctor_view(rows: list[dict[str, Any]]) -> Any:
    return plain_table(
        "", ["check", "status", "found", "what to do"], [[row["name"], row["status"], row["detail"], row["fix"] or ""] for row in rows]
    )
