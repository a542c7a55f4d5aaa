"""The command line: parse, call, print. Logic lives in the rooms; heavy imports wait until a command needs them."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

# pydantic would read the entry points of every distribution for plugins of its own, and fail on one that is damaged
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from optkit import cli_options as opt
from optkit.cli_plugins import plugins_app
from optkit.errors import OptkitError, UsageError

app = typer.Typer(
    name="optkit", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Which optimizations should I switch on, what does each really do on this machine, and is the model still as good?",
)  # fmt: skip
profiles_app = typer.Typer(no_args_is_help=True, help="Machine profiles.", rich_markup_mode=None)
cache_app = typer.Typer(no_args_is_help=True, help="The memo of predictions and metrics.", rich_markup_mode=None)
app.add_typer(profiles_app, name="profiles")
app.add_typer(cache_app, name="cache")
app.add_typer(plugins_app, name="plugins")


@app.callback(invoke_without_command=True)
def root(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        import optkit

        typer.echo(optkit.__version__)
        raise typer.Exit
    if context.resilient_parsing or context.invoked_subcommand not in ("run", "plan", "export"):
        return
    context.default_map = opt.defaults_from_files(context)


@app.command()
def run(
    context: typer.Context,
    profile: opt.Profile = "auto", plugins: opt.Plugins = None, plan: opt.Plan = None, no_plugin: opt.NoPlugin = None, set: opt.Set = None,
    model: opt.Model = None, task: opt.Task = None, samples: opt.Samples = None, limit: opt.Limit = None, repeats: opt.Repeats = None,
    seed: opt.Seed = 0, each: opt.Each = False, reference: opt.Reference = None, thorough: opt.Thorough = False, shrink: opt.Shrink = False,
    show: opt.Show = 0, fresh: opt.Fresh = False, force_recompute: opt.Force = False, clear_cache: opt.ClearCache = False,
    cache_dir: opt.CacheDir = None, cache_max_age: opt.CacheMaxAge = None, metric: opt.Metric = None, timeout: opt.Timeout = 900.0,
    time_limit: opt.TimeLimit = None, store_text: opt.StoreText = True, profiles_dir: opt.ProfilesDir = None, dry_run: opt.DryRun = False, format: opt.Format = "human",
    output: opt.Output = None, plugin_file: opt.PluginFile = None,
) -> None:  # fmt: skip
    """Measure techniques against the untouched model: speed, memory, quality, and proof that each was at work."""
    request = opt.request(context)
    if dry_run:
        return _show_plan(request, format)
    if clear_cache:
        _clear(cache_dir)
    from optkit.experiment import execute
    from optkit.report.progress import shown

    with shown(quiet=format == "json") as watch:
        request.progress, request.warn = watch.progress, watch.warn
        record = execute(request)
    if output:
        _write(output, record)
    if format == "json":
        typer.echo(json.dumps(record, indent=2, ensure_ascii=True))
    else:
        from optkit.report.terminal import console, record_view

        console().print(record_view(record, show))
    if any(arm["state"] != "ok" for arm in record["arms"]):
        raise typer.Exit(1)


@app.command()
def plan(
    context: typer.Context,
    profile: opt.Profile = "auto", plugins: opt.Plugins = None, no_plugin: opt.NoPlugin = None, set: opt.Set = None,
    model: opt.Model = None, task: opt.Task = None, samples: opt.Samples = None, limit: opt.Limit = None, shrink: opt.Shrink = False,
    seed: opt.Seed = 0, profiles_dir: opt.ProfilesDir = None, format: opt.Format = "human", plugin_file: opt.PluginFile = None,
) -> None:  # fmt: skip
    """Show what would run: order, reasons, settings and where each comes from, conflicts, memory."""
    _show_plan(opt.request(context), format)


def _show_plan(request: Any, format: str) -> None:
    from optkit.report import plans
    from optkit.request import prepare

    setup = prepare(request)
    if format == "json":
        typer.echo(json.dumps(plans.plan_json(setup), indent=2))
    else:
        from optkit.report.terminal import console

        console().print(plans.plan_view(setup))


@app.command("list-plugins")
def list_plugins(format: opt.Format = "human", plugin_file: opt.PluginFile = None) -> None:
    """Every technique that is installed: stage, version, status, and how to fix one that is not ready."""
    from optkit.registry import discover
    from optkit.report import plugin

    registry = discover()
    if format == "json":
        typer.echo(json.dumps(plugin.plugins_json(registry), indent=2))
    else:
        from optkit.report.terminal import console

        console().print(plugin.plugins_view(registry))


@app.command("list-profiles")
def list_profiles(profiles_dir: opt.ProfilesDir = None, format: opt.Format = "human") -> None:
    """Every profile, and which of them is this machine."""
    from optkit.profile import list_profiles as found

    rows = [info.model_dump() for info in found([Path(folder) for folder in profiles_dir or []])]
    if format == "json":
        typer.echo(json.dumps(rows, indent=2))
        return
    from optkit.report.plans import profiles_view
    from optkit.report.terminal import console

    console().print(profiles_view(rows))


@profiles_app.command("show")
def profiles_show(
    name: Annotated[str, typer.Argument(help="A profile's name or file.", autocompletion=opt.complete_profiles)],
    profiles_dir: opt.ProfilesDir = None, format: opt.Format = "human",
) -> None:  # fmt: skip
    """One profile: facts with their sources, default techniques and why."""
    from optkit.profile import load_profile

    profile = load_profile(name, [Path(folder) for folder in profiles_dir or []])
    if format == "json":
        typer.echo(profile.model_dump_json(indent=2))
        return
    from optkit.report.plans import profile_view
    from optkit.report.terminal import console

    console().print(profile_view(profile))


@profiles_app.command("detect")
def profiles_detect(format: opt.Format = "human") -> None:
    """What this machine is, and the profile that fits."""
    from optkit.machine import detect, silent_cpu_fallback
    from optkit.profile import load_profile

    machine = detect()
    profile = load_profile("auto", machine=machine)
    if format == "json":
        typer.echo(json.dumps({"machine": machine.model_dump(), "profile": profile.name}, indent=2))
        return
    typer.echo(f"{machine.describe()}\nprofile: {profile.name} — {profile.summary}")
    warning = silent_cpu_fallback(machine)
    if warning:
        typer.echo(f"warning: {warning}", err=True)


@app.command()
def doctor(format: opt.Format = "human") -> None:
    """Check driver, GPU, compiler, libraries, disk, and what each plugin lacks."""
    from optkit.doctor import checks
    from optkit.registry import discover
    from optkit.report.plans import doctor_rows, doctor_view

    rows = doctor_rows(checks(), discover())
    if format == "json":
        typer.echo(json.dumps(rows, indent=2))
    else:
        from optkit.report.terminal import console

        console().print(doctor_view(rows))
    if any(row["status"] == "fail" for row in rows):
        raise typer.Exit(3)


@cache_app.command("info")
def cache_info(cache_dir: opt.CacheDir = None, format: opt.Format = "human") -> None:
    """Size and age of the memo."""
    from optkit.report.text import age, megabytes

    facts = _memo(cache_dir).info()
    if format == "json":
        typer.echo(json.dumps(facts, indent=2))
        return
    oldest = f", oldest {age(facts['oldest'])} ago" if facts["oldest"] else ""
    typer.echo(f"{facts['folder']}: {facts['entries']} results, {megabytes(facts['bytes'])}{oldest}")


@cache_app.command("clear")
def cache_clear(cache_dir: opt.CacheDir = None) -> None:
    """Remove every result of the memo. Records are kept."""
    typer.echo(f"{_clear(cache_dir)} results removed")


def _memo(cache_dir: str | None) -> Any:
    from optkit.folders import cache_folder
    from optkit.memo import Memo

    return Memo(cache_folder(cache_dir) / "memo", warn=lambda text: typer.echo(f"warning: {text}", err=True))


def _clear(cache_dir: str | None) -> int:
    return int(_memo(cache_dir).clear())


@app.command()
def report(
    last: Annotated[int, typer.Option("--last", help="How many of the newest runs.", min=1)] = 1,
    list_only: Annotated[bool, typer.Option("--list", help="One line a run.")] = False,
    run_id: Annotated[str | None, typer.Option("--id", help="One run, by its id.")] = None,
    format: Annotated[str, typer.Option(help="human, markdown, svg or json.")] = "human",
    output: opt.Output = None,
) -> None:
    """Show recorded runs again."""
    from optkit.report import history

    records, problems = history.recorded(last=None if list_only else last, run_id=run_id)
    for problem in problems:
        typer.echo(f"warning: {problem}", err=True)
    if not records:
        raise OptkitError("no recorded runs" + (f" with the id '{run_id}'" if run_id else "") + "; `optkit run` makes one")
    if output and format == "human":
        format = {".svg": "svg", ".json": "json"}.get(Path(output).suffix, "markdown")
    if format == "human":
        from optkit.report.terminal import console

        console().print(history.view(records, list_only))
        return
    text = history.render(records, format, list_only)
    if output:
        Path(output).write_text(text, encoding="utf-8")
    else:
        typer.echo(text)


@app.command()
def export(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(help="A new or empty folder for the model.")],
    profile: opt.Profile = "auto", plugins: opt.Plugins = None, no_plugin: opt.NoPlugin = None, set: opt.Set = None, model: opt.Model = None,
    samples: opt.Samples = None, limit: opt.Limit = None, shrink: opt.Shrink = False, seed: opt.Seed = 0, cache_dir: opt.CacheDir = None,
    timeout: opt.Timeout = 900.0, profiles_dir: opt.ProfilesDir = None, format: opt.Format = "human", plugin_file: opt.PluginFile = None,
) -> None:  # fmt: skip
    """Write the optimized model as an ordinary folder, and check that loading it again gives the same scores."""
    from optkit.exporting import export_model
    from optkit.report.progress import shown

    request = opt.request(context)
    with shown(quiet=format == "json") as watch:
        request.progress, request.warn = watch.progress, watch.warn
        facts = export_model(request, Path(folder))
    if format == "json":
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(
            f"{facts['folder']}: {facts['files']} files, {facts['bytes'] / 1e6:.1f} MB, written by {facts['writer']}\n{facts['check']}"
        )


def _write(path: str, record: dict[str, Any]) -> None:
    from optkit.report import history

    format = {".md": "markdown", ".svg": "svg"}.get(Path(path).suffix, "json")
    text = history.render([record], format, False) if format != "json" else json.dumps(record, indent=2, ensure_ascii=True) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write --output {path}: {error.strerror or error}") from None


def main() -> None:
    """The console script. An expected error is one line and an exit code; an internal one keeps its traceback."""
    gc.set_threshold(50_000)  # thousands of classes are made and none dies: looking for garbage takes a tenth of a short command
    try:
        app()
    except OptkitError as error:
        from optkit.report.text import clean

        print(f"optkit: {clean(error, 20_000)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("optkit: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception:
        print("optkit: an internal error; please report it with what follows", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
