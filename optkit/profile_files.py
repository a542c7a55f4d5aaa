"""Profile files: where they are, reading one with every mistake told at once, ``extends``.

Nothing in a file can do more than be refused: numbers without end, deep nesting, odd names and wrong types give a ``UsageError``.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from optkit.errors import UsageError, did_you_mean
from optkit.machine import Machine
from optkit.profile_schema import FACTS, Dtype, Expected, Matches, Profile, TaskDefault, TechniqueDefault
from optkit.technique import Task

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
LARGEST = 2**20  # bytes; the built-in ones have about 4,000
MOST_MISTAKES = 25
#: Tables whose entries are added to those of the extended profile, instead of replacing the table.
MERGED = ("matches", "peak_tflops", "measured_tflops", "sources", "reasons", "defaults", "tasks")


def read(path: Path, folders: Sequence[Path] = ()) -> Profile:
    """:raises UsageError: with every mistake of the file."""
    return _validated(path, _Chain(folders).raw(path))


def find(name: str, folders: Sequence[Path] = ()) -> Profile:
    """:raises UsageError: when no folder has it, or with every mistake of its file."""
    path = _Chain(folders).path(name)
    if path is None:
        known = sorted({path.stem for path in files(folders)})
        raise UsageError(f"unknown profile {show(name)}{did_you_mean(name[:64], known)} (known: auto, {', '.join(known)})")
    return read(path, folders)


def read_all(folders: Sequence[Path] = ()) -> Iterator[tuple[str, Path, Profile | UsageError]]:
    """Every profile, the first of each name; what cannot be read comes as its error."""
    seen: set[str] = set()
    for path in files(folders):
        if path.stem not in seen:
            seen.add(path.stem)
            try:
                yield path.stem, path, read(path, folders)
            except UsageError as error:
                yield path.stem if NAME.fullmatch(path.stem) else show(path.stem), path, error


def candidates(folders: Sequence[Path] = ()) -> Iterator[tuple[bool, Profile]]:
    """(whether it is the user's own, profile) for ``auto``: the built-in ones, and files of the user's that state ``[matches]``.

    :raises UsageError: for a broken one among the latter.
    """
    for _, path, answer in read_all(folders):
        own = path.parent != built_in_folder()
        if own and not _states_matches(path):
            continue
        if isinstance(answer, UsageError):
            raise answer
        yield own, answer


def files(folders: Sequence[Path] = ()) -> list[Path]:
    """Every profile file, in the order in which names are looked up.

    :raises UsageError: for a folder that was named and is not there.
    """
    return [path for folder in _search(folders) for path in sorted(folder.glob("*.toml"))]


def built_in_folder() -> Path:
    import optkit_profiles

    return Path(optkit_profiles.__path__[0])


def generic(machine: Machine) -> dict[str, Any]:
    """Facts and careful defaults for a GPU that no profile describes."""
    template = _parse(built_in_folder() / "detected" / "gpu.toml")
    capability = list(machine.compute_capability or (0, 0))
    memory_gb = round(machine.memory_bytes / 2**30, 1)
    return {
        "device": "cuda",
        "count": machine.count,
        "memory_gb": memory_gb,
        "compute_capability": machine.compute_capability,
        "sources": {"memory_gb": "the driver of this machine", "compute_capability": "the driver of this machine"},
        "defaults": {
            row["technique"]: {"options": row.get("options", {}), "because": row["because"]}
            for row in template["defaults"]
            if row.get("at_least", [0]) <= capability < row.get("below", [1000])
        },
        "tasks": {
            task: {
                "batch_size": max(1, int(memory_gb // row["gb_a_sample"])),
                "sequence_length": row["sequence_length"],
                "because": f"a sample for each {row['gb_a_sample']} GB of memory",
            }
            for task, row in template["tasks"].items()
        },
    }


def show(value: Any, longest: int = 60) -> str:
    """A value from a file, short and printable; lists and tables only by name."""
    if isinstance(value, dict | list | tuple):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a whole number beyond 64 bits"
    text = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 2] + "…'"


class _Chain:
    """Reads a file and those that it extends. A file that was read is not looked at again, so a user's ``h200`` may extend ours."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        self.visited: list[Path] = []

    def path(self, name: str) -> Path | None:
        if not NAME.fullmatch(name):
            return None
        places = (folder / f"{name}.toml" for folder in _search(self.folders))
        return next((place for place in places if place not in self.visited and place.exists()), None)

    def raw(self, path: Path) -> dict[str, Any]:
        """The file's table, laid over that of the profile that it extends."""
        self.visited.append(path)
        own = _parse(path)
        parent = own.get("extends")
        if not isinstance(parent, str):
            return own
        above = self.path(parent)
        if above is None:
            circle = any(visited.stem == parent for visited in self.visited)
            known = sorted({file.stem for file in files(self.folders)})
            reason = "which leads back to itself" if circle else f"which does not exist{did_you_mean(parent[:64], known)}"
            raise UsageError(f"profile {show(path.stem)} ({show(str(path), 300)}): extends {show(parent)}, {reason}")
        base = self.raw(above)
        _validated(above, base)  # a mistake there is told as that file's
        return _laid_over(_dropped(base), own, path)


def _laid_over(base: dict[str, Any], own: dict[str, Any], path: Path) -> dict[str, Any]:
    merged = {key: value for key, value in base.items() if key not in ("name", "extends")}
    sources = own.get("sources", {})
    stale = {f"{fact}.{dtype}" for fact in ("peak_tflops", "measured_tflops") if isinstance(own.get(fact), dict) for dtype in own[fact]}
    stale |= {fact for fact in FACTS if fact in own and not isinstance(own[fact], dict)}
    if isinstance(sources, dict):
        # A changed fact does not keep the source of the fact that it replaces.
        own = {**own, "sources": {**dict.fromkeys(stale, f"stated in {path.name}"), **sources}}
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = {**below, **value} if key in MERGED and isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _dropped(raw: dict[str, Any]) -> dict[str, Any]:
    """The table without the default techniques that its ``without`` takes out."""
    without, defaults = raw.get("without"), raw.get("defaults")
    rest = {key: value for key, value in raw.items() if key != "without"}
    if isinstance(without, list) and isinstance(defaults, dict):
        rest["defaults"] = {name: default for name, default in defaults.items() if name not in without}
    return rest


def _validated(path: Path, raw: dict[str, Any]) -> Profile:
    origin = "built-in" if path.parent == built_in_folder() else str(path)
    mistakes = list(_own_mistakes(path, raw))
    fields = _dropped(raw) | {"name": path.stem if NAME.fullmatch(path.stem) else "unnamed", "origin": origin}
    try:
        profile = Profile.model_validate(fields)
    except ValidationError as error:
        mistakes += [_told(mistake) for mistake in error.errors(include_url=False)]
    if not mistakes:
        return profile
    where = f"profile {show(path.stem)} ({show(str(path), 300)})"
    if len(mistakes) == 1:
        raise UsageError(f"{where}: {mistakes[0]}")
    more = [f"and {len(mistakes) - MOST_MISTAKES} more"] if len(mistakes) > MOST_MISTAKES else []
    lines = "".join(f"\n  - {mistake}" for mistake in [*mistakes[:MOST_MISTAKES], *more])
    raise UsageError(f"{where} has {len(mistakes)} mistakes:{lines}")


def _own_mistakes(path: Path, raw: dict[str, Any]) -> Iterator[str]:
    """What the schema cannot see: the file's name, keys that belong together, and what ``sources`` and ``without`` name."""
    if not NAME.fullmatch(path.stem) or path.stem == "auto" or path.stem.startswith("auto-"):
        yield "the file's name must be lower-case letters, digits, '.', '_' and '-', at most 64, and neither 'auto' nor begin with 'auto-'"
    elif raw.get("name", path.stem) != path.stem:
        yield f"name: is {show(raw['name'])}, but the file is {path.name}; leave the key out or rename the file"
    if "origin" in raw:
        yield f"origin: unknown key{did_you_mean('origin', Profile.model_fields)}"
    if raw.get("device") == "cuda":
        yield from (f"{key}: is missing, and device 'cuda' needs it" for key in ("memory_gb", "compute_capability") if key not in raw)
    sources = raw.get("sources", {})
    facts = {*FACTS, *(f"{fact}.{dtype}" for fact in ("peak_tflops", "measured_tflops") for dtype in typing.get_args(Dtype))}
    for fact in sources if isinstance(sources, dict) else ():
        if fact not in facts:
            yield f"sources.{_key(fact)}: there is no such fact{did_you_mean(fact[:64], facts)}"
    defaults, without = raw.get("defaults"), raw.get("without", [])
    known = list(defaults) if isinstance(defaults, dict) else []
    if not isinstance(without, list):
        yield f"without: must be a list of techniques, not {show(without)}"
        return
    for technique in without:
        if technique not in known:
            yield f"without: {show(technique)} is not among the defaults{did_you_mean(str(technique)[:64], known)}"


def _told(mistake: Any) -> str:
    """One mistake that pydantic found, in a line with its key."""
    path, kind, value = mistake["loc"], mistake["type"], mistake.get("input")
    where = ".".join(_key(part) for part in path if part != "[key]")
    if kind == "extra_forbidden":
        return f"{where}: unknown key{did_you_mean(str(path[-1])[:64], _known_keys(path))}"
    if kind == "missing":
        return f"{where}: is missing"
    if kind == "string_pattern_mismatch" and path[-1] == "[key]":
        return f"{where}: is no technique's name (lower-case letters, digits and '-')"
    if path[-1] == "[key]":
        allowed = _known_keys(path[:-1])
        return f"{where}: unknown key{did_you_mean(str(path[-2])[:64], allowed)}" + (f" (known: {', '.join(allowed)})" if allowed else "")
    if kind == "value_error":
        return f"{where}: {mistake['ctx']['error']}"
    return f"{where}: {re.sub(r'^[A-Z][a-z]+ should', 'must', mistake['msg'])}, not {show(value)}"


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    """The keys that the table has in which the last part of ``path`` stands."""
    tables: dict[str, type[BaseModel]] = {"matches": Matches, "defaults": TechniqueDefault, "tasks": TaskDefault, "expected": Expected}
    if len(path) == 1:
        return [*(name for name in Profile.model_fields if name != "origin"), "without"]
    names: dict[str, Iterable[str]] = {
        "tasks": typing.get_args(Task),
        "peak_tflops": typing.get_args(Dtype),
        "measured_tflops": typing.get_args(Dtype),
        "reasons": ("max_memory_fraction", "cleanup_every"),
    }
    if len(path) == 2 and path[0] in names:
        return list(names[path[0]])
    return list(tables[path[0]].model_fields) if path[0] in tables else []


def _key(part: Any) -> str:
    text = str(part)
    return text if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) else show(text)


def _parse(path: Path) -> dict[str, Any]:
    """:raises UsageError: for what is no readable TOML file."""
    where = f"profile {show(path.stem)} ({show(str(path), 300)})"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{where}: is not a file")
        if status.st_size > LARGEST:
            raise UsageError(f"{where}: has {status.st_size} bytes, more than the {LARGEST} that a profile may have")
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{where}: there is no such file; `optkit list-profiles` shows all profiles") from None
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UsageError(f"{where}: is nested too deeply") from None
    except ValueError as error:  # not TOML, not UTF-8, a number of thousands of digits, a NUL in the path
        raise UsageError(f"{where}: is no valid TOML: {' '.join(str(error).split())[:200]}") from None


def _states_matches(path: Path) -> bool:
    try:
        return "matches" in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _search(folders: Sequence[Path]) -> list[Path]:
    named = [(Path(folder), "--profiles-dir") for folder in folders]
    named += [(Path(folder), "OPTKIT_PROFILES_DIR") for folder in os.environ.get("OPTKIT_PROFILES_DIR", "").split(os.pathsep) if folder]
    for folder, origin in named:
        if not folder.is_dir():
            raise UsageError(f"{origin}: {show(str(folder), 300)} is not a folder; create it or correct the path")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "optkit", "profiles")
    return list(dict.fromkeys([folder for folder, _ in named] + [config, built_in_folder()]))
