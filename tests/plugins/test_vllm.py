"""vllm: the handling of the process, with a stand-in program that serves the OpenAI protocol. Nothing here says how vLLM itself behaves."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optkit import ModelSource, OptkitError, UnavailableError, UsageError
from optkit_plugins import vllm as plugin
from tests.plugins.tiny import TinyTokenizer

STANDIN = """
    import json, os, signal, subprocess, sys
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    arguments = sys.argv[1:]
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "arguments.json"), "w") as file:
        json.dump(arguments, file)
    if "--fail" in arguments:
        sys.exit("CUDA out of memory \\x1b[31m")
    if "--stubborn" in arguments:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"])
    with open(os.path.join(here, "pids.json"), "w") as file:
        json.dump([os.getpid(), worker.pid], file)
    looks = 0

    class Handler(BaseHTTPRequestHandler):
        def answer(self, data, status=200):
            raw = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self):
            global looks
            if self.path == "/health":
                looks += 1
                self.answer({}, 200 if looks > 2 and "--never" not in arguments else 503)
            else:
                self.answer({"version": "9.9"})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = [body["prompt"][-1]] * body["max_tokens"]
            self.answer({"choices": [{"text": body["model"], "token_ids": ids}], "usage": {"completion_tokens": len(ids)}})

        def log_message(self, *_):
            pass

    port = int(arguments[arguments.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def standin(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "vllm"
    program.write_text(f"#!{sys.executable}\n{textwrap.dedent(STANDIN)}")
    program.chmod(0o755)
    return program


@pytest.fixture
def trial_on(make_trial: Any, standin: Path) -> Iterator[Any]:
    trials = []

    def make(arguments: str = "", settings: dict[str, Any] | None = None, source: ModelSource | None = None, **options: Any) -> Any:
        chosen = plugin.VllmOptions(executable=str(standin), arguments=arguments, **options)
        trials.append(make_trial("vllm", chosen, settings=settings, tokenizer=TinyTokenizer()))
        trials[-1].source = source or ModelSource("tiny", "folder", str(standin.parent))
        return trials[-1]

    yield make
    for trial in trials:
        if "engine" in trial.notes:
            trial.notes["engine"].close()


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether the process ended (a zombie has)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        os.sched_yield()
    return False


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@linux
def test_the_server_is_waited_for_asked_with_token_ids_and_ended_with_its_workers(trial_on: Any, standin: Path) -> None:
    trial = trial_on("--max-model-len 64 --served 'two words'", settings={"load.dtype": "float16"}, gpu_memory_utilization=0.4)
    assert plugin.load_model() is None
    engine = plugin.build_engine(trial)
    assert plugin.prove_effect(trial) == {"summary": "no vLLM server was asked", "answered": False}
    assert engine.generate([[5, 6], [7]], new_tokens=3, exact=True) == [[6, 6, 6], [7, 7, 7]]
    facts = plugin.prove_effect(trial)
    assert facts["vllm"] == "9.9" and facts["lengths"] == "exact" and "url" not in facts

    given = json.loads((standin.parent / "arguments.json").read_text())
    assert given[:4] == ["serve", str(standin.parent), "--host", "127.0.0.1"]
    assert given[given.index("--dtype") + 1] == "float16" and given[given.index("--gpu-memory-utilization") + 1] == "0.4"
    assert given[-4:] == ["--max-model-len", "64", "--served", "two words"] and "--trust-remote-code" not in given

    pids = json.loads((standin.parent / "pids.json").read_text())
    engine.close()
    engine.close()
    assert all(gone(pid) for pid in pids)


@linux
def test_a_server_that_ignores_the_polite_signal_is_killed(trial_on: Any, standin: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("optkit_plugins._server.END_SECONDS", 0.2)
    engine = plugin.build_engine(trial_on("--stubborn"))
    pids = json.loads((standin.parent / "pids.json").read_text())
    engine.close()
    assert all(gone(pid) for pid in pids)


def test_a_server_that_ends_while_starting_says_its_last_lines(trial_on: Any) -> None:
    with pytest.raises(OptkitError, match="vllm serve ended with status 1 while starting: CUDA out of memory") as raised:
        plugin.build_engine(trial_on("--fail"))
    assert str(raised.value).isprintable()


@linux
def test_a_server_that_never_gets_ready_is_ended_after_the_time_out(trial_on: Any, standin: Path, monkeypatch: Any) -> None:
    from optkit_plugins import _server

    pids, wait = standin.parent / "pids.json", _server.Server.wait

    def wait_once_it_runs(server: Any, seconds: float) -> None:
        while server.process.poll() is None and not (pids.exists() and pids.read_text().endswith("]")):
            os.sched_yield()
        wait(server, seconds)

    monkeypatch.setattr(_server.Server, "wait", wait_once_it_runs)
    with pytest.raises(OptkitError, match="was not ready after 0.3 s; raise start_seconds"):
        plugin.build_engine(trial_on("--never", start_seconds=0.3))
    assert all(gone(pid) for pid in json.loads(pids.read_text()))


def test_a_missing_program_is_told_with_the_command_that_helps(make_trial: Any) -> None:
    options = plugin.VllmOptions(executable="surely-no-vllm")
    problem = plugin.configure(options).problem
    assert problem and "surely-no-vllm" in problem and "pip install vllm" in problem and "vllm.executable=" in problem
    with pytest.raises(UnavailableError, match="pip install vllm"):
        plugin.command(ModelSource("tiny", "folder", "."), make_trial("vllm", options), 1)


def test_random_weights_are_vllms_own_and_a_shrunk_model_is_refused(trial_on: Any, tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text("{}")
    trial = trial_on()
    line = plugin.command(ModelSource("shape", "random", str(tmp_path / "shape.json")), trial, 1234)
    assert line[line.index("--load-format") + 1] == "dummy" and (Path(line[2]) / "config.json").read_text() == "{}"
    with pytest.raises(UsageError, match="--shrink"):
        plugin.command(ModelSource("shape", "folder", ".", shrink=True), trial, 1234)


def test_a_quote_that_is_not_closed_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="No closing quotation"):
        plugin.VllmOptions(arguments="--chat-template 'oops")
    assert plugin.technique.tested_on == ()
