"""A trial's process: whatever happens in it, the sweep goes on, knows what happened, and finds nothing left of it.

>>> with TrialServer(log_folder=Path("logs")) as server:                      # doctest: +SKIP
...     trial = server.spawn("optkit.worker:Worker", {"model": "bundled"}, name="nf4")
...     trial.call("load", timeout=600)
...     seconds = trial.call("once", timeout=60)
...     used = trial.end()

The target is called with the spec, in a process of its own; its result has the methods that its attribute `calls` names.
Processes are forked by a server (`optkit.forkserver`) that has imported torch already. Use a server from one thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from optkit import forkserver
from optkit.errors import OptkitError
from optkit.processes import LINUX, kill_marked, signal_name
from optkit.trial_child import MAX_LINE_BYTES, decode, encode

State = Literal["ok", "failed", "oom", "crashed", "timeout", "killed", "unavailable", "skipped"]
STATES: tuple[State, ...] = get_args(State)

_MARK = "OPTKIT_TRIAL_SERVER"  # in the environment of the server and of all that descends from it
_GRACE_SECONDS = 1.0  # from SIGTERM, on which the trial writes to its log where it was, to SIGKILL
_GONE_SECONDS = 5.0  # a process that is still there after this long waits for a driver or a disk
_LOG_TAIL_BYTES, _LOG_TAIL_LINES = 8192, 20


class TrialFailed(OptkitError):
    """What was asked of a trial has no result.

    :ivar state: what happened, never ``ok``.
    :ivar reason: one line, for the table: ``ValueError: message``, ``SIGSEGV``, ``no answer to 'once' within 30 s``.
    :ivar log_tail: the last lines that the trial printed.
    :ivar traceback: the trial's own, where it ended in an exception.
    """

    def __init__(self, state: State, reason: str, log_tail: str = "", traceback: str = "", name: str = "") -> None:
        self.state, self.reason, self.log_tail, self.traceback, self.name = state, reason, log_tail, traceback, name
        super().__init__(f"trial '{name}': {state}: {reason}" if name else f"{state}: {reason}")


@dataclass(frozen=True)
class ResourceUse:
    """What the kernel counted for a trial's process and the children it waited for. None: the server was lost with the count.

    :ivar max_rss_bytes: the largest resident set of one process, modules shared with the server included.
    :ivar exit_status: the number of the signal, negative, if one ended it.
    """

    max_rss_bytes: int | None
    cpu_seconds: float | None
    exit_status: int | None


class TrialServer:
    """Starts trials, each in a process of its own that dies with this object, with its server, or with the caller.

    :param imports: modules that every trial needs and that only define things when imported. One that fails to import
        fails again, with its own error, in the trial that needs it.
    :param env: environment of the server, for what libraries read at import (``OMP_NUM_THREADS``).
        ``OMP_WAIT_POLICY`` is ``passive`` unless set: threads of a trial that waits for its turn must not spin.
    :param log_folder: where `trial-server.log` and each trial's log go; made for this user alone.
    :param fork: False: each trial is a fresh Python and imports everything itself. The default where fork is not safe.
    """

    def __init__(
        self,
        imports: Sequence[str] = ("torch", "transformers"),
        env: Mapping[str, str] | None = None,
        *,
        log_folder: Path,
        fork: bool = LINUX,
        start_timeout: float = 300.0,
    ) -> None:
        if not hasattr(os, "fork"):
            raise OptkitError("trials run in processes that this system cannot make; use Linux, macOS, or WSL on Windows")
        self.import_errors: dict[str, str] = {}
        self._imports, self._env, self._fork, self._start_timeout = list(imports), dict(env or {}), fork, start_timeout
        self._log_folder = Path(log_folder)
        self._log_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._selector = selectors.DefaultSelector()
        self._trials: dict[int, TrialProcess] = {}  # those not known to have ended
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    @property
    def pid(self) -> int | None:
        """The server's process; None once closed."""
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

        :param target: ``package.module:function``, called in the trial with `spec` (any strict JSON).
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
        if self._process is None:
            self._start()
        self._count += 1
        ours, theirs = socket.socketpair()
        log_path, log = _new_log(self._log_folder, name)
        trial = TrialProcess(self, self._count, name, log_path, ours)
        self._trials[trial.id] = trial
        with theirs:
            self._tell({"spawn": trial.id}, [theirs.fileno(), log])
        os.close(log)
        self._selector.register(ours, selectors.EVENT_READ, trial._exchange)
        trial._send(first_line)
        return trial

    def close(self) -> None:
        """Kill every trial that is still there, and end the server."""
        for trial in self._trials.values():
            trial._verdict = trial._verdict or ("killed", "the trial server was closed")
        if self._process:
            self._lose("the trial server was closed", patience=_GONE_SECONDS if self._ready else 0.0)

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
                env={"OMP_WAIT_POLICY": "passive", **os.environ, **self._env, _MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._selector.register(self._control, selectors.EVENT_READ, self._read_control)

    def _step(self, until: float) -> None:
        """Wait until something happens, at most until `until` (monotonic seconds), and act on all that did."""
        due = [until, *(trial._due for trial in self._trials.values())]
        if not self._ready:
            due.append(self._ready_by)
        for key, events in self._selector.select(max(0.0, min(min(due) - time.monotonic(), 3600.0))):
            key.data(events)
        for trial in [trial for trial in self._trials.values() if trial._due <= time.monotonic()]:
            trial._expire()
        if self._process and not self._ready and self._ready_by <= time.monotonic():
            modules = ", ".join(self._imports) or "nothing"
            self._lose(f"the trial server did not start within {self._start_timeout:g} s, importing {modules}", state="unavailable")

    def _tell(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Messages are small and the server reads at once, or has not yet filled its queue while it imports."""
        with contextlib.suppress(OSError):  # it is gone: the end of file is seen in the next step
            socket.send_fds(self._control, [encode(message, "a message to the trial server")], descriptors)

    def _read_control(self, _events: int) -> None:
        try:
            data = self._control.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._lose()
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for message in map(decode, lines):
            if "ready" in message:
                self._ready, self.import_errors = True, message["ready"]["failed"]
            elif "started" in message:
                if trial := self._trials.get(message["started"]):
                    trial._started(message["pid"])
            elif trial := self._trials.get(message["exited"]):
                trial._exited(message)

    def _lose(self, why: str = "", *, state: State | None = None, patience: float = 0.2) -> None:
        """The server is gone, or goes now; with it go all trials."""
        process, self._process = self._process, None
        assert process is not None
        self._selector.unregister(self._control)
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.returncode != 0:
            kill_marked(_MARK, self._mark)
        doing = "" if self._ready else f" while it imported {', '.join(self._imports)}"
        for trial in list(self._trials.values()):
            trial._lost(state, why or f"the trial server (process {process.pid}) ended with {_ending(process.returncode)}{doing}")


class TrialProcess:
    """One trial's process, made by `TrialServer.spawn`.

    :ivar log_path: what the trial prints.
    :ivar pid: None until the server has started it.
    """

    def __init__(self, server: TrialServer, number: int, name: str, log_path: Path, channel: socket.socket) -> None:
        self.id, self.name, self.log_path, self.pid = number, name, log_path, None
        self.pid: int | None
        channel.setblocking(False)
        self._server, self._channel = server, channel
        self._outgoing, self._incoming = bytearray(), bytearray()
        self._method: str | None = None  # the call that is under way
        self._on_progress: Callable[[dict[str, Any]], None] | None = None
        self._outcome: dict[str, Any] | None = None  # its answer
        self._timeout: float | None = None
        self._due = float("inf")  # monotonic seconds: the call's time is up, or SIGKILL has had its time
        self._verdict: tuple[State, str] | None = None  # why it was or is being ended
        self._use: ResourceUse | None = None  # set once the process has ended

    @property
    def usable(self) -> bool:
        """Whether it takes further calls: after an exception it does, after anything worse it does not."""
        return self._verdict is None and self._use is None

    def call(
        self, method: str, /, *, timeout: float | None = None, on_progress: Callable[[dict[str, Any]], None] | None = None, **args: Any
    ) -> Any:
        """`start` and `wait`."""
        self.start(method, timeout=timeout, on_progress=on_progress, **args)
        return self.wait()

    def start(
        self, method: str, /, *, timeout: float | None = None, on_progress: Callable[[dict[str, Any]], None] | None = None, **args: Any
    ) -> None:
        """Ask the target for ``method(**args)`` and return, so that several trials can work at once; then `wait`.

        :param timeout: seconds, from now or from when the process is there; then it is killed. It is enforced while this
            thread waits for any trial of the server.
        :param on_progress: gets the fields of each `report_progress`.
        """
        if self._method is not None:
            raise OptkitError(f"trial '{self.name}' is still busy with '{self._method}': wait() first")
        self._raise_if_ended()
        try:
            line = encode({"call": method, "args": args}, f"the arguments of '{method}'")
        except ValueError as error:
            raise OptkitError(str(error)) from error
        self._method, self._on_progress, self._outcome, self._timeout = method, on_progress, None, timeout
        if self.pid is not None:
            self._start_clock()
        self._send(line)

    def wait(self) -> Any:
        """The value of the call that was started. Anything else that ends the waiting, Ctrl-C too, kills the trial.

        :raises TrialFailed: there is no value.
        """
        if self._method is None:
            raise OptkitError(f"trial '{self.name}' was asked for nothing: start() a call first")
        try:
            while self._outcome is None and self._use is None:
                self._server._step(float("inf"))
        except BaseException:
            self.kill()
            raise
        finally:
            self._method, self._due = None, float("inf")
        if self._outcome is None:
            self._raise_if_ended()
        outcome, self._outcome = self._outcome or {}, None
        if "error" not in outcome:
            return outcome["ok"]
        error = outcome["error"]
        reason = f"{error['type']}: {error['message']}" if error["message"] else error["type"]
        raise self._failure("oom" if error["oom"] else "failed", reason, error["traceback"])

    def end(self, timeout: float = 10.0) -> ResourceUse:
        """Let the process end by itself (the target's `close()`, if it has one, is called); kill it after `timeout` seconds."""
        if self.usable and self._method is None:
            self._verdict = ("killed", "it was ended")
            self._send(encode({"end": True}, "a request"))
            self._wait_for_exit(timeout)
        return self.kill()

    def kill(self) -> ResourceUse:
        """Kill the process and all that it started."""
        if self._use is None:
            self._condemn("killed", "killed by optkit", grace_seconds=0.0)
            self._wait_for_exit(_GONE_SECONDS)
        return self._use or ResourceUse(None, None, None)

    # -- what follows is called by the server's loop

    def _exchange(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send(b"")
        if events & selectors.EVENT_READ:
            self._receive()

    def _send(self, line: bytes) -> None:
        """Send what the socket takes now, and the rest when it can take more: a server that still imports blocks nobody."""
        self._outgoing += line
        try:
            while self._outgoing:
                del self._outgoing[: self._channel.send(self._outgoing)]
        except BlockingIOError:
            pass
        except OSError:  # its process has ended, and the server will say how
            self._outgoing.clear()
        with contextlib.suppress(KeyError, ValueError):
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
            self._server._selector.modify(self._channel, events, self._exchange)

    def _receive(self) -> bool:
        """Read what is there and act on it. False: nothing was there."""
        try:
            data = self._channel.recv(2**20)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._server._selector.unregister(self._channel)
            self._channel.close()
            if self._use is None:  # a process that is ending keeps its own status; one that only hung up is ended
                self._server._tell({"kill": self.id, "grace_seconds": _GRACE_SECONDS})
            return False
        try:
            self._take(data)
        except ValueError as error:
            self._condemn("failed", f"it sent what is no message: {error}", grace_seconds=0.0)
        return True

    def _take(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        for line in lines:
            message = decode(bytes(self._incoming) + line)
            self._incoming.clear()
            if "progress" not in message:
                self._outcome, self._due = message, float("inf")
            elif self._on_progress:
                self._on_progress(message["progress"])
        self._incoming += rest
        if len(self._incoming) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES / 2**20:.0f} MiB")

    def _started(self, pid: int) -> None:
        self.pid = pid
        if self._method is not None and self._verdict is None:
            self._start_clock()

    def _start_clock(self) -> None:
        if self._timeout is not None:
            self._due = time.monotonic() + self._timeout

    def _expire(self) -> None:
        if self._verdict is None:
            self._condemn("timeout", f"no answer to '{self._method}' within {self._timeout:g} s", grace_seconds=_GRACE_SECONDS)
        else:
            state, reason = self._verdict
            self._conclude(state, f"{reason}; process {self.pid} does not end, it waits for a driver or a disk", ResourceUse(None, None, None))

    def _condemn(self, state: State, reason: str, *, grace_seconds: float) -> None:
        """Have the server kill the process and all that it started."""
        self._verdict = self._verdict or (state, reason)
        self._outcome = None
        self._due = time.monotonic() + _GONE_SECONDS
        self._server._tell({"kill": self.id, "grace_seconds": grace_seconds})

    def _wait_for_exit(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._use is None and time.monotonic() < until:
            self._server._step(until)

    def _exited(self, message: dict[str, Any]) -> None:
        """The server's last word on this process. Its answer may have come before that and not be read yet."""
        self._use = ResourceUse(message.get("max_rss_bytes"), message.get("cpu_seconds"), message.get("status"))
        if self._verdict is None:
            while self._channel.fileno() >= 0 and self._receive():
                pass
        if "error" in message:
            self._conclude("unavailable", message["error"], self._use)
        else:
            state, reason = self._verdict or self._classify(message)
            self._conclude(state, reason, self._use)

    def _lost(self, state: State | None, why: str) -> None:
        self._conclude(*(self._verdict or (state or "killed", why)), ResourceUse(None, None, None))

    def _conclude(self, state: State, reason: str, use: ResourceUse) -> None:
        self._verdict, self._use, self._due = (state, reason), use, float("inf")
        self._server._trials.pop(self.id, None)
        if self._channel.fileno() >= 0:
            self._server._selector.unregister(self._channel)
            self._channel.close()

    def _classify(self, message: dict[str, Any]) -> tuple[State, str]:
        """What an ending that nobody here asked for means."""
        status, memory = message["status"], f"{message['max_rss_bytes'] / 2**30:.1f} GiB resident at most"
        if status >= 0:
            reason = f"it ended with exit status {status} and without an answer"
            return ("failed" if status == 0 else "crashed"), reason
        number = -status
        if number == signal.SIGKILL and message["oom_kills"] > 0:
            return "oom", f"killed by the kernel, which had run out of memory ({memory})"
        if number == signal.SIGABRT and "std::bad_alloc" in self.log_tail():
            return "oom", f"SIGABRT: std::bad_alloc ({memory})"
        if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            return "killed", f"{signal_name(number)}, which optkit did not send ({memory})"
        return "crashed", signal_name(number)

    # -- failures

    def log_tail(self) -> str:
        """The last lines that the trial printed."""
        with contextlib.suppress(OSError), open(self.log_path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:])
        return ""

    def _failure(self, state: State, reason: str, traceback: str = "") -> TrialFailed:
        return TrialFailed(state, reason, self.log_tail(), traceback, self.name)

    def _raise_if_ended(self) -> None:
        if self._verdict is not None:
            raise self._failure(*self._verdict)


def _ending(status: int) -> str:
    return signal_name(-status) if status < 0 else f"exit status {status}"


def _new_log(folder: Path, name: str) -> tuple[Path, int]:
    """A new file, for this user alone, named after the trial as far as its name can be a file's. (path, descriptor)"""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:80] or "trial"
    number = 1
    while True:
        path = folder / (f"{stem}.log" if number == 1 else f"{stem}-{number}.log")
        try:
            return path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            number += 1
