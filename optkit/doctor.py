"""What an installation needs, checked: Python, GPU driver, torch's build, C compiler, headers, disk, memory, extras.

Standard library only and no network. ``python optkit/doctor.py`` runs on a bare Python, before anything is installed, and then checks
what pip cannot bring (``--before-install``); ``python -m optkit.doctor`` checks all. Exit status 1 where a check fails; a warning does not.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: optkit's own __init__ and its dependencies may not be there yet
    import types

    _package = types.ModuleType("optkit")
    _package.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules["optkit"] = _package
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from optkit import machine as machines

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
GB = 2**30
#: Free bytes of disk below which a check warns, and fails: an install of torch with CUDA takes about 8 GB, a cache little.
INSTALL_DISK = (8 * GB, 2 * GB)
CACHE_DISK = (2 * GB, GB // 8)
LITTLE_MEMORY = 4 * GB


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``fix`` is the way out where ``status`` is ``"warn"`` or ``"fail"``."""

    name: str
    status: str
    detail: str
    fix: str = ""

    def model_dump(self) -> dict[str, Any]:
        return asdict(self)


def checks(machine: machines.Machine | None = None, cache_dir: Path | None = None) -> list[Check]:
    """Every check, in the order in which mistakes are best mended.

    :param cache_dir: where optkit keeps its records and memo; its default where it is left out.
    """
    machine = machine or machines.detect()
    cache_dir = cache_dir or Path(os.environ.get("OPTKIT_CACHE_DIR") or _cache_home() / "optkit")
    found = [_python(), _gpu(machine), _torch(machine), _compiler(), _headers(), _memory(machine)]
    return [*found, _disk("cache folder", cache_dir, CACHE_DISK), _hub_cache(), *_distributions()]


def before_install(machine: machines.Machine | None = None, folder: Path = Path(".")) -> list[Check]:
    """What pip cannot bring: Python, driver, compiler, headers, memory, and room for the environment in ``folder``."""
    machine = machine or machines.detect()
    return [_python(), _gpu(machine), _compiler(), _headers(), _memory(machine), _disk("disk", folder, INSTALL_DISK)]


def _python() -> Check:
    version = f"{sys.version.split()[0]} ({sys.executable})"
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        return Check("Python", "ok", version)
    return Check("Python", "fail", f"{version} was not tried", "use Python 3.11, 3.12 or 3.13: make run PYTHON=python3.12")


def _gpu(machine: machines.Machine) -> Check:
    if machine.gpu_problem:
        cause, _, fix = machine.gpu_problem.partition(": ")
        return Check("GPU", "fail", cause, fix)
    if machine.device == "cuda":
        return Check("GPU", "ok", f"{machine.describe()}, CUDA up to {machine.cuda_driver_version or 'unknown'}")
    if machine.gpus_seen:
        return Check("GPU", "ok", f"{machine.gpus_seen} hidden by CUDA_VISIBLE_DEVICES, on purpose; runs compute on the CPU")
    return Check("GPU", "ok", f"no NVIDIA GPU; runs compute on the CPU ({machine.describe()})")


def _torch(machine: machines.Machine) -> Check:
    build = machines.torch_build()
    if build is None:
        return Check("torch", "fail", "not installed", "pip install -c constraints.txt optkit")
    problem = None if machine.gpu_problem else machines.silent_cpu_fallback(machine, build)
    if problem:
        cause, _, fix = problem.partition(": ")
        return Check("torch", "fail", cause, fix)
    return Check("torch", "ok", f"{build.version}, built for {'CUDA ' + build.cuda if build.cuda else 'ROCm' if build.hip else 'the CPU'}")


def _compiler() -> Check:
    """Inductor compiles C++ on a CPU; Triton compiles a C launcher on a GPU."""
    c = _first_program([os.environ.get("CC", ""), "cc", "gcc", "clang"])
    cxx = _first_program([os.environ.get("CXX", ""), "g++", "c++", "clang++"])
    if c and cxx:
        return Check("C compiler", "ok", f"{c}, {cxx}")
    lacks = " and ".join(name for name, found in (("C", c), ("C++", cxx)) if not found)
    fix = f"{_package_command('g++', 'gcc-c++')}, or set CC and CXX"
    return Check("C compiler", "warn", f"no {lacks} compiler: torch.compile cannot work", fix)


def _headers() -> Check:
    header = Path(sysconfig.get_path("include"), "Python.h")
    if header.is_file():
        return Check("Python headers", "ok", str(header))
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    fix = _package_command(f"{python}-dev", f"{python}-devel")
    return Check("Python headers", "warn", f"{header} is missing: torch.compile may not work", fix)


def _memory(machine: machines.Machine) -> Check:
    size = f"{machine.host_memory_bytes / GB:.1f} GB"
    if 0 < machine.host_memory_bytes < LITTLE_MEMORY:
        return Check("memory", "warn", f"only {size} of host memory", "give the machine or container more, or use small models")
    return Check("memory", "ok", f"{size} of host memory")


def _disk(name: str, folder: Path, limits: tuple[int, int]) -> Check:
    """Room and permission where ``folder`` is, or will be."""
    folder = folder.expanduser().absolute()
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(name, "fail", f"{folder}: {error.strerror}", "choose another folder: OPTKIT_CACHE_DIR")
    detail = f"{folder}: {free / GB:.1f} GB free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{folder} cannot be written ({there})", "choose another (OPTKIT_CACHE_DIR) or change its permissions")
    status = "fail" if free < limits[1] else "warn" if free < limits[0] else "ok"
    return Check(name, status, detail, "" if status == "ok" else f"free {(limits[0] - free) / GB:.1f} GB there, or choose another folder")


def _hub_cache() -> Check:
    """Where models of the Hugging Face hub are kept. Whether the hub answers is not tried: no network without being asked."""
    home = Path(os.environ.get("HF_HOME") or _cache_home() / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    models = sum(entry.name.startswith("models--") for entry in folder.iterdir()) if folder.is_dir() else 0
    offline = ", offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") else ""
    return Check("Hugging Face cache", "ok", f"{folder}: {models} models{offline}")


def _distributions() -> list[Check]:
    """What optkit's own metadata asks for: a check for the core's requirements, and one for each extra."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        wanted = requires("optkit") or []
    except PackageNotFoundError:
        return [Check("optkit", "warn", "not installed, so its requirements are unknown", "pip install -c constraints.txt -e .")]
    groups: dict[str, list[str]] = {"": []}
    for line in wanted:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        groups.setdefault(extra.group(1) if extra else "", []).append(requirement.strip())
    groups.pop("all", None)  # it gathers others
    return [_group(extra, requirements) for extra, requirements in groups.items() if requirements]


def _group(extra: str, requirements: Iterable[str]) -> Check:
    have: list[str] = []
    lack: list[str] = []
    for requirement in requirements:
        version, problem = _installed(requirement)
        (lack if problem else have).append(problem or version)
    if not lack:
        return Check(f"extra {extra}" if extra else "requirements", "ok", ", ".join(have))
    fix = f"pip install 'optkit[{extra}]'" if extra else "pip install -c constraints.txt optkit"
    return Check(f"extra {extra}" if extra else "requirements", "warn" if extra else "fail", "; ".join([*lack, *have]), fix)


def _installed(requirement: str) -> tuple[str, str | None]:
    """(``"torch 2.13.0"``, ``None``), or the problem with a requirement such as ``"torch>=2.11,<2.14"``. Nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    parts = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^)]*)\)?", requirement)
    name, bounds = (parts.group(1), parts.group(2)) if parts else (requirement, "")
    try:
        found = version(name)
    except PackageNotFoundError:
        return name, f"{name} is not installed"
    if all(_admits(bound.strip(), found) for bound in bounds.split(",") if bound.strip()):
        return f"{name} {found}", None
    return name, f"{name} {found} is not {bounds}"


def _admits(bound: str, found: str) -> bool:
    """``>=`` and ``<`` by release numbers, which is all that optkit's own requirements use; other bounds are pip's to judge."""
    operator, wanted = (bound[:2], bound[2:]) if bound[:2] == ">=" else (bound[:1], bound[1:])
    here, there = _release(found), _release(wanted)
    here += (0,) * (len(there) - len(here))
    return here >= there if operator == ">=" else here < there if operator == "<" else True


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"\s*v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in found.group(1).split(".")) if found else ()


def _first_program(names: Sequence[str]) -> str | None:
    return next((path for path in (shutil.which(name.split()[0]) for name in names if name.strip()) if path), None)


def _package_command(debian: str, fedora: str) -> str:
    if shutil.which("apt-get"):
        return f"sudo apt-get install {debian}"
    if shutil.which("dnf"):
        return f"sudo dnf install {fedora}"
    return "xcode-select --install" if sys.platform == "darwin" else f"install {debian} (Debian, Ubuntu) or {fedora} (Fedora)"


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


def main(arguments: Sequence[str]) -> int:
    """Print a line a check; 1 where one fails."""
    early = "--before-install" in arguments or not __package__
    found = before_install() if early else checks()
    for check in found:
        print(f"{check.status:4}  {check.name}: {check.detail}" + (f"\n      -> {check.fix}" if check.fix else ""))
    return int(any(check.status == "fail" for check in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
