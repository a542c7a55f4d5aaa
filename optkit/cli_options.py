"""The options that commands share, and the request that they make. Each has an environment variable ``OPTKIT_<NAME>``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from optkit import config


def name_plugin_files(context: typer.Context, files: list[Path] | None) -> list[Path] | None:
    """Loaded by all that this command does, in the processes of its trials too."""
    if files:
        from optkit.plugin_loading import name_files

        context.call_on_close(name_files(files))
    return files


def complete_profiles(incomplete: str) -> list[str]:
    from optkit.profile import list_profiles

    return [name for name in ["auto", *(info.name for info in list_profiles())] if name.startswith(incomplete)]


def complete_plugins(incomplete: str) -> list[str]:
    """Completes the last name of a comma-separated list."""
    from optkit.registry import discover

    head, comma, last = incomplete.rpartition(",")
    return [f"{head}{comma}{row.name}" for row in discover() if row.name.startswith(last)]


def _option(*names: str, help: str, **more: Any) -> Any:
    variable = "OPTKIT_" + names[0].lstrip("-").partition("/")[0].upper().replace("-", "_")
    return typer.Option(*names, help=help, envvar=variable, **more)


Profile = Annotated[
    str, _option("--profile", help="A profile's name or file; auto is what this machine is.", autocompletion=complete_profiles)
]
Plugins = Annotated[
    str | None,
    _option("--plugins", help="Techniques, comma-separated; by default the profile's. '' for none.", autocompletion=complete_plugins),
]
Plan = Annotated[
    list[str] | None,
    _option("--plan", help="Measure this plan too, techniques comma-separated; may be repeated.", autocompletion=complete_plugins),
]
PluginFile = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin-file", help="Also load the technique of this Python file, without installing it; may be repeated.",
        envvar="OPTKIT_PLUGIN_FILE", is_eager=True, callback=name_plugin_files,
    ),
]  # fmt: skip
NoPlugin = Annotated[list[str] | None, _option("--no-plugin", help="Leave a technique out.", autocompletion=complete_plugins)]
Set = Annotated[list[str] | None, _option("--set", help="An option or setting: nf4.blocksize=64, generate.max_new_tokens=32.")]
Model = Annotated[str | None, _option("--model", help="bundled, a local folder, a hub id, or random:CONFIG.json.")]
Task = Annotated[str | None, _option("--task", help="generate or score; by default what the samples allow.")]
Samples = Annotated[str | None, _option("--samples", help="bundled[:NAME], FILE.jsonl, FILE.txt, random:COUNTxTOKENS, or hf:NAME.")]
Limit = Annotated[int | None, _option("--limit", help="Evaluate at most this many samples (200).", min=1)]
Repeats = Annotated[int | None, _option("--repeats", help="Process pairs to measure (6).", min=1, max=1000)]
Seed = Annotated[int, _option("--seed", help="Seed of everything random.")]
Each = Annotated[bool, _option("--each", help="Also measure each technique alone.")]
Reference = Annotated[str | None, _option("--reference", help="Take ratios to this plan instead of the baseline, such as compile+int8.")]
Thorough = Annotated[bool, _option("--thorough", help="40 process pairs: finds 5 % on a noisy machine.")]
Shrink = Annotated[bool, _option("--shrink", help="A two-layer version of the same architecture.")]
Show = Annotated[int, typer.Option("--show", help="Print this many outputs of baseline and optimized side by side.", min=0, max=50)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure timings again.")]
Force = Annotated[bool, typer.Option("--force-recompute", help="Compute predictions again.")]
ClearCache = Annotated[bool, typer.Option("--clear-cache", help="Empty the memo first.")]
CacheDir = Annotated[str | None, _option("--cache-dir", help="Where the memo lies.")]
CacheMaxAge = Annotated[str | None, _option("--cache-max-age", help="Older predictions are computed again: 12h, 30d.")]
Metric = Annotated[str | None, _option("--metric", help="A metric of your own, MODULE:FUNCTION of (predictions, samples).")]
Timeout = Annotated[float, _option("--timeout", help="Seconds for one step of a trial.", min=1)]
TimeLimit = Annotated[str | None, _option("--time-limit", help="Start no further process pair after this long: 90s, 10m.")]
StoreText = Annotated[
    bool, typer.Option("--store-text/--no-store-text", help="Keep generated texts in the memo.", envvar="OPTKIT_STORE_TEXT")
]
ProfilesDir = Annotated[
    list[str] | None, typer.Option("--profiles-dir", help="A folder with profiles of your own; OPTKIT_PROFILES_DIR names more.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")]
Format = Annotated[str, _option("--format", help="human or json.")]
Output = Annotated[str | None, typer.Option("--output", help="Also write the result to this file (.json, .md or .svg).")]


def defaults_from_files(context: typer.Context) -> dict[str, dict[str, Any]]:
    """What ``optkit.toml`` and ``pyproject.toml`` say, in the form of Click's default map; origins are kept beside it."""
    values, origins = config.read_files(Path.cwd())
    for name in ("plugins",):
        if isinstance(values.get(name), list):
            values[name] = ",".join(values[name])
    if isinstance(values.get("set"), dict):
        values["set"] = config.flatten(values["set"])
    context.obj = origins
    return dict.fromkeys(("run", "plan", "export"), values)


def request(context: typer.Context) -> Any:
    """The experiment's request from a command's parameters, with where each value came from."""
    from optkit.errors import UsageError
    from optkit.request import Request

    given = dict(context.params)
    files = context.obj or {}
    origins = {}
    for name in given:
        source = context.get_parameter_source(name)
        kind = source.name if source else "DEFAULT"
        flag = "--" + name.replace("_", "-")
        origins[name] = {
            "COMMANDLINE": flag, "ENVIRONMENT": "OPTKIT_" + name.upper(), "DEFAULT_MAP": files.get(name, "a file"),
        }.get(kind, "default")  # fmt: skip
    if given.get("format") not in (None, "human", "json"):
        raise UsageError(f"--format {given['format']}: choose human or json")
    plugins = given.get("plugins")
    plans = [names(text) for text in given.get("plan") or []]
    without = [name for text in given.get("no_plugin") or [] for name in names(text)]
    age = given.get("cache_max_age")
    until = given.get("time_limit")
    known = {field.name for field in dataclasses.fields(Request)}
    values = {name: value for name, value in given.items() if name in known and value is not None}
    values |= {
        "plugins": None if plugins is None else names(plugins),
        "plans": plans,
        "without": without,
        "set": config.parse_pairs(given.get("set") or []),
        "force": bool(given.get("force_recompute")),
        "cache_max_age": config.parse_duration(age) if age else None,
        "time_limit": config.parse_duration(until) if until else None,
        "profiles_dir": list(given.get("profiles_dir") or []),
        "origins": origins,
    }
    return Request(**values)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
