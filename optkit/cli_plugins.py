"""``optkit plugins``: make a plugin, check one, show one, switch one off and on."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from optkit import cli_options as opt
from optkit.errors import OptkitError, UsageError

plugins_app = typer.Typer(no_args_is_help=True, help="Make, check, show and switch off techniques.", rich_markup_mode=None)
Name = Annotated[str, typer.Argument(help="A technique's name.", autocompletion=opt.complete_plugins)]


@plugins_app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Lower case, digits and hyphens: what users will type.")],
    folder: Annotated[str, typer.Option("--folder", help="Where the distribution's folder is made.")] = ".",
) -> None:
    """Write a complete distribution with a working technique, its tests, README and CI."""
    from optkit.scaffold import write_distribution

    made = write_distribution(name, folder)
    typer.echo(f"{made}: a technique that works, with its tests. Next:")
    for step in (f"cd {made}", "pip install -e '.[test]'", "pytest", f"optkit plugins check {name}"):
        typer.echo(f"  {step}")


@plugins_app.command("check")
def check(name: Name, set: opt.Set = None, format: opt.Format = "human", plugin_file: opt.PluginFile = None) -> None:
    """Run the checks that every technique must pass, on tiny models."""
    from optkit import config
    from optkit.registry import discover
    from optkit.testing.checking import check_technique

    _check_format(format)
    discover().get(name)
    options = _options_of(name, config.parse_pairs(set or []))
    _quiet_libraries()

    told: list[str] = []

    def show(result: Any) -> None:
        from optkit.report.text import clean

        if format == "human":
            long_again = result.detail in told and len(result.detail) > 60
            typer.echo(f"{result.state:<12} {result.check:<14} {'(as above)' if long_again else clean(result.detail, 600)}")
            told.append(result.detail)

    results = check_technique(name, options, report=show)
    if format == "json":
        typer.echo(json.dumps([vars(result) for result in results], indent=2))
    failed = [result.check for result in results if result.state == "failed"]
    if failed:
        hint = "" if set else f"; options that suit tiny models are given with --set {name}.OPTION=VALUE"
        raise OptkitError(f"{name} fails {len(failed)} of {len(results)} checks: {', '.join(failed)}{hint}")


def _options_of(name: str, pairs: dict[str, Any]) -> dict[str, Any]:
    """``{"nf4.blocksize": 64}`` -> ``{"blocksize": 64}``. :raises UsageError: for what is not this technique's."""
    foreign = [key for key in pairs if not key.startswith(f"{name}.")]
    if foreign:
        raise UsageError(f"--set {foreign[0]}: only options of {name} can be set here, as {name}.OPTION=VALUE")
    return {key.removeprefix(f"{name}."): value for key, value in pairs.items()}


def _quiet_libraries() -> None:
    """This process only checks: what libraries log, warn and draw while tiny models are loaded would hide the results."""
    import logging
    import os
    import warnings

    os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler writes two lines a pass otherwise
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import transformers

    transformers.utils.logging.disable_progress_bar()


@plugins_app.command("info")
def info(name: Name, format: opt.Format = "human", plugin_file: opt.PluginFile = None) -> None:
    """One technique: status, hooks, options, references, roles, properties, and what it conflicts with here."""
    from optkit.registry import discover
    from optkit.report import plugin

    _check_format(format)
    registry = discover()
    facts = plugin.plugin_json(registry, registry.get(name))
    if format == "json":
        typer.echo(json.dumps(facts, indent=2))
    else:
        from optkit.report.terminal import console

        console().print(plugin.plugin_view(facts))


@plugins_app.command("disable")
def disable(
    name: Annotated[
        str, typer.Argument(help="A technique, or a distribution for all of its techniques.", autocompletion=opt.complete_plugins)
    ],
) -> None:
    """Switch a technique off: it is then not even imported."""
    from optkit import plugin_loading
    from optkit.registry import GROUP

    points = list(plugin_loading.entry_points(GROUP, []))  # nothing is imported: the plugin may be one that ends the process
    known = {name for point in points for name in (point.name, point.distribution)}
    if name not in known:
        from optkit.errors import did_you_mean

        raise UsageError(f"unknown plugin '{name}'{did_you_mean(name, known)} `optkit list-plugins` shows all")
    plugin_loading.write_disabled(plugin_loading.read_disabled() | {name})
    typer.echo(f"{name} is switched off (in {plugin_loading.disabled_file()}); `optkit plugins enable {name}` brings it back")


@plugins_app.command("enable")
def enable(name: Annotated[str, typer.Argument(help="What was disabled.")]) -> None:
    """Switch a technique on again."""
    from optkit import plugin_loading

    disabled = plugin_loading.read_disabled()
    if name not in disabled:
        raise UsageError(f"'{name}' is not switched off; {', '.join(sorted(disabled)) or 'nothing'} is")
    plugin_loading.write_disabled(disabled - {name})
    typer.echo(f"{name} is switched on")


def _check_format(format: str) -> None:
    if format not in ("human", "json"):
        raise UsageError(f"--format {format}: choose human or json")
