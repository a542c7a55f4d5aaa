"""NVIDIA GPUs as the driver describes them: NVML through nvidia-ml-py, else ``nvidia-smi``, else what the kernel shows.

Standard library only; nothing is asked where neither a driver nor a device node is there, because importing pynvml takes 30 ms.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ON_PURPOSE = "`--profile cpu` runs on the CPU on purpose"


class Gpu(NamedTuple):
    """One device that CUDA would offer (a MIG instance counts as one)."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int] | None
    uuid: str


@dataclass(frozen=True)
class Driver:
    """The devices in the driver's order, its version, the newest CUDA that it runs, and why it offers none."""

    gpus: list[Gpu] = field(default_factory=list)
    version: str | None = None
    cuda: str | None = None
    problem: str | None = None


def query(root: Path) -> tuple[Driver, int]:
    """What the driver says, and how many NVIDIA GPUs there are, usable or not."""
    information = sorted(root.glob("proc/driver/nvidia/gpus/*/information"))
    loaded = [name for name in ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg") if (root / name).exists()]
    if not loaded and os.name != "nt":
        on_bus = _pci_gpus(root)
        problem = f"the PCI bus shows {on_bus} NVIDIA GPU(s) and no NVIDIA driver is loaded: install the driver and reboot; {ON_PURPOSE}"
        return Driver(problem=problem), on_bus
    driver = _ask_nvml() or _ask_nvidia_smi()
    if driver.gpus:
        return driver, len(driver.gpus)
    seen = len(information) or (0 if loaded == ["dev/dxg"] or os.name == "nt" else 1)
    found = re.search(r"\b(\d{3,4}\.\d+(?:\.\d+)?)\b", read_text(root / "proc/driver/nvidia/version"))
    model = re.search(r"Model:\s*(.+)", read_text(information[0])) if information else None
    problem = (
        f"{model.group(1).strip() if model else 'an NVIDIA GPU'} is there and cannot be used ({driver.problem or 'no device is offered'}): "
        f"in a container, start it with GPU access (docker run --gpus all); else reinstall the driver and reboot; {ON_PURPOSE}"
    )
    return Driver(version=driver.version or (found.group(1) if found else None), cuda=driver.cuda, problem=problem), seen


def _pci_gpus(root: Path) -> int:
    """NVIDIA devices of the display classes (VGA and 3D controllers; not audio, USB or NVSwitch)."""
    found = 0
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        if read_text(vendor).strip() == "0x10de" and read_text(vendor.with_name("class")).startswith(("0x0300", "0x0302")):
            found += 1
    return found


def _ask_nvml() -> Driver | None:
    """Everything NVML knows; ``None`` where nvidia-ml-py is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Driver(problem=f"NVML: {error}")
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        gpus = [gpu for handle in handles for gpu in _nvml_gpus(pynvml, handle)]
        return Driver(gpus, _text(pynvml.nvmlSystemGetDriverVersion()), _cuda_version(cuda))
    except pynvml.NVMLError as error:
        return Driver(problem=f"NVML: {error}")
    finally:
        pynvml.nvmlShutdown()


def _nvml_gpus(pynvml: Any, device: Any) -> list[Gpu]:
    """The device itself, or its MIG instances where MIG is on: then CUDA offers an instance and not the device."""
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(device))
    return [
        Gpu(_text(pynvml.nvmlDeviceGetName(handle)), _nvml_memory(pynvml, handle), capability, _text(pynvml.nvmlDeviceGetUUID(handle)))
        for handle in _mig_instances(pynvml, device) or [device]
    ]


def _mig_instances(pynvml: Any, device: Any) -> list[Any]:
    found: list[Any] = []
    try:
        if pynvml.nvmlDeviceGetMigMode(device)[0]:
            for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
                found.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index))
    except pynvml.NVMLError:
        pass  # the model has no MIG, or there are no more instances
    return found


def _nvml_memory(pynvml: Any, handle: Any) -> int:
    """Bytes; 0 where GPU and CPU share one memory, which NVML does not count."""
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:
        return 0


def _ask_nvidia_smi() -> Driver:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap,uuid,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return Driver(problem=f"nvidia-smi: {error}")
    if answer.returncode:
        lines = (answer.stdout + answer.stderr).strip().splitlines()
        return Driver(problem=f"nvidia-smi: {lines[0] if lines else f'exit status {answer.returncode}'}")
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.count(",") == 4]
    gpus = [Gpu(name, int(mib) * 2**20 if mib.isdecimal() else 0, _capability(cap), uuid) for name, mib, cap, uuid, _ in rows]
    return Driver(gpus, rows[0][4] if rows else None, _cuda_of_driver())


def _capability(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _cuda_of_driver() -> str | None:
    """``cuDriverGetVersion`` needs no initialisation, so it costs no CUDA context."""
    import ctypes

    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return _cuda_version(version.value)


def _cuda_version(number: int) -> str:
    """``13000`` -> ``"13.0"``."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def read_text(path: Path) -> str:
    """The file's text, or nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""
