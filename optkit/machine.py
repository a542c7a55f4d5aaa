"""What this machine is: GPU, driver, CPU, memory. Standard library only, and torch is never imported.

``detect()`` asks NVML through nvidia-ml-py, else ``nvidia-smi``, and takes under 10 ms where no NVIDIA driver is loaded.
This file also runs on its own (``doctor.py --before-install``), before anything is installed.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from optkit.nvidia import ON_PURPOSE, Driver, Gpu, query, read_text

#: CPU flags that decide which kernels run: AVX-512 BF16 and VNNI, AMX, and their counterparts on ARM.
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
#: Values of CUDA_VISIBLE_DEVICES that mean "no GPU, on purpose".
NO_GPU_ON_PURPOSE = ("", "-1", "none", "void", "NoDevFiles")
#: CUDA's major version -> the oldest Linux driver that runs it (NVIDIA, "CUDA Compatibility", minor version compatibility).
OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580.65"}
TORCH_BUILDS = "https://pytorch.org/get-started/locally/ gives the command"


@dataclass(frozen=True)
class Machine:
    """One machine, as its drivers and kernel describe it. Memory is in bytes and ``memory_bytes`` is that of *one* device.

    :param device: ``"cuda"`` where the driver offers a GPU, else ``"cpu"`` (then ``name`` and ``memory_bytes`` are the CPU's and host's).
    :param count: visible GPUs of the same model as the first one; one where it is a MIG instance, since a process gets one.
    :param cpu_cores: logical processors that this process may use: affinity and cgroup quota.
    :param host_memory_bytes: memory of the host, or the cgroup's limit where that is lower.
    :param environment: ``"colab"`` or ``"kaggle"`` where the environment says so.
    :param gpus_seen: NVIDIA GPUs that the driver or the PCI bus shows, usable or not.
    :param gpu_problem: why no GPU can be used although one is there, with the way out.
    """

    device: str
    name: str
    count: int
    compute_capability: tuple[int, int] | None
    memory_bytes: int
    host_memory_bytes: int
    cpu_model: str
    cpu_cores: int
    cpu_features: tuple[str, ...] = ()
    driver: str | None = None
    cuda_driver_version: str | None = None
    platform: str = ""
    python: str = ""
    environment: str | None = None
    gpus_seen: int = 0
    gpu_problem: str | None = None

    def model_dump(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """``"2 x Tesla T4, 15.0 GB each, sm_75, driver 580.65.06"`` or ``"AMD EPYC, 2 cores, 23.5 GB"``."""
        if self.device == "cpu":
            return f"{self.cpu_model}, {self.cpu_cores} cores, {self.host_memory_bytes / 2**30:.1f} GB"
        many = f"{self.count} x " if self.count > 1 else ""
        each = " each" if self.count > 1 else ""
        capability = "sm_{}{}".format(*self.compute_capability) if self.compute_capability else "unknown capability"
        return f"{many}{self.name}, {self.memory_bytes / 2**30:.1f} GB{each}, {capability}, driver {self.driver or 'unknown'}"


class TorchBuild(NamedTuple):
    """What the installed torch was built for: ``cuda`` such as ``"13.0"``, or ``None`` for a CPU or ROCm build."""

    version: str
    cuda: str | None
    hip: str | None


def detect(*, root: str | Path = "/", environ: Mapping[str, str] = os.environ) -> Machine:
    """Describe this machine, without importing torch and without raising.

    :param root: where ``proc``, ``sys`` and ``dev`` are; tests point it at a made-up tree.
    :param environ: read for ``CUDA_VISIBLE_DEVICES``, ``CUDA_DEVICE_ORDER`` and the notebook hosts' variables.
    """
    root = Path(root)
    cpu_model, features = _cpu(root)
    host_memory = _host_memory(root)
    driver, seen = query(root)
    gpus, problem = _usable(driver, seen, environ)
    first = gpus[0] if gpus else None
    return Machine(
        device="cuda" if first else "cpu",
        name=first.name if first else cpu_model,
        count=1 if first is None or first.uuid.startswith("MIG-") else sum(gpu.name == first.name for gpu in gpus),
        compute_capability=first.compute_capability if first else None,
        memory_bytes=(first.memory_bytes if first else 0) or host_memory,
        host_memory_bytes=host_memory,
        cpu_model=cpu_model,
        cpu_cores=_cpu_cores(root),
        cpu_features=features,
        driver=driver.version,
        cuda_driver_version=driver.cuda,
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        environment="colab" if "COLAB_RELEASE_TAG" in environ else "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in environ else None,
        gpus_seen=seen,
        gpu_problem=problem,
    )


#: Cores that other processes may keep busy on a machine that counts as quiet.
QUIET_CORES = 0.5


def busy_cores(seconds: float = 0.2, *, root: str | Path = "/") -> float:
    """How many of this process's cores all processes keep busy just now, from the kernel's counters over a moment; 0 where there are none.

    Where a process is bound to some cores, what happens on the others does not disturb it. Without counters of single cores, all count.
    """
    mine = {f"cpu{core}" for core in (os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ())}

    def counters() -> tuple[int, int, int] | None:
        rows = [line.split() for line in (read_text(Path(root) / "proc/stat") or "").splitlines() if line.startswith("cpu")]
        own = [row for row in rows if row[0] in mine]
        values = [[int(value) for value in row[1:] if value.isdigit()] for row in own or rows[:1]]
        if not values or any(len(row) < 8 for row in values):
            return None
        return sum(sum(row[:8]) for row in values), sum(row[3] + row[4] for row in values), len(own) or os.cpu_count() or 1

    before = counters()
    time.sleep(seconds)
    after = counters()
    if before is None or after is None or after[0] <= before[0]:
        return 0.0
    return (1 - (after[1] - before[1]) / (after[0] - before[0])) * after[2]


def silent_cpu_fallback(machine: Machine, build: TorchBuild | None = None) -> str | None:
    """One line when an NVIDIA GPU is there and torch cannot use it, with the cause and the way out; ``None`` when all is well.

    :param build: torch's build; read from the installed torch's ``version.py`` (as text) when it is left out.
    """
    if machine.gpu_problem:
        return machine.gpu_problem
    build = build or torch_build()
    if machine.device != "cuda" or build is None:
        return None
    if build.cuda is None:
        kind = "ROCm" if build.hip else "CPU"
        known = f" for CUDA {machine.cuda_driver_version} or older" if machine.cuda_driver_version else ""
        return (
            f"this machine has {machine.name} but torch {build.version} is a {kind} build: install a CUDA build{known} "
            f"({TORCH_BUILDS}); {ON_PURPOSE}"
        )
    return _driver_too_old(machine, build, _version(build.cuda)) or _no_kernels(machine, build, _version(build.cuda))


def torch_build() -> TorchBuild | None:
    """The installed torch's build, read as text from its ``version.py``; ``None`` where torch is not installed."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    text = read_text(Path(spec.submodule_search_locations[0], "version.py"))
    values = dict(re.findall(r"^(__version__|cuda|hip)\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE))
    return TorchBuild(values.get("__version__", "unknown"), values.get("cuda"), values.get("hip"))


def _driver_too_old(machine: Machine, build: TorchBuild, wheel: tuple[int, ...]) -> str | None:
    # Within one major version CUDA runs on every driver of that major version, so only the major numbers count.
    if not machine.cuda_driver_version or wheel[0] <= _version(machine.cuda_driver_version)[0]:
        return None
    needed = f"at least {OLDEST_DRIVER[wheel[0]]}" if wheel[0] in OLDEST_DRIVER else "a newer one"
    return (
        f"the NVIDIA driver {machine.driver} knows CUDA {machine.cuda_driver_version} and torch {build.version} needs CUDA {build.cuda}: "
        f"update the driver ({needed}), or install torch for CUDA {machine.cuda_driver_version} or older ({TORCH_BUILDS}); {ON_PURPOSE}"
    )


def _no_kernels(machine: Machine, build: TorchBuild, wheel: tuple[int, ...]) -> str | None:
    """CUDA 13 dropped everything before Turing, and Blackwell came with CUDA 12.8."""
    capability = machine.compute_capability
    if capability is None:
        return None
    if wheel >= (13,) and capability < (7, 5):
        wanted = "CUDA 12"
    elif wheel < (12, 8) and capability >= (10, 0):
        wanted = "CUDA 12.8 or newer"
    else:
        return None
    return (
        f"torch {build.version} (CUDA {build.cuda}) has no kernels for {machine.name} (sm_{capability[0]}{capability[1]}): "
        f"install torch for {wanted} ({TORCH_BUILDS}); {ON_PURPOSE}"
    )


def _usable(driver: Driver, seen: int, environ: Mapping[str, str]) -> tuple[list[Gpu], str | None]:
    """The GPUs that CUDA would offer, in its order, and why there are none although some are there."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in NO_GPU_ON_PURPOSE:
        return [], None
    gpus = driver.gpus
    if environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":  # CUDA's default order is the fastest first
        gpus = sorted(gpus, key=lambda gpu: (gpu.compute_capability or (0, 0), gpu.memory_bytes), reverse=True)
    if visible is None or not gpus:
        return gpus, driver.problem if seen else None
    chosen: list[Gpu] = []
    for token in (part.strip() for part in visible.split(",")):
        if token.isdecimal() and int(token) < len(gpus):
            chosen.append(gpus[int(token)])
        elif token.startswith(("GPU-", "MIG-")) and any(gpu.uuid.startswith(token) for gpu in gpus):
            chosen.append(next(gpu for gpu in gpus if gpu.uuid.startswith(token)))
        else:
            break  # CUDA ignores the first entry that it does not know, and everything after it
    problem = f"CUDA_VISIBLE_DEVICES={visible!r} names none of the {len(gpus)} GPUs of this machine: correct or unset it; {ON_PURPOSE}"
    return chosen, None if chosen else problem


def _cpu(root: Path) -> tuple[str, tuple[str, ...]]:
    """Model and features, from the first processor only: the whole of /proc/cpuinfo takes long on large machines."""
    facts: dict[str, str] = {}
    try:
        with open(root / "proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    break
                key, _, value = line.partition(":")
                facts[key.strip()] = value.strip()
    except OSError:
        pass
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    model = facts.get("model name") or platform.machine() or "unknown CPU"  # platform.processor() would start a process
    return model, tuple(feature for feature in CPU_FEATURES if feature in flags)


def _cpu_cores(root: Path) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups(root, "cpu"):
        quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = read_text(folder / "cpu.cfs_quota_us").strip(), read_text(folder / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(period):
            cores = min(cores, max(1, int(quota) // int(period)))  # a part of a core more would only be throttled
    return cores


def _host_memory(root: Path) -> int:
    found = re.search(r"^MemTotal:\s+(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    total = int(found.group(1)) * 1024 if found else _sysconf_memory()
    for folder in _cgroups(root, "memory"):
        limit = read_text(folder / "memory.max").strip() or read_text(folder / "memory.limit_in_bytes").strip()
        if limit.isdecimal():
            total = min(total, int(limit))
    return total


def _sysconf_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup folders for one controller, and those above them: each may set a limit (v1 and v2)."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = base / path.strip().lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder == base or base in folder.parents)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2]) or (0,)
