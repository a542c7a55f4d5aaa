"""A trial's process: whatever happens in it, the sweep goes on, knows what happened, and finds nothing left of it.

>>> with TrialServer(log_folder=Path("logs")) as server:                      # doctest: +SKIP
...     trial = server.spawn("optkit.runner:main", spec, name="optimized")
...     trial.call("load", timeout=600)
...     seconds = trial.call("once", timeout=60)
...     used = trial.end()

The target is called with the spec in a process of its own, and its result has the methods that its attribute `calls`
names. The processes are forked by a server (`optkit.forkserver`) that has imported torch already. Each has a session of
its own, prints to a file, and answers over a socket of its own. Use a server from one thread.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from optkit import forkserver
from optkit.errors import OptkitError
from optkit.processes import LINUX, kill_marked, signal_name
from optkit.trial_child import decode, encode
from optkit.trial_outcome import STATES, ResourceUse, State, TrialFailed, new_log
from optkit.trial_process import GONE_SECONDS, TrialProcess

__all__ = ["DEFAULT_IMPORTS", "STATES", "ResourceUse", "State", "TrialFailed", "TrialProcess", "TrialServer"]

# `import transformers` alone imports next to nothing: the other two are what every model needs, and take seconds.
DEFAULT_IMPORTS = ("torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")

_MARK = "OPTKIT_TRIAL_SERVER"  # in the environment of the server and of all that descends from it
_ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not start CUDA: no fork after that
}


class TrialServer:
    """Starts trials, each in a process of its own that dies with this object, with its server, or with the caller.

    :param imports: modules that every trial needs and that only define things when imported. One that fails to import
        is in `import_errors`, and fails again, with its own error, in the trial that needs it.
    :param env: environment of the server, for what libraries read at import (``OMP_NUM_THREADS``).
    :param log_folder: where `trial-server.log` and each trial's log go; made for this user alone.
    :param fork: False: each trial is a fresh Python and imports everything itself, as it must where fork is not safe.
    :param start_timeout: seconds that the imports may take.
    """

    def __init__(
        self,
        imports: Sequence[str] = DEFAULT_IMPORTS,
        env: Mapping[str, str] | None = None,
        *,
        log_folder: Path,
        fork: bool = LINUX,
        start_timeout: float = 300.0,
    ) -> None:
        if not hasattr(os, "fork"):
            raise OptkitError("a trial's process cannot be made on this system; use Linux, macOS, or WSL on Windows")
        self.import_errors: dict[str, str] = {}  # known once a trial has answered
        self.selector = selectors.DefaultSelector()
        self._imports, self._env, self._fork, self._start_timeout = list(imports), dict(env or {}), fork, start_timeout
        self._log_folder = Path(log_folder)
        self._log_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._trials: dict[int, TrialProcess] = {}  # those not known to have ended
        self._count = 0
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    @property
    def pid(self) -> int | None:
        """The server's process; None when there is none."""
        return self._process.pid if self._process else None

    def spawn(
        self,
        target: str,
        spec: dict[str, Any],
        *,
        name: str,
        env: Mapping[str, str] | None = None,
        memory_limit_bytes: int | None = None,
    ) -> TrialProcess:
        """Start a trial, without waiting for it. A server that was lost is started anew.

        :param target: ``package.module:function``, called in the trial with `spec` (strict JSON). If this fails, so
            does the trial's first call.
        :param env: added to the environment before the target is imported.
        :param memory_limit_bytes: private writable memory of the process (RLIMIT_DATA), shared modules included.
        """
        setup = {
            "target": target,
            "spec": spec,
            "env": dict(env or {}),
            "sys_path": sys.path,
            "memory_limit_bytes": memory_limit_bytes,
        }
        try:
            first_line = encode(setup, f"the spec of trial '{name}'")
        except ValueError as error:
            raise OptkitError(str(error)) from error
        if self._closed:
            raise OptkitError(f"trial '{name}' cannot start: its server is closed; use a new TrialServer")
        if self._process is None:
            self._start()
        self._count += 1
        log_path, log = new_log(self._log_folder, name)
        ours, theirs = socket.socketpair()
        trial = self._trials[self._count] = TrialProcess(self, self._count, name, log_path, ours)
        self.selector.register(ours, selectors.EVENT_READ, trial.exchange)
        with theirs:
            self.tell({"spawn": trial.number}, [theirs.fileno(), log])
        os.close(log)
        trial.send(first_line)
        return trial

    def close(self) -> None:
        """Kill every trial that is still there, and end the server."""
        self._closed = True
        if self._process:
            self._lose("killed", "the trial server was closed", patience=GONE_SECONDS if self._ready else 0.0)

    def __enter__(self) -> TrialServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        self._mark, self._ready, self._buffer = uuid.uuid4().hex, False, b""
        self._ready_by = time.monotonic() + self._start_timeout
        config = {"control": theirs.fileno(), "parent": os.getpid(), "imports": self._imports, "fork": self._fork}
        with theirs, open(self._log_folder / "trial-server.log", "ab") as log:
            self._process = subprocess.Popen(
                forkserver.command(**config),
                env={**_ENVIRONMENT, **os.environ, **self._env, _MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.selector.register(self._control, selectors.EVENT_READ, self._read_control)

    # -- for the trials

    def step(self, until: float) -> None:
        """Wait until something happens, at most until `until` (monotonic seconds), and act on all that did."""
        due = min([until, *(trial.due for trial in self._trials.values())])
        if not self._ready:
            due = min(due, self._ready_by)
        for key, events in self.selector.select(max(0.0, min(due - time.monotonic(), 3600.0))):
            key.data(events)
        for trial in [trial for trial in self._trials.values() if trial.due <= time.monotonic()]:
            trial.expire()
        if self._process and not self._ready and self._ready_by <= time.monotonic():
            modules = ", ".join(self._imports)
            why = f"the trial server did not start within {self._start_timeout:g} s, importing {modules}"
            self._lose("unavailable", why)

    def tell(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send the server a message. They are few and small enough to queue while it imports."""
        with suppress(OSError):  # it is gone: the end of file is seen in the next step
            socket.send_fds(self._control, [encode(message, "a message to the trial server")], descriptors)

    def forget(self, trial: TrialProcess) -> None:
        """Nothing is left of this trial."""
        self._trials.pop(trial.number, None)

    # -- the server's end of the story

    def _read_control(self, _events: int) -> None:
        try:
            data = self._control.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if self._process:
                self._lose("killed" if self._ready else "unavailable")
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for message in map(decode, lines):
            if "ready" in message:
                self._ready, self.import_errors = True, message["ready"]["failed"]
            elif "started" in message:
                if trial := self._trials.get(message["started"]):
                    trial.started(message["pid"])
            elif trial := self._trials.get(message["exited"]):
                trial.exited(message)

    def _lose(self, state: State, why: str = "", *, patience: float = 0.2) -> None:
        """The server is gone, or goes now; with it go all trials. They fail for the reason `why`, or for its ending."""
        process, self._process = self._process, None
        assert process is not None
        self.selector.unregister(self._control)
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # closing is not enough where the caller has forked in between
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        if process.poll() is None:
            process.kill()
        status = process.wait()
        if status != 0:
            kill_marked(_MARK, self._mark)
        if not why:
            ending = signal_name(-status) if status < 0 else f"exit status {status}"
            doing = "" if self._ready else f" while it imported {', '.join(self._imports)}"
            why = f"the trial server (process {process.pid}) ended with {ending}{doing}"
        for trial in list(self._trials.values()):
            trial.lost(state, why)
