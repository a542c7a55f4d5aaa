"""A trial's process: every fault here is a real one, in a real process."""

from __future__ import annotations

import json
import math
import os
import re
import select
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optkit import trial_process
from optkit.errors import OptkitError
from optkit.trial import STATES, TrialFailed, TrialProcess, TrialServer
from optkit.trial_child import is_out_of_memory, report_progress

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these faults and their traces are Linux's")

HERE = Path(__file__).parent
TARGET = "trial_targets:Target"


@pytest.fixture(scope="module", autouse=True)
def _targets_importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)  # trials search modules where the caller does
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialServer]:
    with TrialServer(imports=(), log_folder=tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture
def trial(server: TrialServer, request: pytest.FixtureRequest) -> Iterator[TrialProcess]:
    trial = server.spawn(TARGET, {"start": 40}, name=request.node.name)
    yield trial
    trial.kill()


def assert_gone(*pids: int) -> None:
    """Each process ends within five seconds, or has ended."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([descriptor], [], [], 5.0)[0], f"process {pid} is still there"
        finally:
            os.close(descriptor)


def failure_of(trial: TrialProcess, method: str, **arguments: Any) -> TrialFailed:
    with pytest.raises(TrialFailed) as caught:
        trial.call(method, **arguments)
    assert caught.value.state in STATES and caught.value.state != "ok"
    return caught.value


# -- calls that work


def test_calls_reach_the_target_and_their_values_come_back(trial: TrialProcess) -> None:
    assert trial.call("add", number=2) == 42
    for value in (None, True, [1.5, {"ä": "☃"}], "x" * 3_000_000):
        assert trial.call("echo", value=value) == value


def test_a_spec_larger_than_any_socket_buffer_blocks_nobody(server: TrialServer) -> None:
    trial = server.spawn(TARGET, {"start": 1, "ballast": "x" * 20_000_000}, name="large")
    assert trial.call("add", number=1) == 2
    trial.end()


def test_progress_reaches_the_caller_in_order_and_outside_of_a_trial_nobody(trial: TrialProcess) -> None:
    seen: list[dict[str, Any]] = []
    assert trial.call("count", to=3, on_progress=seen.append) == "counted"
    assert seen == [{"done": number, "of": 3} for number in (1, 2, 3)]
    report_progress(done=1)  # in this process: nothing happens


def test_three_trials_work_at_once_and_the_death_of_one_is_its_own(server: TrialServer) -> None:
    trials = [server.spawn(TARGET, {"start": number}, name=f"three-{number}") for number in range(3)]
    pids = [trial.call("pid") for trial in trials]
    assert len(set(pids)) == 3
    for trial, method in zip(trials, ("count", "segfault", "count"), strict=True):
        trial.start(method, **({"to": 1000} if method == "count" else {}))
    assert trials[2].wait() == "counted"
    with pytest.raises(TrialFailed, match="SIGSEGV"):
        trials[1].wait()
    assert trials[0].wait() == "counted"
    for trial in trials:
        trial.end()
    assert_gone(*pids)


def test_a_trial_is_as_fresh_as_a_new_python(server: TrialServer) -> None:
    trials = [server.spawn(TARGET, {}, name="fresh", env={"OPTKIT_TEST_VARIABLE": value}) for value in "ab"]
    first, second = (trial.call("facts") for trial in trials)
    assert (first["variable_at_import"], second["variable_at_import"]) == ("a", "b")
    assert first["random"] != second["random"]
    assert first["session"] and first["threads"] == 1 and not first["torch"]
    assert "OPTKIT_TEST_VARIABLE" not in os.environ
    assert {trial.end().exit_status for trial in trials} == {0}


def test_end_lets_the_target_close_itself_and_tells_what_was_used(server: TrialServer) -> None:
    trial = server.spawn("trial_targets:WithClose", {}, name="close")
    trial.call("allocate", size=200 * 2**20)
    folder = Path(trial.call("folder_name"))
    assert folder.is_dir()
    use = trial.end()
    assert trial.log_tail() == "closed by itself"
    assert not folder.exists()
    assert use.exit_status == 0 and use.cpu_seconds is not None and use.cpu_seconds > 0
    assert use.max_rss_bytes is not None and 200 * 2**20 < use.max_rss_bytes < 400 * 2**20
    assert trial.end() == use
    assert failure_of(trial, "echo", value=1).state == "killed"


def test_several_that_were_asked_to_end_are_then_waited_for_and_a_busy_one_is_killed(server: TrialServer) -> None:
    one, other = (server.spawn("trial_targets:WithClose", {}, name=name) for name in ("one", "other"))
    for trial in (one, other):
        trial.call("folder_name")
        assert trial.ask_to_end()
    busy = server.spawn(TARGET, {}, name="busy")
    busy.call("echo", value=1)
    busy.start("hang")
    assert not busy.ask_to_end()
    assert one.end().exit_status == other.end().exit_status == 0
    assert one.log_tail() == other.log_tail() == "closed by itself"
    assert busy.end().exit_status != 0


# -- exceptions: the process stays usable


def test_an_exception_fails_the_call_with_its_reason_traceback_and_log(trial: TrialProcess) -> None:
    failure = failure_of(trial, "raise_error")
    assert (failure.state, failure.reason) == ("failed", "ValueError: a bad value")
    assert "raise ValueError(message)" in failure.traceback
    assert failure.log_tail == "about to raise"
    assert trial.usable and trial.call("add", number=1) == 41


def test_the_reason_of_a_long_message_is_one_line_and_its_traceback_has_all(trial: TrialProcess) -> None:
    failure = failure_of(trial, "raise_error", message="first\n  second " + "and on " * 100 + "to the end")
    assert failure.reason.startswith("ValueError: first second and on") and len(failure.reason) == 300
    assert "to the end" in failure.traceback


def test_sys_exit_in_a_call_is_an_exception_like_any_other(trial: TrialProcess) -> None:
    failure = failure_of(trial, "exit_by", status=0)
    assert (failure.state, failure.reason) == ("failed", "SystemExit: 0")
    assert trial.call("add", number=1) == 41


def test_host_memory_beyond_the_limit_is_oom_and_smaller_requests_still_work(server: TrialServer) -> None:
    trial = server.spawn(TARGET, {}, name="memory", memory_limit_bytes=512 * 2**20)
    assert failure_of(trial, "allocate", size=2**30).state == "oom"
    assert trial.call("allocate", size=2**20) == 2**20
    trial.end()


def test_memory_errors_are_known_by_type_text_and_cause() -> None:
    class OutOfMemoryError(RuntimeError):  # torch's, by name
        pass

    wrapped = ValueError("loading failed")
    wrapped.__cause__ = MemoryError()
    for error in (
        MemoryError(),
        OutOfMemoryError("x"),
        wrapped,
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA error: out of memory"),
    ):
        assert is_out_of_memory(error)
    for error in (ValueError("out of memory"), RuntimeError("shape mismatch"), OSError(2, "no file")):
        assert not is_out_of_memory(error)


def test_a_value_without_strict_json_form_fails_and_says_so(trial: TrialProcess) -> None:
    failure = failure_of(trial, "not_a_number")
    assert failure.state == "failed" and "the answer of 'not_a_number' has no strict JSON form" in failure.reason
    with pytest.raises(OptkitError, match="the call of 'echo' has no strict JSON form"):
        trial.call("echo", value=math.inf)
    assert trial.call("echo", value=1) == 1


def test_an_answer_beyond_the_line_limit_fails_and_names_the_way_out(server: TrialServer, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = server.spawn("trial_targets:short_lines", {}, name="long line")
    assert "write it to a file and pass its path" in failure_of(trial, "echo", value="x" * 2**20).reason
    assert trial.call("echo", value="x") == "x"
    trial.end()
    trial = server.spawn(TARGET, {}, name="longer line")
    monkeypatch.setattr(trial_process, "MAX_LINE_BYTES", 1000)  # the trial does not keep to the caller's limit
    assert failure_of(trial, "echo", value="x" * 2**21).reason.startswith("it sent what is no message: a line of more than")
    trial.kill()


def test_a_call_that_the_target_does_not_offer_is_named(trial: TrialProcess) -> None:
    assert failure_of(trial, "__init__").reason.startswith("AttributeError: Target has no call '__init__'; it has echo, add")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("trial_targets:broken", "KeyError: 'no model'"),
        ("trial_targets:absent", "AttributeError: module 'trial_targets' has no attribute 'absent'"),
        ("no_such_module:x", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_target_that_cannot_be_built_fails_every_call(server: TrialServer, target: str, reason: str) -> None:
    trial = server.spawn(target, {}, name="unbuilt")
    assert [failure_of(trial, "echo", value=1).reason for _ in range(2)] == [reason] * 2
    trial.end()


def test_misuse_is_told_apart_from_failure(server: TrialServer, trial: TrialProcess) -> None:
    with pytest.raises(OptkitError, match="asked for nothing"):
        trial.wait()
    trial.start("echo", value=1)
    with pytest.raises(OptkitError, match="still busy with 'echo'"):
        trial.start("echo", value=2)
    assert trial.wait() == 1
    with pytest.raises(OptkitError, match="the spec of trial 'odd' has no strict JSON form"):
        server.spawn(TARGET, {"path": Path()}, name="odd")


# -- deaths


@pytest.mark.parametrize(("method", "reason"), [("segfault", "SIGSEGV"), ("abort", "SIGABRT")])
def test_a_crash_is_named_by_its_signal_and_the_log_shows_where(trial: TrialProcess, method: str, reason: str) -> None:
    failure = failure_of(trial, method)
    assert (failure.state, failure.reason) == ("crashed", reason)
    assert f"in {method}" in failure.log_tail
    assert not trial.usable
    assert failure_of(trial, "add", number=1).reason == reason


def test_an_answer_counts_even_if_the_end_is_heard_of_first(
    server: TrialServer, trial: TrialProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = trial.call("pid")
    trial.start("answer_and_leave")
    assert_gone(pid)
    assert select.select([server._control], [], [], 5.0)[0]
    select_in_order = server.selector.select
    monkeypatch.setattr(server.selector, "select", lambda timeout: select_in_order(timeout)[::-1])
    assert trial.wait() == "last words"
    assert failure_of(trial, "pid").reason == "it ended with exit status 0 and without an answer"


def test_an_exit_without_an_answer_is_a_failure_whatever_its_status(server: TrialServer) -> None:
    for status, state in ((0, "failed"), (3, "crashed")):
        trial = server.spawn(TARGET, {}, name="exit")
        failure = failure_of(trial, "leave", status=status)
        assert (failure.state, failure.reason) == (state, f"it ended with exit status {status} and without an answer")


@pytest.mark.parametrize("method", ["hang", "hang_deaf"])
def test_a_time_out_kills_and_the_log_shows_where_it_hung(trial: TrialProcess, method: str) -> None:
    seen: list[dict[str, Any]] = []
    failure = failure_of(trial, method, timeout=0.3, on_progress=seen.append)
    assert (failure.state, failure.reason) == ("timeout", f"no answer to '{method}' within 0.3 s")
    if method == "hang":
        assert "in hang" in failure.log_tail
    assert_gone(seen[0]["pid"])
    assert not trial.usable


def test_the_time_out_of_one_trial_is_kept_while_another_is_waited_for(server: TrialServer) -> None:
    late, worker = (server.spawn(TARGET, {}, name=name) for name in ("late", "worker"))
    seen: list[dict[str, Any]] = []
    late.start("hang", timeout=0.2, on_progress=seen.append)
    assert failure_of(worker, "hang", timeout=2.0).state == "timeout"
    assert_gone(seen[0]["pid"])
    with pytest.raises(TrialFailed, match="no answer to 'hang' within 0.2 s"):
        late.wait()


@pytest.mark.parametrize("then", ["hang_deaf", "segfault", ""])
def test_a_detached_grandchild_ends_with_its_trial_however_that_ends(trial: TrialProcess, then: str) -> None:
    seen: list[dict[str, Any]] = []
    if then:
        failure_of(trial, "detach", then=then, timeout=1.0, on_progress=seen.append)
    else:
        trial.call("detach", then="", on_progress=seen.append)
        os.kill(seen[0]["grandchild"], 0)  # it lives as long as the trial does
        trial.end()
    assert_gone(seen[0]["grandchild"])


def test_ending_one_trial_leaves_the_grandchildren_of_another_alone(server: TrialServer) -> None:
    one, other = (server.spawn(TARGET, {}, name=name) for name in ("one", "other"))
    grandchildren = [trial.call("detach", then="") for trial in (one, other)]
    one.end()
    assert_gone(grandchildren[0])
    os.kill(grandchildren[1], 0)
    other.kill()
    assert_gone(grandchildren[1])


def test_a_flood_of_output_blocks_nothing(trial: TrialProcess) -> None:
    assert trial.call("flood", size=100 * 2**20) == 100 * 2**20
    assert trial.log_path.stat().st_size == 100 * 2**20
    assert len(trial.log_tail()) < 20_000
    trial.end()
    trial.log_path.unlink()


def test_a_kill_from_outside_is_told_as_such(trial: TrialProcess) -> None:
    failure = failure_of(trial, "hang", on_progress=lambda progress: os.kill(progress["pid"], signal.SIGKILL))
    assert failure.state == "killed" and failure.reason.startswith("SIGKILL, which optkit did not send")


def test_the_kernels_oom_kill_is_oom(trial: TrialProcess) -> None:
    group = Path(f"/sys/fs/cgroup/memory/optkit-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs a memory control group (version 1) that can be written: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(64 * 2**20))
        (group / "cgroup.procs").write_text(str(trial.call("pid")))
        failure = failure_of(trial, "allocate", size=2**30)
        assert failure.state == "oom" and failure.reason.startswith("killed by the kernel, which had run out of memory")
    finally:
        trial.kill()
        group.rmdir()


def test_a_trial_that_closes_its_channel_and_goes_on_is_ended(trial: TrialProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_process, "GONE_SECONDS", 1.0)
    pid = trial.call("pid")
    failure = failure_of(trial, "hang_up")
    assert (failure.state, failure.reason) == ("failed", "it closed the channel to optkit and went on without it")
    assert_gone(pid)


def test_an_error_in_the_callers_own_callback_ends_the_trial(trial: TrialProcess) -> None:
    pid = trial.call("pid")
    with pytest.raises(ZeroDivisionError):
        trial.call("hang", on_progress=lambda progress: 1 // 0)
    assert_gone(pid)


# -- the server


def test_a_killed_server_is_reported_leaves_nobody_behind_and_is_replaced(tmp_path: Path) -> None:
    with TrialServer(imports=(), log_folder=tmp_path) as server:
        trial, other = (server.spawn(TARGET, {"start": 1}, name=name) for name in ("busy", "idle"))
        first, pids = server.pid, [trial.call("pid"), other.call("pid")]
        assert first is not None

        def kill_server(progress: dict[str, Any]) -> None:
            if "grandchild" in progress:
                pids.append(progress["grandchild"])
            else:
                os.kill(first, signal.SIGKILL)

        failure = failure_of(trial, "detach", then="hang_deaf", on_progress=kill_server)
        assert (failure.state, failure.reason) == ("killed", f"the trial server (process {first}) ended with SIGKILL")
        assert failure_of(other, "echo", value=1).reason == failure.reason
        assert len(pids) == 3
        assert_gone(first, *pids)
        again = server.spawn(TARGET, {"start": 1}, name="again")
        assert again.call("add", number=1) == 2 and server.pid != first


def test_trials_die_with_their_server_at_once_even_if_the_caller_looks_elsewhere(tmp_path: Path) -> None:
    with TrialServer(imports=(), log_folder=tmp_path) as server:
        pid = server.spawn(TARGET, {}, name="x").call("pid")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert_gone(pid)


def test_close_ends_everything_and_a_closed_server_starts_nothing(tmp_path: Path) -> None:
    with TrialServer(imports=(), log_folder=tmp_path) as server:
        trial = server.spawn(TARGET, {}, name="left")
        pids = [server.pid or 0, trial.call("pid"), trial.call("detach", then="")]
        trial.start("hang_deaf")
    assert_gone(*pids)
    with pytest.raises(TrialFailed, match="the trial server was closed"):
        trial.wait()
    with pytest.raises(OptkitError, match="its server is closed"):
        server.spawn(TARGET, {}, name="late")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_the_death_of_the_caller_orphan_nobody(tmp_path: Path, number: signal.Signals) -> None:
    script = """
        import json, os, signal, sys
        from pathlib import Path
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
        from optkit.trial import TrialServer
        with TrialServer(imports=(), log_folder=Path(sys.argv[1])) as server:
            trials = [server.spawn("trial_targets:Target", {}, name="x") for _ in range(2)]
            pids = [server.pid] + [trial.call("pid") for trial in trials] + [trials[0].call("detach", then="")]
            trials[0].start("hang_deaf")
            holder = os.fork()  # it inherits the caller's end of the sockets, and outlives it
            if holder == 0:
                signal.pause()
            pids.append(holder)
            trials[1].call("hang_deaf", on_progress=lambda _: print(json.dumps(pids), flush=True))
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as caller:
        assert caller.stdout and caller.stderr
        *pids, holder = json.loads(caller.stdout.readline())
        caller.send_signal(number)
        assert_gone(caller.pid, *pids)
        os.kill(holder, signal.SIGKILL)
        assert ("KeyboardInterrupt" in caller.stderr.read()) == (number == signal.SIGINT)


def test_a_server_that_still_imports_dies_with_the_caller(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    (tmp_path / "endless_import.py").write_text(
        f"import os, signal\nwith open({str(tmp_path / 'started')!r}, 'w') as told: told.write(str(os.getpid()))\n"
        "while True: signal.pause()\n"
    )
    script = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(tmp_path)!r})
        from optkit.trial import TrialServer
        with TrialServer(imports=("endless_import",), log_folder=Path({str(tmp_path)!r})) as server:
            server.spawn("trial_targets:Target", {{}}, name="x").call("pid")
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)]) as caller:
        pid = int((tmp_path / "started").read_text())
        caller.kill()
        assert_gone(caller.pid, pid)


def test_spawning_does_not_wait_for_the_servers_imports(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "slow_import.py").write_text(f"open({str(fifo)!r}).read()\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with TrialServer(imports=("slow_import",), log_folder=tmp_path / "logs") as server:
            trial = server.spawn(TARGET, {"start": 1}, name="early")
            trial.start("add", number=1, timeout=5.0)
            fifo.write_text("")  # only now can the import go on
            assert trial.wait() == 2


def test_a_module_that_cannot_be_imported_spoils_only_trials_that_need_it(tmp_path: Path) -> None:
    with TrialServer(imports=("no_such_module", "json"), log_folder=tmp_path) as server:
        assert server.spawn(TARGET, {"start": 1}, name="other").call("add", number=1) == 2
        assert server.import_errors == {"no_such_module": "ModuleNotFoundError: No module named 'no_such_module'"}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import ctypes; ctypes.string_at(0)",
            r"the trial server \(process \d+\) ended with SIGSEGV while it imported bad_import",
        ),
        ("import signal; signal.pause()", "the trial server did not start within 0.5 s, importing bad_import"),
    ],
)
def test_a_server_that_does_not_survive_its_imports_makes_trials_unavailable(tmp_path: Path, code: str, reason: str) -> None:
    (tmp_path / "bad_import.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with TrialServer(imports=("bad_import",), log_folder=tmp_path / "logs", start_timeout=0.5) as server:
            failure = failure_of(server.spawn(TARGET, {}, name="x"), "echo", value=1)
    assert failure.state == "unavailable" and re.fullmatch(reason, failure.reason)


def test_logs_are_private_and_stay_in_their_folder_whatever_the_trial_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    with TrialServer(imports=(), log_folder=folder) as server:
        trials = [server.spawn(TARGET, {}, name=name) for name in ("../../etc/x", "a\0b", "\u202eevil", "n" * 300, "", "n" * 300)]
        assert {trial.log_path.parent for trial in trials} == {folder}
        assert len({trial.log_path for trial in trials}) == len(trials)
        assert {stat.S_IMODE(trial.log_path.stat().st_mode) for trial in trials} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_without_fork_a_trial_is_a_fresh_python_with_the_same_behaviour(tmp_path: Path) -> None:
    with TrialServer(imports=("torch",), log_folder=tmp_path, fork=False) as server:
        trial = server.spawn(TARGET, {"start": 1}, name="exec", env={"OPTKIT_TEST_VARIABLE": "c"})
        facts = trial.call("facts")
        assert facts["variable_at_import"] == "c" and facts["session"] and not facts["torch"]
        grandchild = trial.call("detach", then="")
        assert "a fresh Python" in trial.log_tail()
        assert failure_of(trial, "segfault").reason == "SIGSEGV"
        assert_gone(grandchild)


def test_threaded_torch_works_in_trials_forked_after_its_import(tmp_path: Path) -> None:
    with TrialServer(imports=("torch", "numpy.random"), env={"OMP_NUM_THREADS": "2"}, log_folder=tmp_path) as server:
        for name in ("first", "second"):
            trial = server.spawn(TARGET, {}, name=name)
            assert trial.call("facts")["torch"]  # it was there before the target was
            assert trial.call("matmul", size=512, threads=2, timeout=60.0) == 512.0**3
            trial.end()
        draws = [server.spawn("trial_targets:NumPyTarget", {}, name="numpy").call("draw") for _ in range(2)]
        assert draws[0] != draws[1]
