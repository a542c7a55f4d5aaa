"""A server process that lives as long as an engine: started in a process group of its own, waited for, ended with all its children."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from optkit import OptkitError, UnavailableError
from optkit_plugins._openai import Client, one_line

#: Seconds between two looks at a server that is starting, and those that it gets to end by itself.
POLL_SECONDS, END_SECONDS = 0.2, 15.0
#: What a server is told: no statistics sent home (the names that vLLM reads), no network beyond what loading a model asks for.
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One server process, its output in ``log``.

    :raises UnavailableError: when the program cannot be started.
    """

    def __init__(self, command: list[str], url: str, log: Path):
        self.command, self.url, self.log = command, url, log
        self._ended = False
        try:
            with open(log, "wb") as output:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | QUIET,
                    start_new_session=True,
                )
        except OSError as error:
            raise UnavailableError(f"'{command[0]}' cannot be started: {error.strerror or error}") from error
        atexit.register(self.end)

    def wait(self, seconds: float) -> None:
        """Until ``/health`` answers.

        :raises OptkitError: when the process ends before that, or after ``seconds``; with the last lines of its output.
        """
        deadline = time.monotonic() + seconds
        client = Client(self.url, timeout=5.0)
        try:
            while not self._healthy(client):
                if self.process.poll() is not None:
                    raise OptkitError(f"{self._name} ended with status {self.process.returncode} while starting: {self.last_lines()}")
                if time.monotonic() > deadline:
                    raise OptkitError(f"{self._name} was not ready after {seconds:g} s; raise start_seconds: {self.last_lines()}")
                time.sleep(POLL_SECONDS)
        finally:
            client.close()

    def _healthy(self, client: Client) -> bool:
        try:
            return client.status("/health") == 200
        except OptkitError:
            return False

    @property
    def _name(self) -> str:
        return " ".join([Path(self.command[0]).name, *self.command[1:2]])

    def last_lines(self, characters: int = 600) -> str:
        """The end of its output, on one line."""
        with contextlib.suppress(OSError):
            text = self.log.read_text("utf-8", "replace")[-characters:].strip()
            return one_line(text, characters) or "it said nothing"
        return "its output is gone"

    def end(self) -> None:
        """End the whole group: politely, then by force. A second call does nothing."""
        if self._ended:
            return
        self._ended = True
        atexit.unregister(self.end)
        if self.process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        self._signal(signal.SIGKILL)  # also what the leader left behind
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
