"""A trial's own process: it builds the target and answers its calls, one at a time.

The *channel* is a socket with strict JSON in lines, for nothing else: what the target prints goes to the log file.

=================================================  ===================================================================
parent says                                        trial says
=================================================  ===================================================================
``{"target", "spec", "env", "sys_path",            nothing
"memory_limit_bytes"}``, once
``{"call": "load", "args": {...}}``                any number of ``{"progress": {...}}``, then ``{"ok": value}`` or
                                                   ``{"error": {"type", "message", "traceback", "oom"}}``
``{"end": true}``, or end of file                  end of file
=================================================  ===================================================================
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

MAX_LINE_BYTES = 256 * 2**20

_OUT_OF_MEMORY = (  # how libraries without a type of their own say it
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "alloc_failed",
)


class Channel:
    """The trial's end of its socket to the parent."""

    def __init__(self, connection: socket.socket) -> None:
        self.process = os.getpid()
        self._connection = connection
        self._lock = threading.Lock()
        self.requests = connection.makefile("rb")

    def send(self, line: bytes) -> None:
        with self._lock:
            self._connection.sendall(line)


_channel: Channel | None = None


def report_progress(**fields: Any) -> None:
    """Tell whoever runs this trial how far it is. Outside of a trial's process this does nothing."""
    if _channel and _channel.process == os.getpid():
        _channel.send(encode({"progress": fields}, "a progress report"))


def encode(message: dict[str, Any], what: str) -> bytes:
    """One line of strict JSON.

    :param what: names the message in errors.
    :raises ValueError: it is no strict JSON (NaN, an object without a JSON form), or longer than `MAX_LINE_BYTES`.
    """
    try:
        line = json.dumps(message, allow_nan=False).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        way_out = "use numbers, texts, lists, dicts, and None for NaN"
        raise ValueError(f"{what} has no strict JSON form: {error}; {way_out}") from error
    if len(line) > MAX_LINE_BYTES:
        size, limit = len(line) / 2**20, MAX_LINE_BYTES / 2**20
        raise ValueError(f"{what} takes {size:.0f} MiB, and {limit:.0f} MiB is the limit; write it to a file and pass its path")
    return line


def decode(line: bytes) -> dict[str, Any]:
    """The message in a line. :raises ValueError: it is no object of strict JSON."""
    message = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(message, dict):
        raise ValueError(f"a message is a JSON object, not {type(message).__name__}")
    return message


def serve_trial(connection: socket.socket) -> int:
    """Build the target and answer calls until the parent wants no more. Returns the exit status."""
    global _channel
    connection.set_inheritable(False)
    faulthandler.enable(file=2)  # the log of a segfault shows where it happened,
    faulthandler.register(signal.SIGTERM, file=2, chain=True)  # and that of a time-out where the trial was
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _channel = channel = Channel(connection)
    setup = decode(channel.requests.readline())
    handler, failure = None, None
    try:
        _prepare(setup)
        handler = _resolve(setup["target"])(setup["spec"])
    except (Exception, SystemExit) as error:
        failure = encode({"error": _describe(error)}, "an error")
    for line in channel.requests:
        request = decode(line)
        if "end" in request:
            break
        channel.send(failure or _answer(handler, request["call"], request["args"]))
    close = getattr(handler, "close", None)
    if callable(close):
        close()
    del handler, close
    gc.collect()  # what its parts do when they are no longer needed, such as removing temporary folders
    return 0


def cannot_use_fork() -> str | None:
    """Why this process, just forked, cannot be a trial; None if it can."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        return "something that the trial server imported has touched CUDA, which does not survive a fork"
    return None


def _prepare(setup: dict[str, Any]) -> None:
    """What a fresh Python would have: environment, module path and random numbers of its own. Then the memory limit."""
    from optkit.processes import limit_memory

    os.environ.update(setup["env"])
    sys.path[:] = setup["sys_path"]
    importlib.invalidate_caches()
    if "numpy.random" in sys.modules:  # os.fork() seeds Python's generator anew; torch's starts from a constant anyway
        sys.modules["numpy.random"].seed()
    if setup["memory_limit_bytes"] is not None:
        limit_memory(setup["memory_limit_bytes"])


def _resolve(target: str) -> Callable[[dict[str, Any]], Any]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _answer(handler: Any, call: str, arguments: dict[str, Any]) -> bytes:
    try:
        if call not in handler.calls:
            raise AttributeError(f"{type(handler).__name__} has no call '{call}'; it has {', '.join(handler.calls)}")
        return encode({"ok": getattr(handler, call)(**arguments)}, f"the answer of '{call}'")
    except (Exception, SystemExit) as error:
        answer = {"error": _describe(error)}
    gc.collect()  # the error's frames held what the call had allocated
    return encode(answer, "an error")


def _describe(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "oom": is_out_of_memory(error),
    }


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, is about memory: the host's or the GPU's."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"MemoryError", "OutOfMemoryError"} or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no strict JSON")
