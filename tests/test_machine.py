"""What is detected, against made-up trees of /proc and /sys, a stand-in for NVML, and what the operating system says by other means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from optkit import nvidia
from optkit.machine import Machine, TorchBuild, busy_cores, detect, silent_cpu_fallback, torch_build
from optkit.nvidia import Driver, Gpu

H200 = Gpu("NVIDIA H200", 143_771 * 2**20, (9, 0), "GPU-aaaa")
T4 = Gpu("Tesla T4", 15_360 * 2**20, (7, 5), "GPU-bbbb")
GPU_MACHINE = Machine("cuda", "NVIDIA H200", 1, (9, 0), 143_771 * 2**20, 2**40, "Xeon", 16, driver="580.65.06", cuda_driver_version="13.0")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def detect_with(monkeypatch: pytest.MonkeyPatch, root: Path, driver: Driver | None, environ: dict[str, str] | None = None) -> Machine:
    """Detect on a machine whose driver answers as given."""
    monkeypatch.setattr(nvidia, "_ask_nvml", lambda: driver)
    write(root, {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n"})
    return detect(root=root, environ=environ or {})


def test_this_machine_agrees_with_psutil() -> None:
    psutil = pytest.importorskip("psutil")
    machine = detect()
    assert 0 < machine.host_memory_bytes <= psutil.virtual_memory().total
    assert 1 <= machine.cpu_cores <= psutil.cpu_count()
    assert machine.python == ".".join(map(str, sys.version_info[:3]))


def test_detection_imports_neither_torch_nor_numpy_nor_pynvml_without_a_driver(tmp_path: Path) -> None:
    code = (
        f"import sys; from optkit.machine import detect, silent_cpu_fallback; silent_cpu_fallback(detect(root={str(tmp_path)!r}));"
        "print([name for name in ('torch', 'numpy', 'transformers', 'pynvml', 'pydantic', 'subprocess') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_an_empty_tree_is_a_cpu_without_facts(tmp_path: Path) -> None:
    machine = detect(root=tmp_path, environ={})
    assert (machine.device, machine.count, machine.gpus_seen, machine.gpu_problem) == ("cpu", 1, 0, None)
    assert machine.cpu_features == ()


def test_cpu_features_and_model_come_from_the_first_processor(tmp_path: Path) -> None:
    text = "processor : 0\nmodel name : Xeon 8480\nflags : fpu avx2 avx512f amx_bf16 avx512_vnni\n\nprocessor : 1\nmodel name : other\n"
    machine = detect(root=write(tmp_path, {"proc/cpuinfo": text}), environ={})
    assert machine.name == machine.cpu_model == "Xeon 8480"
    assert machine.cpu_features == ("avx2", "avx512f", "avx512_vnni", "amx_bf16")


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "2147483648\n", "sys/fs/cgroup/a/b/memory.max": "max\n"},
        {"proc/self/cgroup": "4:memory:/a\n0::/\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "2147483648\n"},
    ],
    ids=["v2, set above", "v1"],
)
def test_a_cgroup_limits_memory(tmp_path: Path, files: dict[str, str]) -> None:
    machine = detect(root=write(tmp_path, {"proc/meminfo": "MemTotal:       16000000 kB\n", **files}), environ={})
    assert machine.memory_bytes == machine.host_memory_bytes == 2 * 2**30


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "350000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "5:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 64),
    ],
    ids=["one core", "half a core", "no limit", "v1", "v1, no limit"],
)
def test_a_cgroup_limits_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert detect(root=write(tmp_path, files), environ={}).cpu_cores == cores


STAT = "cpu  {all} 0 0 {rest} 0 0 0 0 0 0\ncpu0 {one} 0 0 {free} 0 0 0 0 0 0\ncpu1 {other} 0 0 0 0 0 0 0 0 0\n"
TOTAL = STAT.partition("\n")[0] + "\n"


@pytest.mark.parametrize(
    ("stat", "mine", "busy"),
    [(STAT, {0}, 0.25), (STAT, {1}, 1.0), (STAT, {0, 1}, 1.25), (TOTAL, {0}, 1.25), ("", {0}, 0.0), ("cpu  1 2\n", {0}, 0.0)],
)
def test_only_cores_that_a_process_may_use_disturb_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stat: str, mine: set[int], busy: float
) -> None:
    """Two cores for 100 ticks: the first is busy for 25 of them, the second for all."""
    (tmp_path / "proc").mkdir()
    file = tmp_path / "proc" / "stat"
    file.write_text(stat.format(all=1000, rest=500, one=700, free=300, other=900))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: mine)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    later = stat.format(all=1125, rest=575, one=725, free=375, other=1000)
    monkeypatch.setattr("optkit.machine.time.sleep", lambda seconds: file.write_text(later))
    assert busy_cores(root=tmp_path) == pytest.approx(busy)


def test_the_driver_s_facts_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = detect_with(monkeypatch, tmp_path, Driver([H200, H200], "580.65.06", "13.0"))
    assert (machine.device, machine.name, machine.count, machine.compute_capability) == ("cuda", "NVIDIA H200", 2, (9, 0))
    assert machine.memory_bytes == 143_771 * 2**20
    assert machine.describe() == "2 x NVIDIA H200, 140.4 GB each, sm_90, driver 580.65.06"


def test_of_mixed_gpus_the_first_is_the_one_that_cuda_puts_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver([T4, H200, T4])
    assert detect_with(monkeypatch, tmp_path, driver).name == "NVIDIA H200"
    by_bus = detect_with(monkeypatch, tmp_path, driver, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert (by_bus.name, by_bus.count) == ("Tesla T4", 2)


@pytest.mark.parametrize(
    ("visible", "name", "count"),
    [("0", "NVIDIA H200", 1), ("1,2", "Tesla T4", 2), ("GPU-bb", "Tesla T4", 1), ("0,9,1", "NVIDIA H200", 1)],
)
def test_cuda_visible_devices_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, name: str, count: int) -> None:
    machine = detect_with(monkeypatch, tmp_path, Driver([T4, H200, T4]), {"CUDA_VISIBLE_DEVICES": visible})
    assert (machine.name, machine.count) == (name, count)


@pytest.mark.parametrize("visible", ["", "-1", " "])
def test_hiding_the_gpus_on_purpose_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    machine = detect_with(monkeypatch, tmp_path, Driver([H200]), {"CUDA_VISIBLE_DEVICES": visible})
    assert (machine.device, machine.gpus_seen) == ("cpu", 1)
    assert silent_cpu_fallback(machine) is None


def test_naming_a_gpu_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = detect_with(monkeypatch, tmp_path, Driver([H200]), {"CUDA_VISIBLE_DEVICES": "3"})
    assert machine.device == "cpu"
    assert "CUDA_VISIBLE_DEVICES='3' names none of the 1 GPUs" in (silent_cpu_fallback(machine) or "")


def test_a_mig_instance_counts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = [Gpu("NVIDIA H200 MIG 1g.18gb", 16 * 2**30, (9, 0), f"MIG-{index}") for index in range(7)]
    assert detect_with(monkeypatch, tmp_path, Driver(slices)).count == 1
    assert detect_with(monkeypatch, tmp_path, Driver(slices), {"CUDA_VISIBLE_DEVICES": "MIG-5"}).memory_bytes == 16 * 2**30


def test_a_gpu_on_the_bus_without_a_driver_is_told(tmp_path: Path) -> None:
    card, sound = "sys/bus/pci/devices/0000:01:00.0", "sys/bus/pci/devices/0000:01:00.1"
    write(tmp_path, {f"{card}/vendor": "0x10de\n", f"{card}/class": "0x030000\n"})
    write(tmp_path, {f"{sound}/vendor": "0x10de\n", f"{sound}/class": "0x040300\n"})
    machine = detect(root=tmp_path, environ={})
    assert (machine.device, machine.gpus_seen) == ("cpu", 1)
    message = silent_cpu_fallback(machine) or ""
    assert "no NVIDIA driver is loaded" in message and "--profile cpu" in message and "\n" not in message


def test_a_container_without_gpu_access_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H200\nIRQ: 1\n"})
    machine = detect_with(monkeypatch, tmp_path, Driver(problem="NVML: NVML Shared Library Not Found"))
    assert (machine.device, machine.driver, machine.gpus_seen) == ("cpu", "580.65.06", 1)
    assert "NVIDIA H200 is there and cannot be used (NVML: NVML Shared Library Not Found)" in (silent_cpu_fallback(machine) or "")


def test_without_nvml_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'Tesla T4, 15360, 7.5, GPU-1, 570.1'\necho 'Tesla T4, 15360, 7.5, GPU-2, 570.1'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)
    machine = detect_with(monkeypatch, tmp_path, None)
    assert (machine.name, machine.count, machine.compute_capability, machine.driver) == ("Tesla T4", 2, (7, 5), "570.1")
    assert machine.memory_bytes == 15 * 2**30


def test_a_failing_nvidia_smi_gives_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)
    assert "Driver/library version mismatch" in (detect_with(monkeypatch, tmp_path, None).gpu_problem or "")


class FakeNvml:
    """As much of pynvml as is asked, for one device; ``mig`` instances where there are any."""

    class NVMLError(Exception):
        pass

    def __init__(self, mig: int = 0, unified: bool = False):
        self.mig, self.unified, self.closed = mig, unified, False

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None:
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return "device"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12080

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return (12, 0)

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if not self.mig:
            raise self.NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        if index >= self.mig:
            raise self.NVMLError("Not Found")
        return f"instance {index}"

    def nvmlDeviceGetName(self, handle: str) -> bytes:  # pynvml gave bytes until version 11.5
        return f"NVIDIA {handle}".encode()

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return ("GPU-" if handle == "device" else "MIG-") + handle

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        if self.unified:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(total=32 * 2**30)


def test_nvml_is_asked_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert nvidia._ask_nvml() == Driver([Gpu("NVIDIA device", 32 * 2**30, (12, 0), "GPU-device")], "570.1", "12.8")
    assert fake.closed


def test_nvml_lists_mig_instances_in_place_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(mig=2))
    driver = nvidia._ask_nvml()
    assert driver is not None and [gpu.name for gpu in driver.gpus] == ["NVIDIA instance 0", "NVIDIA instance 1"]


def test_a_gpu_that_shares_the_host_s_memory_has_the_host_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(unified=True))
    root = write(tmp_path, {"dev/nvidiactl": "", "proc/meminfo": "MemTotal: 1024 kB\n"})
    assert detect(root=root, environ={}).memory_bytes == 2**20


@pytest.mark.parametrize(
    ("build", "changes", "expected"),
    [
        (TorchBuild("2.13.0+cu130", "13.0", None), {}, None),
        (TorchBuild("2.13.0+cu126", "12.6", None), {}, None),
        (TorchBuild("2.13.0+cu129", "12.9", None), {"cuda_driver_version": "12.2"}, None),
        (TorchBuild("2.13.0+cpu", None, None), {}, "torch 2.13.0+cpu is a CPU build: install a CUDA build for CUDA 13.0 or older"),
        (TorchBuild("2.13.0+rocm7", None, "7.0"), {}, "is a ROCm build"),
        (TorchBuild("2.13.0+cu130", "13.0", None), {"cuda_driver_version": "12.4"}, "update the driver (at least 580.65)"),
        (TorchBuild("2.13.0+cu130", "13.0", None), {"compute_capability": (7, 0), "name": "V100"}, "no kernels for V100 (sm_70)"),
        (TorchBuild("2.13.0+cu126", "12.6", None), {"compute_capability": (12, 0), "name": "RTX"}, "install torch for CUDA 12.8 or newer"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_is_told_in_one_line(build: TorchBuild, changes: dict[str, object], expected: str | None) -> None:
    message = silent_cpu_fallback(Machine(**{**GPU_MACHINE.model_dump(), **changes}), build)
    if expected is None:
        assert message is None
    else:
        assert message is not None and expected in message and "\n" not in message and "--profile cpu" in message


def test_torch_s_build_is_read_without_importing_it() -> None:
    torch = pytest.importorskip("torch")
    build = torch_build()
    assert build is not None
    assert (build.version, build.cuda, build.hip) == (str(torch.__version__), torch.version.cuda, torch.version.hip)
