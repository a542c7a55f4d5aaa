"""Whole runs among faults: the figures are measured and shown whatever the disk, the cache's place or a technique does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from optkit.errors import OptkitError
from optkit.experiment import execute
from optkit.loading import byte_tokenizer
from optkit.request import Request
from tests.fakes import install, plugin
from tests.faults import file_system
from tests.plugins.tiny import tiny_model
from tests.test_trial import assert_gone

TRANSFORM = "@hookimpl\ndef transform_model(model):\n    "
DETACH = """
@hookimpl
def transform_model(model, trial):
    import os, signal
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.write(write, str(os.getpid()).encode())
            while True: signal.pause()
        os._exit(0)
    raise ValueError('left process ' + os.read(read, 20).decode())
"""


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    model, _ = tiny_model("llama", vocab_size=256)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def request(model_folder: Path, said: list[str], **more: Any) -> Request:
    settings = {"generate.max_new_tokens": 4, "batch.size": 2}
    given = {"model": str(model_folder), "samples": "random:2x4", "plugins": [], "profile": "cpu", "repeats": 1, "set": settings}
    return Request(**given | more, warn=said.append)


def measured(record: dict[str, Any]) -> bool:
    baseline = record["arms"][0]
    return baseline["state"] == "ok" and len(baseline["seconds"]) == 1 and baseline["tokens"] > 0 and record["measured_now"]


def test_on_a_full_disk_a_run_measures_and_says_what_is_not_kept(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_RECORDS_DIR", str(tmp_path / "disk" / "records"))
    with file_system(tmp_path / "disk", "200k"):
        with pytest.raises(OSError, match="No space left"), open(tmp_path / "disk" / "ballast", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        said: list[str] = []
        assert measured(execute(request(model_folder, said, cache_dir=str(tmp_path / "disk" / "cache"))))
    lines = "\n".join(said)
    assert re.search(r"disk/cache cannot take this run's files \(0\.0 MB are free", lines)
    assert "record not kept" in lines and "OPTKIT_RECORDS_DIR names another folder" in lines
    assert "No space left on device" in lines
    assert all("\n" not in line for line in said)


def test_where_the_cache_cannot_be_written_a_run_measures(model_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("OPTKIT_RECORDS_DIR", str(tmp_path / "records"))
    said: list[str] = []
    assert measured(execute(request(model_folder, said, cache_dir=str(tmp_path / "file"))))
    assert len([line for line in said if "cannot take this run's files" in line]) == 1
    assert [line for line in said if " not cached: " in line]
    assert (tmp_path / "file").read_text() == "mine"


def test_records_that_cannot_be_reached_are_one_line_before_anything_is_measured(model_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("OPTKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OPTKIT_RECORDS_DIR", str(tmp_path / "file"))
    with pytest.raises(OptkitError, match="records not read: .*OPTKIT_RECORDS_DIR names another folder"):
        execute(request(model_folder, []))


def test_techniques_that_hang_leave_exit_or_detach_are_states_and_leave_nobody(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OPTKIT_RECORDS_DIR", str(tmp_path / "records"))
    deaf = "import signal\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    while True: signal.pause()"
    sources = {
        "hanger": TRANSFORM + deaf,
        "leaver": TRANSFORM + "import os\n    os._exit(0)",
        "exiter": TRANSFORM + "raise SystemExit(0)",
        "detacher": DETACH,
    }
    install(monkeypatch, tmp_path / "site", {name: plugin(name, source, stage="'quantize'") for name, source in sources.items()})
    said: list[str] = []
    plans = [[name] for name in sources]
    record = execute(request(model_folder, said, plugins=None, plans=plans, timeout=10.0))
    states = {arm["name"]: (arm["state"], arm["reason"]) for arm in record["arms"]}
    assert states["baseline"] == ("ok", "") and measured(record)
    assert states["hanger"] == ("timeout", "no answer to 'load' within 10 s")
    assert states["leaver"] == ("failed", "it ended with exit status 0 and without an answer")
    assert states["exiter"] == ("failed", "SystemExit: 0")
    state, reason = states["detacher"]
    assert state == "failed" and reason.startswith("ValueError: left process ")
    assert_gone(int(reason.split()[-1]))
    kept = json.loads((tmp_path / "records" / "records.jsonl").read_text()[65:])
    assert {arm["name"]: arm["state"] for arm in kept["arms"]} == {name: state for name, (state, _) in states.items()}


def test_this_process_has_no_children_left():
    """After the runs above: nothing that a trial or a server started is there any more."""
    import psutil

    assert [child for child in psutil.Process(os.getpid()).children(recursive=True) if "forkserver" in " ".join(child.cmdline())] == []
