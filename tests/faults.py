"""Real faults for the tests of what lies on disk: kills, full disks, folders that cannot be written."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest


def fork(function: Callable[[], object]) -> int:
    """Run ``function`` in a forked child and return its process id. The child exits with 0 if nothing was raised, else with 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of numpy or torch: the child only reads and writes files
        child = os.fork()
    if child:
        return child
    try:
        function()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def exit_status(child: int) -> int:
    """How a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def has_ended(child: int) -> bool:
    """Whether a child is over. Its exit status can still be asked for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def waits_for_a_lock(handle: int) -> bool:
    """Whether some process waits for the lock (flock) on an open file."""
    inode = str(os.fstat(handle).st_ino)
    return any("->" in line and line.split()[6].endswith(f":{inode}") for line in Path("/proc/locks").read_text().splitlines())


def run_together(*functions: Callable[[], object]) -> list[int]:
    """Run each function in a child of its own, released at once; how each ended."""
    held, gate = os.pipe()

    def start(function: Callable[[], object]) -> None:
        os.close(gate)
        os.read(held, 1)  # returns when the parent closes the gate
        function()

    children = [fork(lambda function=function: start(function)) for function in functions]
    os.close(gate)
    os.close(held)
    return [exit_status(child) for child in children]


def killed_at_each_line(function: Callable[[], object], modules: list[Any]) -> Iterator[int]:
    """Run ``function`` in a child that kills itself (SIGKILL) before the n-th line of ``modules``, for n = 0, 1, … until it lives.

    Yields n after each death, and does not yield for the run that was not killed.
    """
    files = {module.__file__ for module in modules}
    lines = 0

    def doomed() -> None:
        left = lines

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return trace

        sys.settrace(trace)
        function()

    while (status := exit_status(fork(doomed))) == -signal.SIGKILL:
        yield lines
        lines += 1
    assert status == 0


@contextlib.contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond ``limit_bytes``: writing more is cut short, then refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def file_system(folder: Path, size: str) -> Iterator[Callable[[], None]]:
    """A file system of its own at ``folder``, of ``size`` (``200k``), in memory. Gives what makes it read-only. Skips without the right."""

    def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)

    folder.mkdir(exist_ok=True)
    try:
        done = mount("-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs")
    except OSError as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield lambda: mount("-o", "remount,ro").check_returncode()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """A new folder that any user can reach, in memory where there is such a file system."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written in ``folder``, not even by root, who works as somebody else meanwhile."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o555)
    for file in folder.iterdir():
        file.chmod(0o444)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)
