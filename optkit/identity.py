"""What decides a prediction: model, samples, plan, versions, hardware. A field more costs a miss; a field less costs the truth."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

import optkit
from optkit.canonical import digest
from optkit.plan import Plan

if TYPE_CHECKING:
    from optkit.request import Setup

#: Distributions whose version may change a prediction, beside those that a technique requires.
LIBRARIES = ("torch", "transformers", "tokenizers", "triton", "onnxruntime", "onnxruntime-gpu")


def base(setup: Setup) -> dict[str, Any]:
    """The part that all plans of one experiment share."""
    machine = setup.machine
    return {
        "optkit": f"{optkit.__version__} {source_digest(Path(optkit.__file__).parent)}",
        "libraries": {name: version(name) for name in LIBRARIES},
        "model": setup.source.fingerprint(),
        "device": machine.name,
        "driver": machine.driver,
        "cpu": [machine.cpu_model, machine.cpu_cores, sorted(machine.cpu_features)],
        "task": setup.task,
        "seed": setup.request.seed,
    }


def of_plan(shared: dict[str, Any], plan: Plan, setup: Setup) -> dict[str, Any]:
    """The whole identity of one plan's predictions, without the samples (each shard of them adds its own)."""
    return {
        **shared,
        "plan": {"steps": plan.to_json()["steps"], "settings": {s.name: s.value for s in plan.settings.chosen()}},
        "calibration": digest([sample.digest for sample in setup.samples.calibration])
        if any(step.technique.calibrates for step in plan.steps)
        else None,
        "plugins": {
            step.name: [
                step.version,
                plugin_digest(setup.registry.get(step.name).plugin),
                {name: version(name) for name in _distributions(step)},
            ]
            for step in plan.steps
        },
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _distributions(step: Any) -> list[str]:
    return [Requirement(text).name for text in step.technique.requires]


def plugin_digest(module: Any) -> str:
    """sha256 over the plugin's package or, where it is not in one, its file and what it imports from beside it: helpers decide values too."""
    path = Path(module.__file__)
    return source_digest(path.parent) if "." in module.__name__ or path.name == "__init__.py" else _digest_of(with_helpers(path))


def with_helpers(path: Path) -> list[Path]:
    """The file and the files beside it that it imports, directly or not. Of packages beside it, those of a folder where nothing is installed."""
    found, todo = {path}, [path]
    while todo:
        here = todo.pop()
        for name in _imported_names(here):
            package = here.parent / name
            beside = [package.with_suffix(".py")]
            if "site-packages" not in path.parts and (package / "__init__.py").is_file():
                beside += package.rglob("*.py")
            fresh = {file for file in beside if file.is_file()} - found
            found |= fresh
            todo += fresh
    return sorted(found)


def _imported_names(path: Path) -> set[str]:
    """First parts of the names that a file's import statements name, wherever they stand in it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    return {name.partition(".")[0] for name in names}


def source_digest(folder: Path) -> str:
    return _digest_of(sorted(folder.rglob("*.py")))


def _digest_of(paths: list[Path]) -> str:
    state = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        state.update(f"{path.name} {len(content)}\n".encode())
        state.update(content)
    return state.hexdigest()
