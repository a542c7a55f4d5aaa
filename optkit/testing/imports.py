"""What the files of a plugin import, read without running them."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

#: Modules of optkit whose names are public, beside ``optkit`` itself.
PUBLIC = ("optkit.modules", "optkit.engine", "optkit.testing")


def files_of(module: str, plugin: Any) -> list[Path]:
    """The module's file; all of the package where the entry point names a package."""
    path = Path(plugin.__file__) if plugin is not None else Path(module)
    if not path.is_file():
        return []
    return sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names that the file imports when it runs: neither for type checkers alone nor where a failure is caught."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
        elif isinstance(node, ast.Try) and any(
            "ImportError" in ast.dump(handler) or "ModuleNotFound" in ast.dump(handler) for handler in node.handlers
        ):
            pending += [*node.orelse, *node.finalbody]
        else:
            pending += ast.iter_child_nodes(node)


def is_private(name: str) -> bool:
    """Whether a dotted name is one of optkit's that is not public."""
    import optkit

    if name.partition(".")[0] != "optkit" or name == "optkit":
        return False
    if name in PUBLIC or name.startswith(tuple(f"{module}." for module in PUBLIC)):
        return name.rpartition(".")[2].startswith("_")
    return name.removeprefix("optkit.") not in optkit.__all__


def undeclared(names: Iterable[str], module: str, distribution: str, requires: Iterable[str]) -> set[str]:
    """Top-level modules that come with nothing that the plugin, its distribution or optkit declares."""
    own = distribution_names(_requires(distribution, extras=True)) | normal([distribution])
    declared = distribution_names(requires) | own | {"optkit"}
    for _ in range(2):  # what optkit requires, and what that requires: numpy comes with torch
        declared |= {name for owner in list(declared) for name in distribution_names(_requires(owner))}
    owners = owners_of_modules()
    tops = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {module.partition(".")[0]}
    return {top for top in tops if not (normal(owners.get(top, [])) | normal([top])) & declared}


@functools.cache
def owners_of_modules() -> dict[str, list[str]]:
    """Top-level module -> distributions that bring it; reading them all takes half a second."""
    return dict(importlib.metadata.packages_distributions())


def _requires(distribution: str, *, extras: bool = False) -> list[str]:
    """What a distribution requires here; with ``extras`` also what only its extras bring."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [text for text in texts if extras or (marker := Requirement(text).marker) is None or marker.evaluate({"extra": ""})]


def distribution_names(requirements: Iterable[str]) -> set[str]:
    from packaging.requirements import Requirement

    return normal(Requirement(text).name for text in requirements)


def normal(names: Iterable[str]) -> set[str]:
    """Names of distributions as they are compared."""
    from packaging.utils import canonicalize_name

    return {str(canonicalize_name(name)) for name in names}
