"""The doctor: each check in both directions, and that it runs on a bare Python."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from optkit import doctor, machine
from optkit.doctor import Check, before_install, checks
from optkit.machine import Machine, TorchBuild

SCRIPT = Path(doctor.__file__)
CPU = Machine("cpu", "EPYC", 1, None, 2**34, 2**34, "EPYC", 2)
GPU = Machine("cuda", "NVIDIA H200", 1, (9, 0), 143_771 * 2**20, 2**40, "Xeon", 16, driver="580.65.06", cuda_driver_version="13.0")


def named(found: Sequence[Check], name: str) -> Check:
    return next(check for check in found if check.name == name)


def installed(monkeypatch: pytest.MonkeyPatch, requires: list[str], versions: dict[str, str]) -> None:
    """As if optkit's metadata asked for ``requires`` and these distributions were there."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requires)
    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("arguments", [["--before-install"], []])
def test_it_runs_as_a_file_without_any_package(arguments: list[str], tmp_path: Path) -> None:
    # -I and -S: neither the environment's packages nor the folder of the script are importable.
    command = [sys.executable, "-I", "-S", "-W", "error", str(SCRIPT), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.stderr == ""
    statuses = [line.split()[0] for line in run.stdout.splitlines() if not line.startswith(" ")]
    assert len(statuses) == 6 and set(statuses) <= {"ok", "warn", "fail"}
    assert run.returncode == int("fail" in statuses)


def test_it_imports_the_standard_library_alone() -> None:
    code = (
        "import sys; before = set(sys.modules); import optkit.doctor; optkit.doctor.checks(); new = set(sys.modules) - before;"
        "print(sorted({name.partition('.')[0] for name in new} - set(sys.stdlib_module_names)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # _sysconfigdata is of the standard library, but is named by platform
    others = [name for name in literal_eval(run.stdout) if not name.startswith("_sysconfigdata")]
    assert others == ["optkit"]


def test_every_check_that_is_not_well_has_a_fix() -> None:
    found = [*checks(CPU), *before_install(CPU)]
    assert {check.status for check in found} <= {"ok", "warn", "fail"}
    assert [check.name for check in found if check.status != "ok" and not check.fix] == []
    assert all("\n" not in check.detail + check.fix for check in found)


@pytest.mark.parametrize(
    ("version", "status"), [((3, 9, 1), "fail"), ((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 5), "ok"), ((3, 14, 0), "fail")]
)
def test_python_s_version(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], status: str) -> None:
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(version_info=version, version=".".join(map(str, version)), executable="python"))
    check = doctor._python()
    assert check.status == status and bool(check.fix) == (status == "fail")


def test_a_gpu_that_cannot_be_used_fails_with_the_way_out() -> None:
    check = named(before_install(replace(CPU, gpus_seen=1, gpu_problem="no NVIDIA driver is loaded: install the driver")), "GPU")
    assert (check.status, check.detail, check.fix) == ("fail", "no NVIDIA driver is loaded", "install the driver")


def test_gpus_hidden_on_purpose_are_well() -> None:
    check = named(before_install(replace(CPU, gpus_seen=2)), "GPU")
    assert check.status == "ok" and "on purpose" in check.detail


@pytest.mark.parametrize(
    ("build", "where", "status", "detail"),
    [
        (None, CPU, "fail", "not installed"),
        (TorchBuild("2.13.0+cpu", None, None), CPU, "ok", "built for the CPU"),
        (TorchBuild("2.13.0+cu130", "13.0", None), GPU, "ok", "built for CUDA 13.0"),
        (TorchBuild("2.13.0+cpu", None, None), GPU, "fail", "is a CPU build"),
        (TorchBuild("2.13.0+cu130", "13.0", None), replace(GPU, cuda_driver_version="12.4"), "fail", "needs CUDA 13.0"),
    ],
)
def test_torch_s_build_against_the_gpu(
    monkeypatch: pytest.MonkeyPatch, build: TorchBuild | None, where: Machine, status: str, detail: str
) -> None:
    monkeypatch.setattr(machine, "torch_build", lambda: build)
    check = named(checks(where), "torch")
    assert check.status == status and detail in check.detail


@pytest.mark.parametrize(
    ("programs", "status", "detail"),
    [
        ({"cc", "g++"}, "ok", "g++"),
        ({"gcc"}, "warn", "no C++ compiler"),
        ({"clang++"}, "warn", "no C compiler"),
        (set(), "warn", "no C and C++ compiler"),
    ],
)
def test_compilers(monkeypatch: pytest.MonkeyPatch, programs: set[str], status: str, detail: str) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in programs else None)
    check = named(before_install(CPU), "C compiler")
    assert check.status == status and detail in check.detail


def test_a_compiler_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "mycc -m64")
    monkeypatch.setenv("CXX", "mycxx")
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}" if name.startswith("my") else None)
    assert named(before_install(CPU), "C compiler").detail == "/opt/mycc, /opt/mycxx"


def test_missing_headers_warn_and_name_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    check = named(before_install(CPU), "Python headers")
    assert check.status == "warn" and "torch.compile" in check.detail and f"python3.{sys.version_info[1]}" in check.fix
    (tmp_path / "Python.h").touch()
    assert named(before_install(CPU), "Python headers").status == "ok"


@pytest.mark.parametrize(("free", "status"), [(20 * 2**30, "ok"), (2**30, "warn"), (2**20, "fail")])
def test_disk_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert named(checks(CPU, tmp_path / "not" / "yet"), "cache folder").status == status


def test_a_cache_folder_that_is_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert named(checks(CPU, tmp_path / "file" / "cache"), "cache folder").status == "fail"


def test_little_memory_warns() -> None:
    assert named(checks(replace(CPU, host_memory_bytes=2**30)), "memory").status == "warn"
    assert named(checks(CPU), "memory").status == "ok"


def test_the_hub_s_cache_is_read_and_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models--org--name").mkdir()
    (tmp_path / "version.txt").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert named(checks(CPU), "Hugging Face cache").detail == f"{tmp_path}: 1 models, offline (HF_HUB_OFFLINE)"


def test_requirements_are_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        "torch<2.14,>=2.11",
        "rich>=14",
        "alpha>=1.20; extra == 'one'",
        "beta>=2 ; extra == 'one'",
        "gamma[x]<0.15,>=0.14; extra == 'two'",
        "alpha>=1.20; extra == 'all'",
    ]
    installed(monkeypatch, requires, {"torch": "2.13.0+cpu", "rich": "15.0", "alpha": "1.9", "gamma": "0.14.0.1"})
    found = {check.name: check for check in checks(CPU)}
    assert found["requirements"].status == "ok" and "torch 2.13.0+cpu" in found["requirements"].detail
    assert found["extra one"].status == "warn" and found["extra one"].fix == "pip install 'optkit[one]'"
    assert found["extra one"].detail == "alpha 1.9 is not >=1.20; beta is not installed"
    assert found["extra two"].status == "ok"
    assert "extra all" not in found


def test_a_core_requirement_out_of_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, ["torch>=2.11,<2.14"], {"torch": "2.14.1"})
    assert named(checks(CPU), "requirements").status == "fail"


@pytest.mark.parametrize("found", ["0.9", "1.19.9", "1.20", "1.20.0", "1.20.1", "1.21rc1", "2.0.0+cpu", "2.14.0", "2.2"])
@pytest.mark.parametrize("bound", [">=1.20", "<2.14", ">=1.20.0", "<2"])
def test_bounds_are_judged_as_pip_does(bound: str, found: str) -> None:
    specifiers = pytest.importorskip("packaging.specifiers")
    assert doctor._admits(bound, found) == specifiers.SpecifierSet(bound, prereleases=True).contains(found)


def test_without_metadata_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError("optkit")

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert named(checks(CPU), "optkit").status == "warn"


def test_a_failed_check_is_exit_status_1_and_a_warning_is_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "before_install", lambda: [Check("a", "warn", "w", "mend it")])
    assert doctor.main(["--before-install"]) == 0
    assert capsys.readouterr().out == "warn  a: w\n      -> mend it\n"
    monkeypatch.setattr(doctor, "before_install", lambda: [Check("a", "fail", "w", "mend it")])
    assert doctor.main(["--before-install"]) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_folder_without_permission_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert named(checks(CPU, tmp_path / "cache"), "cache folder").status == "fail"
