"""The trial server: a process that imports the slow libraries once, and then forks one process for each trial.

It only imports. A threaded matmul in it would leave thread pools behind that a forked child waits for without end. The
user's side is `optkit.trial`; this is what runs on the other side of its sockets:

- One *control* socket between the parent and the server: JSON lines, each ``spawn`` with two descriptors.

  ==================================================  ===========================================================
  parent says                                         server says
  ==================================================  ===========================================================
  ``{"spawn": id}`` + [channel, log file]             ``{"ready": {"failed": {module: why}}}`` once
  ``{"kill": id, "grace_seconds": s}``                ``{"started": id, "pid": n}``
  end of file: kill all trials and end                ``{"exited": id, "status", "max_rss_bytes", "cpu_seconds",
                                                      "oom_kills"}`` or ``{"exited": id, "error": why}``
  ==================================================  ===========================================================

- One *channel* for each trial, between the parent and the trial (`optkit.trial_child`).
"""

from __future__ import annotations

import gc
import json
import math
import os
import select
import selectors
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from optkit.processes import (
    LINUX,
    adopt_orphans,
    be_first_out_of_memory,
    die_with_parent,
    kernel_oom_kills,
    kill,
    outlive_parent,
    strays,
)
from optkit.server_imports import import_all
from optkit.trial_child import cannot_use_fork, report_progress, serve_trial

__all__ = ["Server", "command", "main", "report_progress"]

# The path comes first: what is imported after it is what the caller would import.
_PROGRAM = """\
import json, sys
config = json.loads(sys.argv[1])
sys.path[:] = config["sys_path"]
from optkit import forkserver
forkserver.main(config)
"""
_SIGNALS = (signal.SIGTERM, signal.SIGCHLD)
_STRAYS_SECONDS = 2.0  # what is still there so long after its SIGKILL waits for a driver or a disk, and is given up


def command(**config: Any) -> list[str]:
    """The command line of a fresh Python that finds the same modules as this one and calls `main`."""
    return [sys.executable, "-P", "-c", _PROGRAM, json.dumps({"sys_path": sys.path, **config})]


def main(config: dict[str, Any]) -> None:
    """Be the server or, where trials are not forked, a trial.

    :param config: ``control`` (descriptor), ``parent`` (pid), ``imports`` and ``fork``; or ``channel`` (descriptor).
    """
    if "channel" in config:
        sys.exit(serve_trial(socket.socket(fileno=config["channel"])))
    Server(socket.socket(fileno=config["control"]), config["parent"], fork=config["fork"]).serve(config["imports"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the caller waits: tearing down what was imported would take longer than all of the above


@dataclass
class Child:
    """A trial's process, as long as it lives or something that it started does."""

    trial: int
    pid: int
    oom_kills_before: int
    kill_at: float = math.inf  # monotonic seconds
    give_up_at: float = math.inf  # monotonic seconds
    exited: dict[str, Any] | None = None  # the message for the parent, once the process has ended


class Server:
    """Forks trials, ends them with all that they started, and tells the parent how they ended.

    Every trial adopts the orphans among its descendants, so what becomes a child of this process without having been
    forked by it was left by a trial that has ended, and is killed, whatever session or group it moved to.
    """

    def __init__(self, control: socket.socket, parent: int, *, fork: bool) -> None:
        self._control = control
        self._parent = parent
        self._fork = fork
        self._children: dict[int, Child] = {}  # by pid
        self._helpers: set[int] = set()  # processes that the imports started
        self._buffer = b""
        self._descriptors: list[int] = []
        self._selector = selectors.DefaultSelector()
        # Python 3.12 warns of every thread; those of numeric libraries (OpenBLAS) prepare themselves for a fork.
        warnings.filterwarnings("ignore", ".*is multi-threaded, use of fork", DeprecationWarning)

    def serve(self, imports: Sequence[str]) -> None:
        """Run until the parent closes its end or is gone. Returns with no trial alive."""
        adopt_orphans()
        self._control.set_inheritable(False)
        die_with_parent(self._parent)  # while it imports it looks at nothing, and imports take seconds
        failed = import_all(imports) if self._fork else {}
        outlive_parent()
        self._helpers = set(strays(keep=()))
        gc.collect()
        gc.freeze()  # the collector of a child then does not touch, and so copy, the pages of what was imported here
        self._watch()
        self._tell(ready={"failed": failed})
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            while self._step():
                pass
        finally:
            self._end_all()

    def _watch(self) -> None:
        """Wake for: a message, the parent's end, a child's end."""
        self._selector.register(self._control, selectors.EVENT_READ)
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(os, "pipe2") else os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._selector.register(wake_read, selectors.EVENT_READ)
        if hasattr(os, "pidfd_open"):  # end of file is not enough: a process that the parent forked can hold the socket
            with suppress(OSError):
                self._selector.register(os.pidfd_open(self._parent), selectors.EVENT_READ)

    def _step(self) -> bool:
        """Wait for something, act on it. False: the parent is gone, or wants no more."""
        due = min((min(child.kill_at, child.give_up_at) for child in self._children.values()), default=math.inf)
        if any(child.exited for child in self._children.values()):
            due = min(due, time.monotonic() + 0.01)  # strays are about to end
        timeout = None if due == math.inf else max(0.0, due - time.monotonic())
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._control:
                if not self._read_control():
                    return False
            else:
                with suppress(OSError):
                    os.read(key.fd, 4096)
        self._reap()
        self._kill_overdue()
        self._report_ended()
        return os.getppid() == self._parent

    def _read_control(self) -> bool:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, 65536, 16)
        except OSError:
            return False
        self._descriptors += descriptors
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "spawn" in message:
                channel, log, *self._descriptors = self._descriptors
                self._spawn(message["spawn"], channel, log)
            else:
                self._kill(message["kill"], message["grace_seconds"])
        return bool(data)

    def _spawn(self, trial: int, channel: int, log: int) -> None:
        server, oom_kills = os.getpid(), kernel_oom_kills()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the child must not run this process's handlers
        try:
            pid = os.fork()
            if pid == 0:
                self._become_trial(server, channel, log)
        except OSError as error:
            self._tell(exited=trial, error=f"the process could not be started: {error}")
        else:
            self._children[pid] = Child(trial, pid, oom_kills)
            self._tell(started=trial, pid=pid)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.close(channel)
            os.close(log)

    def _become_trial(self, server: int, channel: int, log: int) -> None:
        """In the child: cut every tie with the server but the kernel's, and serve the trial. Never returns."""
        status = 70
        try:
            os.setsid()
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            die_with_parent(server)
            adopt_orphans()
            be_first_out_of_memory()
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            for key in list(self._selector.get_map().values()):
                os.close(key.fd)
            self._selector.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            reason = cannot_use_fork() if self._fork else "this system's libraries do not bear a fork"
            if reason:
                print(f"optkit: {reason}, so this trial is a fresh Python and imports everything itself", flush=True)
                os.set_inheritable(channel, True)
                arguments = command(channel=channel)
                os.execv(arguments[0], arguments)
            status = serve_trial(socket.socket(fileno=channel))
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _kill(self, trial: int, grace_seconds: float) -> None:
        for child in self._children.values():
            if child.trial == trial and not child.exited:
                if grace_seconds:
                    kill(child.pid, signal.SIGTERM, group=True)
                child.kill_at = min(child.kill_at, time.monotonic() + grace_seconds)

    def _kill_overdue(self) -> None:
        for child in self._children.values():
            if child.kill_at <= time.monotonic() and not child.exited:
                kill(child.pid, signal.SIGKILL)  # in case that it has not yet become a group's leader
                kill(child.pid, signal.SIGKILL, group=True)
                child.kill_at = math.inf

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self._children.get(pid)
            if child is None:
                continue
            child.exited = {
                "exited": child.trial,
                "status": os.waitstatus_to_exitcode(status),
                "max_rss_bytes": usage.ru_maxrss * (1024 if LINUX else 1),  # macOS counts bytes
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "oom_kills": kernel_oom_kills() - child.oom_kills_before,
            }
            child.kill_at, child.give_up_at = math.inf, time.monotonic() + _STRAYS_SECONDS
            if not LINUX:  # orphans do not come here: their group is all that is known of them
                kill(pid, signal.SIGKILL, group=True)

    def _report_ended(self) -> None:
        """Kill what ended trials left behind; tell the parent of a trial once nothing of it is left."""
        ended = [child for child in self._children.values() if child.exited]
        if not ended:
            return
        living = [child.pid for child in self._children.values() if not child.exited]
        left = strays(keep=[*living, *self._helpers])
        for pid in left:
            kill(pid, signal.SIGKILL)
        for child in ended:
            if not left or child.give_up_at <= time.monotonic():
                del self._children[child.pid]
                self._tell(**child.exited or {}, left=left)

    def _end_all(self) -> None:
        until = time.monotonic() + _STRAYS_SECONDS
        while time.monotonic() < until and (left := strays(keep=())):
            for pid in left:
                kill(pid, signal.SIGKILL)
            select.select([], [], [], 0.01)
            self._reap()

    def _tell(self, **message: Any) -> None:
        with suppress(OSError):  # the parent is gone: the next step sees it
            self._control.sendall(json.dumps(message).encode() + b"\n")
