"""The trial server's imports: questions about the GPU are answered, rightly, and none of them starts CUDA."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from optkit.machine import detect
from optkit.registry import discover
from optkit.server_imports import KnownProperties, answered, import_all

torch = pytest.importorskip("torch")

GPU = replace(detect(), device="cuda", name="NVIDIA H200", count=1, compute_capability=(9, 0), memory_bytes=2**37)


class FakeCuda:
    """``torch.cuda`` of a machine with a GPU, where what starts CUDA is counted."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int = 1):
        self.started = 0
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "current_device", self.start)
        patch.setattr(torch.cuda, "get_device_properties", self.properties)

    def start(self) -> int:
        self.started += 1
        return 0

    def properties(self, device: object = None) -> object:
        self.started += 1
        return type("Properties", (), {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132})()


def test_what_the_driver_knows_does_not_start_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with answered(GPU):
        kept = torch.cuda.get_device_properties
        assert torch.cuda.get_device_capability() == torch.cuda.get_device_capability(torch.cuda.device(0)) == (9, 0)
        assert torch.cuda.get_device_capability("cuda:0") == (9, 0) and torch.cuda.get_device_name() == "NVIDIA H200"
        assert torch.cuda.current_device() == 0
        properties = torch.cuda.get_device_properties(0)
    assert cuda.started == 0
    assert isinstance(properties, KnownProperties) and properties.multi_processor_count == 132  # kept by a module, and asked later
    assert kept().multi_processor_count == 132 and not isinstance(kept(), KnownProperties)
    assert torch.cuda.get_device_properties == cuda.properties
    assert cuda.started == 3


@pytest.mark.parametrize(
    ("count", "machine"), [(2, GPU), (1, replace(GPU, compute_capability=None))], ids=["several models", "unknown capability"]
)
def test_where_the_driver_cannot_tell_torch_is_asked(monkeypatch: pytest.MonkeyPatch, count: int, machine: object) -> None:
    cuda = FakeCuda(monkeypatch, count)
    with answered(machine):  # type: ignore[arg-type]
        assert torch.cuda.get_device_properties(0).major == 9
    assert cuda.started == 1


def test_a_module_that_fails_is_named_and_the_others_are_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeCuda(monkeypatch)
    monkeypatch.setattr("optkit.server_imports.detect", lambda: GPU)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "asks_at_import.py").write_text("import torch\ncapability = torch.cuda.get_device_capability()")
    assert import_all(["torch", "no_such_module", "asks_at_import"]) == {
        "no_such_module": "ModuleNotFoundError: No module named 'no_such_module'"
    }
    assert sys.modules.pop("asks_at_import").capability == (9, 0)


#: A Python whose torch believes that a GPU is there; imports the modules, and prints what started CUDA.
_PROGRAM = """\
import json, sys, traceback, warnings
warnings.simplefilter("ignore")
import torch
started = []
def start(*_): started.append("".join(traceback.format_stack(limit=40)[:-1]))
def properties(*_): start(); return type("P", (), {"major": 9, "minor": 0, "name": "NVIDIA H200"})()
torch.cuda._lazy_init = start
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.current_device, torch.cuda.get_device_properties = lambda: start() or 0, properties
torch.version.cuda = "13.0"
from dataclasses import replace
from optkit import machine, server_imports
known = replace(machine.detect(), device="cuda", name="NVIDIA H200", count=1, compute_capability=(9, 0))
server_imports.detect = lambda: known if sys.argv[2] == "answered" else replace(known, device="cpu")
server_imports.import_all(json.loads(sys.argv[1]))
print("STARTED " + json.dumps(started))
"""


def started_cuda(modules: list[str], how: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", _PROGRAM, json.dumps(modules), how], capture_output=True, text=True, timeout=120)
    lines = [line for line in run.stdout.splitlines() if line.startswith("STARTED ")]
    assert lines, run.stderr[-2000:]
    found: list[str] = json.loads(lines[0].removeprefix("STARTED "))
    return found


def test_nothing_that_our_techniques_preload_starts_cuda() -> None:
    preload = sorted({module for found in discover() if found.technique for module in found.technique.preload})
    modules = ["torch", "transformers.generation.utils", "transformers.models.llama.modeling_llama", *preload]
    assert started_cuda(modules, "answered") == []


def test_without_answers_an_import_would_start_cuda() -> None:
    pytest.importorskip("bitsandbytes")
    assert any("bitsandbytes" in stack for stack in started_cuda(["torch", "bitsandbytes"], "not answered"))
