"""The memo among real faults: damaged, foreign and planted entries, kills, full and read-only disks, racing processes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import optkit.memo
import optkit.memo_backend  # imports joblib here, not in a child
from optkit import folders
from optkit.errors import OptkitError
from optkit.memo import Memo
from optkit.memo_entry import Key
from tests.faults import exit_status, file_size_limit, file_system, fork, killed_at_each_line, public_folder, read_only, run_together

SPEC = {"model": "0f3a", "n": 1}
VALUE = {"perplexity": 4.69}


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def memo(warnings) -> Iterator[Memo]:
    """In memory where there is such a file system, for thousands of faults without waiting for a disk."""
    with public_folder() as place:
        yield Memo(place / "memo", warn=warnings.append)


@pytest.fixture
def entry(memo) -> Path:
    """A good entry."""
    memo.compute("metrics", lambda spec: VALUE, SPEC)
    return Path(Key.of(memo.folder, "metrics", SPEC).path)


def sealed(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def assert_missed(folder: Path, reason: str) -> None:
    """A miss with one warning that names the entry and the reason."""
    said: list[str] = []
    assert Memo(folder, warn=said.append).lookup("metrics", SPEC) is None
    assert len(said) == 1
    assert said[0].startswith(f"cache entry {folder}/metrics-")
    assert reason in said[0]


def test_every_flipped_bit_is_a_miss(memo, entry):
    good = entry.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        entry.write_bytes(data)
        assert_missed(memo.folder, "damaged or cut short")
    entry.write_bytes(good)
    assert memo.lookup("metrics", SPEC).value == VALUE


def test_every_truncation_is_a_miss_and_so_is_more(memo, entry):
    good = entry.read_bytes()
    for length in range(len(good)):
        entry.write_bytes(good[:length])
        assert_missed(memo.folder, "damaged or cut short")
    for more in (b"\n", b"\0", good):
        entry.write_bytes(good + more)
        assert_missed(memo.folder, "damaged or cut short")


def test_the_entry_of_another_key_is_a_miss(memo, entry):
    good = entry.read_bytes()
    for other in ({"model": "0f3a", "n": 2}, {"model": "0f3a", "n": 1.0}, {"model": "0f3a", "n": True}):
        memo.compute("metrics", lambda spec: "of another", other)
        entry.write_bytes(memo.lookup("metrics", other).path.read_bytes())
        assert_missed(memo.folder, "it belongs to another key")
    entry.write_bytes(good)
    assert memo.lookup("metrics", SPEC).value == VALUE


def test_a_damaged_entry_is_computed_again_and_replaced(memo, entry, warnings):
    entry.write_bytes(b"")
    assert memo.compute("metrics", lambda spec: "again", SPEC)[0] == "again"
    assert len(warnings) == 1
    assert memo.lookup("metrics", SPEC).value == "again"


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_planted_pickle_is_never_executed(memo, entry, tmp_path):
    sprung = tmp_path / "sprung"
    payload = pickle.dumps(Trap(sprung))
    pickle.loads(payload)
    assert sprung.exists()  # the trap works
    sprung.unlink()
    for planted in (payload, sealed(payload)):
        entry.write_bytes(planted)
        assert_missed(memo.folder, "")
    joblibs = memo.folder / "joblib" / "optkit" / "memo" / "unknown" / ("0" * 32)
    joblibs.mkdir(parents=True)
    (joblibs / "output.pkl").write_bytes(payload)
    assert memo.compute("metrics", lambda spec: "computed", SPEC)[0] == "computed"
    assert not sprung.exists()


@pytest.mark.parametrize("schema", [0, 2, 10**6])
def test_an_older_or_newer_schema_is_a_miss_and_its_file_is_kept(memo, entry, warnings, schema):
    body = json.loads(entry.read_bytes()[65:])
    foreign = sealed(json.dumps({**body, "schema": schema}, sort_keys=True, separators=(",", ":")).encode())
    entry.write_bytes(foreign)
    assert_missed(memo.folder, f"its schema is {schema}, this optkit reads 1")
    for force in (False, True):
        assert memo.compute("metrics", lambda spec: "mine", SPEC, force=force)[0] == "mine"
    assert entry.read_bytes() == foreign
    assert warnings[-1] == f"metrics not cached: {entry} is of another optkit's schema and is left as it is"


@pytest.mark.parametrize(
    "change",
    [
        lambda body: b"[" * 100_000,
        lambda body: body.replace(b"4.69", b"NaN"),
        lambda body: body.replace(b"4.69", b"1" * 5000),
        lambda body: b"null",
        lambda body: b"\xff\xfe",
        lambda body: body.replace(b'"schema":1', b'"schema":true'),
        lambda body: body.replace(b'"value"', b'"other"'),
        lambda body: body.replace(b'"time":', b'"time":null,"was":'),
        lambda body: body.replace(b'"seconds":', b'"seconds":"2","was":'),
        lambda body: body.replace(b'"key":', b'"key":1,"key":'),
    ],
)
def test_a_good_digest_over_nonsense_is_a_miss(memo, entry, change):
    body = change(entry.read_bytes()[65:])
    entry.write_bytes(sealed(body))
    assert_missed(memo.folder, "")


def test_a_time_in_the_future_is_a_miss(memo, entry):
    body = json.loads(entry.read_bytes()[65:])
    entry.write_bytes(sealed(json.dumps({**body, "time": time.time() + 3600}, sort_keys=True, separators=(",", ":")).encode()))
    assert_missed(memo.folder, "its time lies in the future")


def test_links_folders_pipes_and_sockets_are_not_read(memo, entry, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(entry.read_bytes())

    def make_socket() -> None:
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(memo.folder)  # a socket's path has 108 bytes at most
            server.bind("s")
            os.rename("s", entry.name)

    here = os.getcwd()
    for make in (lambda: entry.symlink_to(elsewhere), lambda: os.mkfifo(entry), make_socket, entry.mkdir):
        entry.unlink()
        make()
        os.chdir(here)
        assert_missed(memo.folder, "not used")
        assert memo.compute("metrics", lambda spec: "computed", SPEC)[0] == "computed"
    assert elsewhere.read_bytes()[65:].endswith(b'"value":{"perplexity":4.69}}')
    assert entry.is_dir()  # nothing can take a folder's place: the result was returned, and not kept


def test_a_file_that_is_far_too_large_is_not_read(memo, entry):
    os.truncate(entry, 3 * 1024**3)  # sparse
    assert_missed(memo.folder, "bytes are more than the cache's limit")


def assert_only_returned(folder: Path, reason: str) -> None:
    said: list[str] = []
    for _ in range(2):
        assert Memo(folder, warn=said.append).compute("metrics", lambda spec: VALUE, {"new": 1})[0] == VALUE
    assert said[0] == said[1]
    assert said[0].startswith("metrics not cached: ")
    assert reason in said[0]


def test_where_the_folder_is_a_file_or_cannot_be_made_the_result_is_returned(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_only_returned(tmp_path / "file", "exists")
    assert_only_returned(tmp_path / "file" / "memo", "xists")
    assert_only_returned(Path("/proc/optkit/memo"), "No such file or directory")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_the_users_is_not_made_a_cache(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    assert_only_returned(tmp_path, "holds other files")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_read_only_cache_still_answers():
    with public_folder() as place:
        memo = Memo(place / "memo", warn=pytest.fail)
        memo.compute("metrics", lambda spec: VALUE, SPEC)
        with read_only(memo.folder):
            assert memo.lookup("metrics", SPEC).value == VALUE
            assert_only_returned(memo.folder, "ermission denied")


@pytest.mark.parametrize("limit", [0, 64, 65, 100])
def test_on_a_full_disk_the_result_is_returned_and_the_old_entry_stays(memo, entry, warnings, limit):
    names = sorted(os.listdir(memo.folder))
    with file_size_limit(limit):
        assert memo.compute("metrics", lambda spec: "new", SPEC, force=True)[0] == "new"
    assert len(warnings) == 1
    assert "metrics not cached" in warnings[0]
    assert "too large" in warnings[0]
    assert memo.lookup("metrics", SPEC).value == VALUE
    assert sorted(os.listdir(memo.folder)) == names


def test_on_a_disk_that_fills_up_results_are_returned_and_what_was_kept_stays(tmp_path):
    """A true file system of 200 KB: 1,000 results of 2 KB, of which it holds about a tenth."""
    with file_system(tmp_path / "disk", "200k"):
        said: list[str] = []
        memo = Memo(tmp_path / "disk" / "memo", warn=said.append)
        for number in range(1000):
            value = memo.compute("metrics", lambda spec: [spec["n"], "x" * 2000], {"n": number})[0]
            assert value == [number, "x" * 2000]
        kept = [hit.value[0] for number in range(1000) if (hit := memo.lookup("metrics", {"n": number})) is not None]
        assert 10 < len(kept) < 100 and kept == list(range(len(kept)))
        assert len(said) == 1 and "metrics not cached" in said[0] and "No space left on device" in said[0]
        assert not [name for name in os.listdir(memo.folder) if name.endswith((".tmp", ".lock"))]
        assert memo.clear() == len(kept)
        memo.compute("metrics", lambda spec: VALUE, SPEC)
        assert memo.lookup("metrics", SPEC).value == VALUE


def test_a_cache_on_a_read_only_file_system_still_answers(tmp_path):
    with file_system(tmp_path / "disk", "200k") as make_read_only:
        memo = Memo(tmp_path / "disk" / "memo", warn=pytest.fail)
        memo.compute("metrics", lambda spec: VALUE, SPEC)
        make_read_only()
        assert memo.lookup("metrics", SPEC).value == VALUE
        assert_only_returned(memo.folder, "Read-only file system")
        assert_only_returned(tmp_path / "disk" / "another", "Read-only file system")


def test_two_versions_in_many_processes_at_once_get_their_own_values(memo):
    """What another version of the code computed under the same name in the same moment is never returned: 600 calls."""
    folder = memo.folder

    def work(version: str) -> None:
        own = Memo(folder, warn=lambda message: None)
        for number in range(150):
            spec = {"model": "0f3a", "n": number % 10, "code": version}
            force = number % 7 == 0
            assert own.compute("metrics", lambda spec: f"{spec['code']} {spec['n']}", spec, force=force)[0] == f"{version} {number % 10}"

    assert run_together(*[lambda version=version: work(version) for version in ("old", "new", "old", "new")]) == [0] * 4


def test_a_kill_at_any_line_leaves_the_old_entry_or_the_new_one(memo, entry, warnings):
    def write() -> None:
        memo.compute("metrics", lambda spec: "new", SPEC, force=True)

    seen: list[Any] = []
    for _ in killed_at_each_line(write, [optkit.memo, folders]):
        seen.append(memo.lookup("metrics", SPEC).value)
        assert seen[-1] in (VALUE, "new")
    assert seen[0] == VALUE
    assert seen[-1] == "new"
    assert seen == sorted(seen, key=lambda value: value == "new")  # old until it is new
    assert warnings == []
    left = [name for name in os.listdir(memo.folder) if name.endswith(".tmp")]
    assert left
    for name in left:
        os.utime(memo.folder / name, (1, 1))  # long ago
    memo.compute("metrics", lambda spec: "next", {"next": 1})
    assert sorted(path.suffix for path in memo.folder.iterdir()) == [".TAG", ".json", ".json"]


def test_a_kill_at_any_line_of_the_first_write_leaves_nothing_or_all(memo):
    folder = memo.folder
    said: list[str] = []

    def write() -> None:
        Memo(folder, warn=said.append).compute("metrics", lambda spec: VALUE, SPEC)

    for _ in killed_at_each_line(write, [folders]):
        memo = Memo(folder, warn=pytest.fail)
        hit = memo.lookup("metrics", SPEC)
        assert hit is None or hit.value == VALUE
        memo.compute("metrics", lambda spec: VALUE, SPEC)  # whatever is left, the next caller can write
        assert memo.lookup("metrics", SPEC).value == VALUE
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_kills_in_the_middle_of_large_writes(memo, warnings):
    """The child writes without end and tells of each write; it is killed while it is in one of the next."""
    letters = "abcdefgh"
    for round_ in range(24):
        told, tell = os.pipe()

        def write(tell: int = tell) -> None:
            for number in range(10**9):
                memo.compute("metrics", lambda spec, number=number: letters[number % 8] * 300_000, SPEC, force=True)
                os.write(tell, b".")

        child = fork(write)
        os.close(tell)
        for _ in range(1 + round_ % 3):
            assert os.read(told, 1) == b"."
        memo.lookup("metrics", SPEC)  # takes a while, and must not meet a half
        os.kill(child, signal.SIGKILL)
        assert exit_status(child) == -signal.SIGKILL
        os.close(told)
        value = memo.lookup("metrics", SPEC).value
        assert value in {letter * 300_000 for letter in letters}
    assert warnings == []


def test_a_dead_holder_lets_the_next_caller_compute(memo, warnings):
    def die(spec: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_status(fork(lambda: memo.compute("metrics", die, SPEC))) == -signal.SIGKILL
    assert [path.suffix for path in memo.folder.iterdir() if path.suffix == ".lock"] == [".lock"]
    assert memo.compute("metrics", lambda spec: VALUE, SPEC)[0] == VALUE
    assert sorted(path.suffix for path in memo.folder.iterdir()) == [".TAG", ".json"]
    assert warnings == []


def test_the_lock_file_of_a_dead_holder_does_not_stay(memo):
    def die(spec: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_status(fork(lambda: memo.compute("metrics", die, SPEC))) == -signal.SIGKILL
    memo.compute("metrics", lambda spec: VALUE, {"another": 1})
    assert sorted(path.suffix for path in memo.folder.iterdir()) == [".TAG", ".json"]


def test_identical_callers_in_many_processes_compute_once(tmp_path):
    arrived, computed = tmp_path / "arrived", tmp_path / "computed"
    callers = 5

    def note(path: Path) -> None:
        with open(path, "ab", buffering=0) as file:
            file.write(b".")

    def slow(spec: dict[str, Any]) -> Any:
        note(computed)
        while arrived.stat().st_size < callers:  # until all have asked
            os.sched_yield()
        return os.getpid()

    def call() -> None:
        memo = Memo(tmp_path / "memo", warn=lambda message: None)
        assert memo.lookup("metrics", SPEC) is None or computed.stat().st_size == 1
        note(arrived)
        memo.compute("metrics", slow, SPEC)

    assert run_together(*[call] * callers) == [0] * callers
    assert computed.stat().st_size == 1
    assert sorted(path.suffix for path in (tmp_path / "memo").iterdir()) == [".TAG", ".json"]


def test_clear_during_reads_and_writes_harms_nobody(memo):
    def work() -> None:
        own = Memo(memo.folder, warn=lambda message: None)
        for number in range(40):
            assert own.compute("metrics", lambda spec: spec["x"], {"x": number % 5})[0] == number % 5
            hit = own.lookup("metrics", {"x": number % 5})
            assert hit is None or hit.value == number % 5

    def clear() -> None:
        for _ in range(400):
            memo.clear()
            memo.info()

    assert run_together(work, work, clear) == [0, 0, 0]


def test_clear_refuses_what_is_no_cache_of_optkits(tmp_path, memo, entry):
    users = tmp_path / "thesis"
    users.mkdir()
    (users / entry.name).write_bytes(entry.read_bytes())  # even a file that is named like an entry
    (users / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n# made by another program\n")
    link = tmp_path / "link"
    link.symlink_to(memo.folder)
    file = tmp_path / "file"
    file.touch()
    for folder in (users, link, file):
        with pytest.raises(OptkitError, match=f"nothing cleared: {folder} is not a cache that optkit made"):
            Memo(folder, warn=pytest.fail).clear()
    assert sorted(os.listdir(users)) == ["CACHEDIR.TAG", entry.name]
    assert memo.lookup("metrics", SPEC).value == VALUE


def test_clear_of_an_absent_or_empty_folder_is_no_error(tmp_path):
    """Another process may be about to make it."""
    assert Memo(tmp_path / "absent", warn=pytest.fail).clear() == 0
    assert Memo(tmp_path, warn=pytest.fail).clear() == 0


def test_clear_leaves_what_the_memo_did_not_make(tmp_path, memo, entry):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / entry.name).write_text("mine")
    (memo.folder / "linked").symlink_to(outside)
    (memo.folder / f"metrics-{'0' * 64}.json").symlink_to(outside / entry.name)
    (memo.folder / f"metrics-{'1' * 64}.json").mkdir()
    (memo.folder / "notes.json").write_text("mine")
    kept = sorted(set(os.listdir(memo.folder)) - {entry.name})
    assert memo.clear() == 1
    assert sorted(os.listdir(memo.folder)) == kept
    assert (outside / entry.name).read_text() == "mine"


def test_only_the_user_can_read_it(memo, entry):
    assert memo.folder.stat().st_mode & 0o777 == 0o700
    assert entry.stat().st_mode & 0o777 == 0o600
