"""Checks of a plugin as it is installed: what it declares, what it imports, its hooks, and that it can lack what it requires."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from optkit import hookspecs
from optkit.errors import did_you_mean
from optkit.settings import KNOWN
from optkit.technique import PROPERTIES
from optkit.testing import imports
from optkit.testing.checking import CheckFailed, NotChecked
from optkit.testing.subject import Subject

#: CPU seconds that importing a plugin may take: every command pays them.
IMPORT_SECONDS = 0.1
#: Role -> the hook that its owner answers.
ROLE_HOOKS = {"load": "load_model", "weights": "transform_model", "engine": "build_engine", "batching": "batch_strategy",
              "optimizer": "build_optimizer", "loss": "build_loss"}  # fmt: skip


def check_manifest(subject: Subject) -> str:
    """The facts are complete and use words that others know."""
    row = subject.row
    technique = row.technique
    if row.status in ("broken", "disabled") or technique is None:
        raise CheckFailed(f"{row.status}: {row.cause}. {row.fix}")
    problems = []
    for field in ("adds", "needs", "forbids", "refuses", "before", "after"):
        for name in sorted(getattr(technique, field) - PROPERTIES.keys()):
            problems.append(f"{field} names the property '{name}', which no other technique knows{did_you_mean(name, PROPERTIES)}")
    groups = {f"{name.partition('.')[0]}.*" for name in KNOWN}
    problems += [f"honours names '{name}', which is no setting" for name in sorted(technique.honours - KNOWN.keys() - groups)]
    problems += [f"option '{name}' has no description" for name, field in technique.options.model_fields.items() if not field.description]
    problems += [
        f"'{device}' is declared as tested and not among its devices"
        for device in technique.tested_on
        if device == "cpu" not in technique.devices
    ]
    extras = _metadata_of(row.distribution).get_all("Provides-Extra") or [] if technique.extra else []
    if technique.extra and technique.extra not in extras:
        problems.append(f"the extra '{technique.extra}' is not one of {row.distribution}'s ({', '.join(extras) or 'it has none'})")
    if not inspect.getdoc(row.plugin):
        problems.append("the module has no docstring that says the idea, its price, and when not to use it")
    if problems:
        raise CheckFailed("; ".join(problems))
    return f"{row.distribution} {row.version}, stage {technique.stage}, {len(technique.options.model_fields)} options"


def _metadata_of(distribution: str) -> Any:
    try:
        return importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise NotChecked("a plugin file has no metadata; its extra is not checked") from None


def check_imports(subject: Subject) -> str:
    """Only what is declared, and of optkit only public names."""
    row = subject.row
    files = imports.files_of(row.module, row.plugin)
    used = {name for path in files for name in imports.imported_names(path)}
    private = sorted({name for name in used if imports.is_private(name)})
    if private:
        raise CheckFailed(
            f"it uses {', '.join(private)}, which may change: use the public names of optkit, optkit.modules and optkit.engine"
        )
    requires = subject.row.technique.requires if subject.row.technique else ()
    undeclared = sorted(imports.undeclared(used, row.module, row.distribution, requires))
    if undeclared:
        raise CheckFailed(f"it imports {', '.join(undeclared)}, and neither Technique.requires nor its distribution's dependencies say so")
    return f"{len(files)} files"


_IMPORT = """
import contextlib, importlib, io, json, os, runpy, sys, time
path, module = json.load(sys.stdin)
sys.path[:] = path
import optkit, optkit.modules, optkit.engine
for name in optkit.__all__:
    getattr(optkit, name)  # what every command has loaded is not the plugin's cost
heavy = [name for name in ("torch", "transformers", "numpy") if name not in sys.modules]
changed = set()
class Environment(type(os.environ)):
    def __setitem__(self, name, value):
        changed.add("os.environ")
        super().__setitem__(name, value)
    def __delitem__(self, name):
        changed.add("os.environ")
        super().__delitem__(name)
os.environ.__class__ = Environment
before = list(sys.path), os.getcwd()
printed = io.StringIO()
started = time.process_time()
with contextlib.redirect_stdout(printed):
    runpy.run_path(module) if module.endswith(".py") else importlib.import_module(module)
seconds = time.process_time() - started
changed |= {name for name, old, new in zip(("sys.path", "the working folder"), before, (sys.path, os.getcwd())) if old != new}
print(json.dumps([seconds, [name for name in heavy if name in sys.modules], sorted(changed), printed.getvalue()[:200]]))
"""


def check_import_time(subject: Subject) -> str:
    """In a fresh process: little time, nothing heavy, nothing printed, nothing of the process changed."""
    best = None
    for _ in range(3):  # the first one may also compile the file
        seconds, heavy, changed, printed = _in_a_process(_IMPORT, [sys.path, subject.row.module])
        best = seconds if best is None else min(best, seconds)
        if heavy:
            raise CheckFailed(
                f"it imports {' and '.join(heavy)}: import them inside the functions that need them ({best:.2f} s of CPU time)"
            )
        if changed:
            raise CheckFailed(f"its import changes {' and '.join(changed)} for the whole process: do that inside a hook, and put it back")
        if printed:
            raise CheckFailed(f"its import prints {printed.strip()!r}: use trial.report inside a hook")
        if best <= IMPORT_SECONDS:
            return f"{1000 * best:.0f} ms of CPU time"
    raise CheckFailed(
        f"its import takes {1000 * (best or 0):.0f} ms of CPU time, {1000 * IMPORT_SECONDS:.0f} are allowed: every command pays it"
    )


def check_hooks(subject: Subject) -> str:
    """Hooks are known, marked and answered where a role asks for one."""
    row = subject.row
    if row.plugin is None or row.technique is None:
        raise CheckFailed(f"{row.status}: {row.cause}")
    answered = [name for name in hookspecs_names() if subject.registry.hook(row.name, name)]
    missing = [f"{ROLE_HOOKS[role]} (role '{role}')" for role in sorted(row.technique.roles) if ROLE_HOOKS[role] not in answered]
    if missing:
        raise CheckFailed(f"it owns a role and does not answer {' and '.join(missing)}")
    if "prove_effect" not in answered and "transform_model" not in answered:
        raise CheckFailed(
            "it answers neither transform_model, whose changes are seen, nor prove_effect: nothing can show that it was at work"
        )
    awaited = [name for name in answered if inspect.iscoroutinefunction(getattr(row.plugin, name, None))]
    if awaited:
        raise CheckFailed(f"{awaited[0]} is an async function, and hooks are called without await")
    return ", ".join(answered)


def hookspecs_names() -> list[str]:
    return [name for name, value in vars(hookspecs).items() if hasattr(value, "optkit_spec")]


_WITHOUT = """
import importlib.metadata, json, sys
path, name, absent, modules = json.load(sys.stdin)
sys.path[:] = path
class Absent:
    def find_spec(self, module, path=None, target=None):
        if module.partition(".")[0] in modules:
            raise ModuleNotFoundError(f"No module named '{module}'", name=module)
sys.meta_path.insert(0, Absent())
known = importlib.metadata.version
def version(distribution):
    if distribution.lower().replace("_", "-") in absent:
        raise importlib.metadata.PackageNotFoundError(distribution)
    return known(distribution)
importlib.metadata.version = version
from optkit.registry import discover
row = discover().get(name)
print(json.dumps([row.status, row.cause, row.fix]))
"""


def check_dependency(subject: Subject) -> str:
    """Without what it requires it is found, named as unavailable, and says what installs it."""
    technique = subject.row.technique
    if technique is None:
        raise CheckFailed(f"{subject.row.status}: {subject.row.cause}")
    needed = imports.distribution_names(technique.requires) - imports.distribution_names(importlib.metadata.requires("optkit") or [])
    if not needed:
        return "it requires nothing beyond optkit"
    modules = [module for module, owners in imports.owners_of_modules().items() if imports.normal(owners) & needed]
    status, cause, fix = _in_a_process(_WITHOUT, [sys.path, subject.name, sorted(needed), modules])
    if status != "unavailable" or not any(name in cause.lower().replace("_", "-") for name in needed):
        raise CheckFailed(
            f"without {', '.join(sorted(needed))} it is {status} ({cause}): it must be found and wait, so import it inside a function"
        )
    return f"without {', '.join(sorted(needed))}: {fix}"


def _in_a_process(code: str, data: Any) -> Any:
    """The last line that ``code`` prints, as JSON."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(data), capture_output=True, text=True, env=environment, timeout=120, cwd=Path.cwd()
    )
    if done.returncode:
        raise CheckFailed(
            f"a fresh process cannot import it: {(done.stderr.strip().splitlines() or ['it ended without a word'])[-1][:300]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])
