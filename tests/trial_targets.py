"""Targets that `test_trial.py` runs in processes of their own: some work, most go wrong in a certain way."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import tempfile
from typing import Any

from optkit import trial_child
from optkit.forkserver import report_progress


class Target:
    calls = (
        "echo", "add", "raise_error", "exit_by", "leave", "segfault", "abort", "allocate", "hang", "hang_deaf",
        "detach", "flood", "count", "facts", "matmul", "not_a_number", "hang_up", "pid", "answer_and_leave",
    )  # fmt: skip

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec

    def echo(self, value: Any) -> Any:
        return value

    def add(self, number: int) -> int:
        return self.spec["start"] + number

    def pid(self) -> int:
        return os.getpid()

    def raise_error(self, message: str = "a bad value") -> None:
        print("about to raise")
        raise ValueError(message)

    def exit_by(self, status: int) -> None:
        sys.exit(status)

    def leave(self, status: int) -> None:
        os._exit(status)

    def answer_and_leave(self) -> None:
        assert trial_child._channel
        trial_child._channel.send(trial_child.encode({"ok": "last words"}, "an answer"))
        os._exit(0)

    def segfault(self) -> None:
        ctypes.string_at(0)

    def abort(self) -> None:
        os.abort()

    def allocate(self, size: int) -> int:
        return len(bytearray(size))

    def hang(self) -> None:
        print("about to hang")
        report_progress(pid=os.getpid())
        while True:
            signal.pause()

    def hang_deaf(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.hang()

    def detach(self, then: str) -> Any:
        """A grandchild in a session of its own, whose parent has ended, and which no signal but SIGKILL ends."""
        read, write = os.pipe()
        middle = os.fork()
        if middle == 0:
            os.setsid()
            if os.fork() == 0:
                os.setsid()
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                    signal.signal(number, signal.SIG_IGN)
                os.write(write, str(os.getpid()).encode())
                while True:
                    signal.pause()
            os._exit(0)
        os.waitpid(middle, 0)
        grandchild = int(os.read(read, 20))
        report_progress(grandchild=grandchild)
        return getattr(self, then)() if then else grandchild

    def flood(self, size: int) -> int:
        for _ in range(size // 2**20):
            sys.stdout.write("x" * (2**20 - 1) + "\n")
        return size

    def count(self, to: int) -> str:
        for number in range(to):
            report_progress(done=number + 1, of=to)
        return "counted"

    def facts(self) -> dict[str, Any]:
        return {
            "session": os.getsid(0) == os.getpid(),
            "variable_at_import": VARIABLE,
            "random": random.random(),
            "threads": len(os.listdir("/proc/self/task")),
            "torch": "torch" in sys.modules,
        }

    def matmul(self, size: int, threads: int) -> float:
        import torch

        torch.set_num_threads(threads)
        square = torch.ones(size, size)
        return float((square @ square).sum())

    def not_a_number(self) -> float:
        return float("nan")

    def hang_up(self) -> None:
        os.closerange(3, 256)
        while True:
            signal.pause()


class NumPyTarget:
    calls = ("draw",)

    def __init__(self, spec: dict[str, Any]) -> None:
        pass

    def draw(self) -> float:
        import numpy

        return float(numpy.random.random())


class WithClose(Target):
    calls = (*Target.calls, "folder_name")

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.folder = tempfile.TemporaryDirectory()

    def folder_name(self) -> str:
        return self.folder.name

    def close(self) -> None:
        print("closed by itself")


def broken(spec: dict[str, Any]) -> None:
    raise KeyError("no model")


VARIABLE = os.environ.get("OPTKIT_TEST_VARIABLE")


def short_lines(spec: dict[str, Any]) -> Target:
    trial_child.MAX_LINE_BYTES = 10_000
    return Target(spec)
