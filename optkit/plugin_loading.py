"""Which plugins are there, and which of them are loaded.

A plugin can be switched off (``optkit plugins disable``), left out for one command (``OPTKIT_LOAD_PLUGINS`` lists those that are
loaded; empty loads none), or tried from a file that is named explicitly (``--plugin-file``, ``OPTKIT_PLUGIN_FILE``). No configuration
file loads code.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optkit.errors import OptkitError, UsageError, did_you_mean
from optkit.folders import _place, make_private_folder, write_durably

ONLY = "OPTKIT_LOAD_PLUGINS"
FILES = "OPTKIT_PLUGIN_FILE"
#: Stands where a distribution has its version.
A_FILE = "(a file)"


@dataclass(frozen=True)
class Point:
    """Something that may hold a technique: an entry point of a distribution, or a file.

    :ivar name: as users type it. :ivar module: where the code is. :ivar foreign: not one of optkit's own.
    :ivar unfit: why it cannot work with this optkit, known before anything of it is imported.
    """

    name: str
    module: str
    distribution: str
    version: str
    load: Callable[[], Any]
    foreign: bool = True
    unfit: str = ""


# ------------------------------------------------------------ what is there


def entry_points(group: str, problems: list[str]) -> Iterator[Point]:
    """The entry points of every distribution, each distribution once; what cannot be read is added to ``problems``."""
    seen = set()
    for distribution in importlib.metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if point.group == group]
            if not points:
                continue  # reading the metadata of every distribution would take longer than all the rest
            label, version = distribution.metadata["Name"] or "an unnamed distribution", distribution.version or "of no version"
            foreign = label != "optkit"
            unfit = needs_another_optkit(distribution) if foreign else ""
        except Exception as error:  # a malformed file of any distribution must not stop the others
            where = getattr(distribution, "_path", None)
            problems.append(f"a distribution's entry points cannot be read and are skipped ({where}): {one_line(error)}")
            continue
        if label in seen:
            continue  # the first one on the path is the one that Python imports
        seen.add(label)
        for point in points:
            yield Point(point.name, point.value, label, version, point.load, foreign, unfit)


def needs_another_optkit(distribution: importlib.metadata.Distribution) -> str:
    """In words, when the distribution requires an optkit that is not this one."""
    from packaging.requirements import InvalidRequirement, Requirement

    import optkit

    for text in distribution.requires or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # pip's business
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name.lower() == "optkit" and applies and not requirement.specifier.contains(optkit.__version__, prereleases=True):
            return f"it needs {requirement}, and this is optkit {optkit.__version__}"
    return ""


def name_files(files: Iterable[Path]) -> Callable[[], None]:
    """Name plugin files in the environment, where discovery looks, in the processes of trials too. Gives what puts back what was there.

    :raises UsageError: for a path that a list of paths cannot hold.
    """
    paths = [str(path.expanduser().absolute()) for path in files]
    split = next((path for path in paths if os.pathsep in path), None)
    if split is not None:
        raise UsageError(f"plugin file '{split}' has '{os.pathsep}' in its path, which separates files; rename it")
    before = os.environ.get(FILES)
    os.environ[FILES] = os.pathsep.join(paths)

    def put_back() -> None:
        if before is None:
            os.environ.pop(FILES, None)
        else:
            os.environ[FILES] = before

    return put_back


def named_files() -> Iterator[Point]:
    """The files that ``OPTKIT_PLUGIN_FILE`` names, each once. :raises UsageError: for one that is not there."""
    texts = filter(None, os.environ.get(FILES, "").split(os.pathsep))
    for path in dict.fromkeys(Path(text).expanduser().absolute() for text in texts):
        if not path.is_file():
            raise UsageError(f"plugin file '{path}' is not a file; give the path of a Python file with a `technique`")
        yield Point("", str(path), str(path), A_FILE, functools.partial(load_file, path))


def load_file(path: Path) -> Any:
    """The file as a module of its own, whatever else is named like it."""
    name = f"optkit_plugin_file_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------ what is switched off


@dataclass(frozen=True)
class Switches:
    """What the user switched off: by name or by distribution."""

    disabled: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    problems: tuple[str, ...] = ()

    def off(self, point: Point) -> tuple[str, str] | None:
        """Cause and way back of a plugin that is not to be loaded."""
        if self.only is not None and not {point.name, point.distribution} & self.only and point.name:
            return f"{ONLY} does not name it", f"Unset {ONLY}, or add {point.name} to it."
        named = {point.name, point.distribution} & self.disabled
        if named:
            return "switched off with `optkit plugins disable`", f"optkit plugins enable {min(named)}"
        return None

    def unknown(self, names: set[str]) -> list[str]:
        """Complaints about names in ``OPTKIT_LOAD_PLUGINS`` that nothing has: a misspelt one would load nothing in silence."""
        unknown = sorted((self.only or frozenset()) - names)
        return [f"{ONLY} names '{name}', which is not installed{did_you_mean(name, names)}" for name in unknown]


def switches() -> Switches:
    text = os.environ.get(ONLY)
    only = None if text is None else frozenset(name.strip() for name in text.split(",") if name.strip())
    try:
        return Switches(read_disabled(), only)
    except OptkitError as error:
        return Switches(frozenset(), only, (str(error),))


def disabled_file() -> Path:
    """A name or distribution a line. In ``OPTKIT_CONFIG_DIR``, ``$XDG_CONFIG_HOME/optkit`` or ``~/.config/optkit``."""
    return _place(None, "OPTKIT_CONFIG_DIR", "XDG_CONFIG_HOME", ".config", "optkit") / "disabled-plugins"


def read_disabled() -> frozenset[str]:
    """:raises OptkitError: where the file is there and cannot be read."""
    path = disabled_file()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise OptkitError(f"the list of disabled plugins cannot be read, so none is: {path}: {one_line(error)}") from None
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def write_disabled(names: frozenset[str]) -> None:
    """:raises OptkitError: where it cannot be written."""
    path = disabled_file()
    try:
        make_private_folder(path.parent)
        write_durably(str(path), "".join(f"{name}\n" for name in sorted(names)).encode())
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror or error}"
        raise OptkitError(f"{reason}; set OPTKIT_CONFIG_DIR to a folder that can be written") from None


def one_line(error: BaseException) -> str:
    """Type and message of foreign code's error on one line, whatever its ``__str__`` does."""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:
        text = "its message cannot be shown"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
