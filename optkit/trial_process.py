"""One trial's process, seen from the caller: calls, time-outs, and the verdict when it ends. See `optkit.trial`."""

from __future__ import annotations

import math
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import OptkitError
from optkit.trial_child import MAX_LINE_BYTES, decode, encode
from optkit.trial_outcome import ResourceUse, State, TrialFailed, classify, one_line, tail_of

if TYPE_CHECKING:
    from optkit.trial import TrialServer

GRACE_SECONDS = 1.0  # from SIGTERM, on which the trial writes to its log where it was, to SIGKILL
GONE_SECONDS = 5.0  # a process that is still there after this long waits for a driver or a disk

OnProgress = Callable[[dict[str, Any]], None]


class TrialProcess:
    """Made by `TrialServer.spawn`.

    :ivar log_path: what the trial prints.
    :ivar pid: None until the server has started it.
    """

    def __init__(self, server: TrialServer, number: int, name: str, log_path: Path, channel: socket.socket) -> None:
        self.number, self.name, self.log_path = number, name, log_path
        self.pid: int | None = None
        self.due = math.inf  # monotonic seconds, for the server's loop: the call's time, or SIGKILL's, is up then
        self._server, self._channel = server, channel
        self._outgoing, self._incoming = bytearray(), bytearray()
        self._method: str | None = None  # the call that is under way
        self._on_progress: OnProgress | None = None
        self._timeout: float | None = None
        self._answer: dict[str, Any] | None = None
        self._verdict: tuple[State, str] | None = None  # why it was or is being ended
        self._asked = False  # to end by itself
        self._use: ResourceUse | None = None  # set once the process has ended
        channel.setblocking(False)

    @property
    def usable(self) -> bool:
        """Whether it takes further calls: after an exception it does, after anything worse it does not."""
        return self._verdict is None

    def call(self, method: str, /, *, timeout: float | None = None, on_progress: OnProgress | None = None, **args: Any) -> Any:
        """`start` and `wait`."""
        self.start(method, timeout=timeout, on_progress=on_progress, **args)
        return self.wait()

    def start(self, method: str, /, *, timeout: float | None = None, on_progress: OnProgress | None = None, **args: Any) -> None:
        """Ask the target for ``method(**args)`` and return, so that several trials can work at once; then `wait`.

        :param timeout: seconds, from now or from when the process is there; then it is killed. This is seen to while
            the caller waits for any trial of the same server.
        :param on_progress: gets the fields of each `report_progress`.
        """
        if self._method is not None:
            raise OptkitError(f"trial '{self.name}' is still busy with '{self._method}': wait() first")
        self._raise_if_ended()
        try:
            line = encode({"call": method, "args": args}, f"the call of '{method}'")
        except ValueError as error:
            raise OptkitError(str(error)) from error
        self._method, self._on_progress, self._timeout, self._answer = method, on_progress, timeout, None
        if self.pid is not None:
            self._start_clock()
        self.send(line)

    def wait(self) -> Any:
        """The value of the call that was started. If anything else ends the waiting, Ctrl-C say, the trial is killed.

        :raises TrialFailed: there is no value.
        """
        if self._method is None:
            raise OptkitError(f"trial '{self.name}' was asked for nothing: start() a call first")
        try:
            while self._answer is None and self._use is None:
                self._server.step(math.inf)
        except BaseException:
            self.kill()
            raise
        finally:
            self._method, self.due = None, math.inf
        if self._answer is None:
            self._raise_if_ended()
        answer, self._answer = self._answer or {}, None
        if "error" not in answer:
            return answer["ok"]
        error = answer["error"]
        reason = one_line(f"{error['type']}: {error['message']}" if error["message"] else error["type"])
        raise self._failure("oom" if error["oom"] else "failed", reason, error["traceback"])

    def end(self, timeout: float = 10.0) -> ResourceUse:
        """Let the target `close()` itself, if it can, and the process end; kill it after `timeout` seconds."""
        if self.ask_to_end():
            self._wait_for_exit(timeout)
        return self.kill()

    def ask_to_end(self) -> bool:
        """What `end` begins with, without waiting, so that several end at the same time. :return: whether it was or had been asked."""
        if self._verdict is None and self._method is None:
            self._verdict, self._asked = ("killed", "it was ended"), True
            self.send(encode({"end": True}, "a request"))
        return self._asked

    def kill(self) -> ResourceUse:
        """Kill the process and all that it started."""
        if self._use is None:
            self._condemn("killed", "it was killed by optkit", grace_seconds=0.0)
            self._wait_for_exit(GONE_SECONDS)
        return self._use or ResourceUse()

    def log_tail(self) -> str:
        """The last lines that the trial printed."""
        return tail_of(self.log_path)

    def _failure(self, state: State, reason: str, traceback: str = "") -> TrialFailed:
        return TrialFailed(state, reason, self.log_tail(), traceback, self.name)

    def _raise_if_ended(self) -> None:
        if self._verdict is not None:
            raise self._failure(*self._verdict)

    def _start_clock(self) -> None:
        if self._timeout is not None:
            self.due = time.monotonic() + self._timeout

    def _wait_for_exit(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._use is None and time.monotonic() < until:
            self._server.step(until)

    def _condemn(self, state: State, reason: str, *, grace_seconds: float) -> None:
        """Have the server kill the process and all that it started."""
        self._verdict, self._answer = self._verdict or (state, reason), None
        self.due = time.monotonic() + GONE_SECONDS
        self._server.tell({"kill": self.number, "grace_seconds": grace_seconds})

    # -- the channel

    def exchange(self, events: int) -> None:
        """For the server's loop: the channel is ready."""
        if events & selectors.EVENT_WRITE:
            self.send(b"")
        if events & selectors.EVENT_READ:
            self._receive()

    def send(self, line: bytes) -> None:
        """Send what the socket takes now and the rest when it takes more: a server that still imports blocks nobody."""
        self._outgoing += line
        try:
            while self._outgoing:
                del self._outgoing[: self._channel.send(self._outgoing)]
        except BlockingIOError:
            pass
        except OSError:  # its process has ended, and the server will say how
            self._outgoing.clear()
        if self._channel.fileno() >= 0:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
            self._server.selector.modify(self._channel, events, self.exchange)

    def _receive(self) -> bool:
        """Read what is there and act on it. False: nothing was there."""
        if self._channel.fileno() < 0:
            return False
        try:
            data = self._channel.recv(2**20)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._hang_up()
            self.due = min(self.due, time.monotonic() + GONE_SECONDS)  # it is ending; else it will be ended
            return False
        try:
            if self._verdict is None:
                self._take(data)
        except ValueError as error:
            self._condemn("failed", f"it sent what is no message: {error}", grace_seconds=0.0)
        return True

    def _take(self, data: bytes) -> None:
        start = len(self._incoming)
        self._incoming += data
        while (end := self._incoming.find(b"\n", start)) >= 0:
            message = decode(bytes(self._incoming[:end]))
            del self._incoming[: end + 1]
            start = 0
            if "progress" not in message:
                self._answer, self.due = message, math.inf
            elif self._on_progress:
                self._on_progress(message["progress"])
        if len(self._incoming) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES / 2**20:.0f} MiB")

    def _hang_up(self) -> None:
        if self._channel.fileno() >= 0:
            self._server.selector.unregister(self._channel)
            self._channel.close()

    # -- what the server's loop tells

    def started(self, pid: int) -> None:
        self.pid = pid
        if self._method is not None and self._verdict is None:
            self._start_clock()

    def expire(self) -> None:
        """`due` is past."""
        if self._verdict is not None:
            state, reason = self._verdict
            self._conclude(state, f"{reason}; process {self.pid} did not end, as if it waits for a driver", ResourceUse())
        elif self._channel.fileno() < 0:
            reason = "it closed the channel to optkit and went on without it"
            self._condemn("failed", reason, grace_seconds=GRACE_SECONDS)
        else:
            reason = f"no answer to '{self._method}' within {self._timeout:g} s"
            self._condemn("timeout", reason, grace_seconds=GRACE_SECONDS)

    def exited(self, message: dict[str, Any]) -> None:
        """The server's last word on this process. An answer may have come before it and not be read yet."""
        self._use = ResourceUse(message.get("max_rss_bytes"), message.get("cpu_seconds"), message.get("status"))
        while self._verdict is None and self._receive():
            pass
        if "error" in message:
            self._conclude("unavailable", message["error"], self._use)
        else:
            self._conclude(*(self._verdict or classify(message, self.log_tail())), self._use)

    def lost(self, state: State, why: str) -> None:
        """The server is gone, and the process with it."""
        self._conclude(*(self._verdict or (state, why)), ResourceUse())

    def _conclude(self, state: State, reason: str, use: ResourceUse) -> None:
        self._verdict, self._use, self.due = (state, reason), use, math.inf
        self._server.forget(self)
        self._hang_up()
