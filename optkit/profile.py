"""Profiles: what a machine is, where each fact comes from, and which techniques, batch sizes and lengths to begin with there.

A profile is one TOML file: a built-in one, or a user's own. Here is which profile fits which machine; ``profile_schema`` says what a
profile holds, and ``profile_files`` reads them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optkit import profile_files
from optkit.errors import UsageError
from optkit.machine import Machine, detect
from optkit.profile_schema import Expected, Fact, Matches, Profile, TaskDefault, TechniqueDefault

__all__ = [
    "Expected",
    "Fact",
    "Matches",
    "Profile",
    "ProfileInfo",
    "TaskDefault",
    "TechniqueDefault",
    "auto_profile",
    "fits",
    "generic_profile",
    "list_profiles",
    "load_profile",
    "missing_for",
]

#: A machine whose driver reports less than this share of a profile's memory is not that machine (ECC takes a sixteenth on a T4).
MEMORY_SLACK = 0.9


@dataclass(frozen=True)
class ProfileInfo:
    """A line of ``list-profiles``: ``auto`` marks the one that this machine is, ``problem`` says why a file cannot be read."""

    name: str
    summary: str
    source: str
    fits: bool
    auto: bool = False
    problem: str | None = None

    def model_dump(self) -> dict[str, Any]:
        return asdict(self)


def fits(profile: Profile, machine: Machine) -> bool:
    """Whether a run under this profile can take place here. Every machine can run on its CPU."""
    return profile.device == "cpu" or not _differences(profile, machine)


def missing_for(profile: Profile, machine: Machine, folders: Sequence[Path] = ()) -> str | None:
    """One line on what this machine lacks for a profile, and which profile fits instead; ``None`` when it fits."""
    if fits(profile, machine):
        return None
    lacks = "; ".join([*_differences(profile, machine), *filter(None, [machine.gpu_problem])])
    return (
        f"profile '{profile.name}' does not fit this machine ({machine.describe()}): {lacks}. "
        f"Profile '{auto_profile(machine, folders).name}' fits (--profile auto); `optkit plan --profile {profile.name}` works here"
    )


def load_profile(name: str = "auto", folders: Sequence[Path] = (), machine: Machine | None = None) -> Profile:
    """The profile of that name, or in that ``.toml`` file; ``"auto"`` is the one that this machine is.

    :param folders: the user's folders, before ``OPTKIT_PROFILES_DIR``, ``~/.config/optkit/profiles`` and the built-in profiles.
    :param machine: what ``auto`` goes by; detected when it is left out.
    :raises UsageError: no such profile, or every mistake of its file at once.
    """
    if name == "auto" or name.startswith("auto-"):
        found = auto_profile(machine or detect(), folders)
        if name not in ("auto", found.name):
            raise UsageError(f"profile '{name}' is made from another machine; this one is '{found.name}' (--profile auto)")
        return found
    if name.endswith(".toml") or os.sep in name:
        return profile_files.read(Path(name), folders)
    return profile_files.find(name, folders)


def list_profiles(folders: Sequence[Path] = (), machine: Machine | None = None) -> list[ProfileInfo]:
    """Every profile, the user's own first, each name once. A broken file is a line with its problem."""
    machine = machine or detect()
    try:
        auto = auto_profile(machine, folders)
    except UsageError:
        auto = None  # a broken file of the user's: its own line says so
    rows = [
        ProfileInfo(name, answer.summary, answer.origin, fits(answer, machine), auto is not None and auto.name == name)
        if isinstance(answer, Profile)
        else ProfileInfo(name, "", str(path), False, problem=str(answer))
        for name, path, answer in profile_files.read_all(folders)
    ]
    if auto is not None and auto.name not in {row.name for row in rows}:
        rows.append(ProfileInfo(auto.name, auto.summary, auto.origin, True, True))
    return rows


def auto_profile(machine: Machine, folders: Sequence[Path] = ()) -> Profile:
    """The profile that this machine is: the user's own that states ``[matches]`` itself, else a built-in one, else a made one.

    Of several, the one for the most devices that are here, then for this notebook host, then with the most memory.

    :raises UsageError: when a file of the user's that has ``[matches]`` is broken, because it might have been the one.
    """
    matching = [
        (own, profile)
        for own, profile in profile_files.candidates(folders)
        if profile.device == machine.device and not _differences(profile, machine)
    ]
    if not matching:
        return generic_profile(machine)
    return max(matching, key=lambda pair: (pair[0], pair[1].count, pair[1].matches.environment is not None, pair[1].memory_gb or 0))[1]


def generic_profile(machine: Machine) -> Profile:
    """A profile made from what the driver says, for a machine that no profile describes. It has no rates: runs measure their own."""
    if machine.device == "cpu":
        return profile_files.find("cpu", ())
    raw = profile_files.generic(machine)
    return Profile(name="auto-" + _slug(machine.name), summary=f"{machine.name}, as its driver describes it", origin="detected", **raw)


def _differences(profile: Profile, machine: Machine) -> list[str]:
    """What keeps this machine from being the profile's, in words."""
    matches = profile.matches
    if profile.device != machine.device:
        return [f"it needs {_wanted(profile)}, and runs here compute on the {'CPU' if machine.device == 'cpu' else 'GPU'}"]
    found = []
    if matches.names and not any(_has_word(machine.name, name) for name in matches.names):
        found.append(f"it needs {_wanted(profile)}, this is {machine.name}")
    elif any(_has_word(machine.name, name) for name in matches.excludes):
        found.append(f"it is not made for the variant {machine.name}")
    if matches.environment and machine.environment != matches.environment:
        found.append(f"it is for {matches.environment}")
    if machine.device == "cpu":
        return found
    if profile.compute_capability and profile.compute_capability != machine.compute_capability:
        wanted, here = profile.compute_capability, machine.compute_capability
        found.append(f"it needs {_sm(wanted)}, this is {_sm(here) if here else 'unknown to the driver'}")
    if profile.count > machine.count:
        found.append(f"it needs {profile.count} GPUs, {machine.count} can be seen")
    if profile.memory_bytes and machine.memory_bytes < MEMORY_SLACK * profile.memory_bytes:
        found.append(f"it needs {profile.memory_gb:g} GB a GPU, this has {machine.memory_bytes / 2**30:.1f} GB")
    return found


def _wanted(profile: Profile) -> str:
    if profile.device == "cpu":
        return "a CPU"
    many = f"{profile.count} x " if profile.count > 1 else ""
    facts = [_sm(profile.compute_capability)] if profile.compute_capability else []
    facts += [f"{profile.memory_gb:g} GB"] if profile.memory_gb else []
    return f"{many}{' or '.join(profile.matches.names) or 'a GPU'} ({', '.join(facts)})"


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _has_word(text: str, words: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(words)}(?![A-Za-z0-9])", text, re.IGNORECASE) is not None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50] or "gpu"
