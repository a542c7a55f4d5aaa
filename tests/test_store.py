"""Records: what was acknowledged is there, what is damaged is said, and nothing else is touched."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import optkit.store
from optkit.errors import OptkitError
from optkit.store import RecordStore
from tests.faults import (
    exit_status,
    file_size_limit,
    file_system,
    fork,
    has_ended,
    killed_at_each_line,
    public_folder,
    read_only,
    run_together,
    waits_for_a_lock,
)


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory where there is such a file system, for thousands of writes without waiting for a disk."""
    with public_folder() as folder:
        yield folder


@pytest.fixture
def store(place) -> RecordStore:
    return RecordStore(place / "records", warn=pytest.fail)


def filled(store: RecordStore, count: int = 3) -> list[dict[str, Any]]:
    for number in range(count):
        store.append({"n": number, "metrics": {"perplexity": 4.5 + number}})
    rows, problems = store.read()
    assert problems == []
    return rows


def sealed(row: Any) -> bytes:
    body = json.dumps(row, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(body).hexdigest().encode() + b" " + body + b"\n"


def test_rows_come_back_in_order_with_schema_id_and_time(tmp_path):
    store = RecordStore(tmp_path / "records")
    assert store.read() == ([], [])
    before = time.time()
    ids = [store.append({"plan": ["nf4"], "n": number, "text": "é\n\u2028"}) for number in range(3)]
    rows, problems = store.read()
    assert problems == []
    assert [row["id"] for row in rows] == ids
    assert len(set(ids)) == 3
    assert [row["n"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["schema"] == 1
        assert before <= row["time"] <= time.time()
        assert (row["plan"], row["text"]) == (["nf4"], "é\n\u2028")
    assert store.path.read_bytes() == b"".join(map(sealed, rows))


def test_records_are_for_the_user_alone(store):
    store.append({})
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_the_stores_own_names_are_refused(store):
    with pytest.raises(ValueError, match="gives a record its id, time"):
        store.append({"time": 1.0, "id": "mine"})


def test_a_record_that_json_cannot_hold_is_named(store):
    with pytest.raises(OptkitError, match=r"record not kept: metrics\.perplexity is nan"):
        store.append({"metrics": {"perplexity": math.nan}})
    assert not store.path.exists()


def test_latest_finds_what_reading_all_finds(store):
    """Rows of 100 to 90,000 bytes, so that they begin and end anywhere in the blocks that are read."""
    for number in range(60):
        store.append({"n": number, "third": number % 3, "text": "x" * (number * 7919 % 90_000)})
    rows = store.read().rows
    for number in range(60):
        assert store.latest(lambda row, number=number: row["n"] == number) == rows[number]
    assert store.latest(lambda row: row["third"] == 1) == rows[58]
    assert store.latest(lambda row: False) is None


def test_latest_reads_no_further_than_it_must(store):
    filled(store)
    last = store.path.read_bytes().rindex(b"\n", 0, -1) + 1
    damaged = b"?" * (last - 1) + store.path.read_bytes()[last - 1 :]
    store.path.write_bytes(damaged)
    assert store.latest(lambda row: True)["n"] == 2  # and warn, which fails this test, was not called


def test_latest_of_nothing(store):
    assert store.latest(lambda row: True) is None
    filled(store, 1)
    store.path.write_bytes(b"")
    assert store.latest(lambda row: True) is None


def test_latest_says_which_rows_it_passed(store):
    rows = filled(store)
    store.path.write_bytes(store.path.read_bytes()[:-5])
    said: list[str] = []
    assert RecordStore(store.folder, warn=said.append).latest(lambda row: True) == rows[1]
    assert said == [f"{store.path}: row left out: it is damaged or was cut short (its digest does not fit)"]


def test_a_torn_tail_is_one_reported_row_and_harms_no_other(store):
    rows = filled(store)
    whole = store.path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for length in range(start, len(whole)):
        store.path.write_bytes(whole[:length])
        complete = length == len(whole) - 1  # only the end of line is missing
        kept = rows if complete else rows[:2]
        reported = 0 if complete or length == start else 1
        found = store.read()
        assert (found.rows, len(found.problems)) == (kept, reported)
        new = store.append({"n": "new"})
        found = store.read()
        assert (found.rows[:-1], len(found.problems)) == (kept, reported)
        assert found.rows[-1]["id"] == new
        last = store.path.read_bytes().split(b"\n")[-2]
        assert last + b"\n" == sealed(found.rows[-1])  # on a line of its own
        assert found.problems[:1] == [f"{store.path}:3: row left out: it is damaged or was cut short (its digest does not fit)"][:reported]


def test_a_flipped_bit_costs_one_row_at_most_and_is_reported(store):
    rows = filled(store)
    whole = store.path.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        store.path.write_bytes(data)
        hit = rows[whole.count(b"\n", 0, bit // 8)]
        found = store.read()
        if whole[bit // 8] == ord("\n"):
            assert found == (rows, [])
        else:
            assert found.rows == [row for row in rows if row is not hit]
            assert found.problems
        assert store.path.read_bytes() == data


def test_a_newer_schema_is_refused_and_left_as_it_is(store):
    rows = filled(store)
    newer = sealed({"schema": 2, "id": "abc", "time": 1.0, "n": 3, "of the future": True})
    with open(store.path, "ab") as file:
        file.write(newer)
    before = store.path.read_bytes()
    found = store.read()
    assert found.rows == rows
    assert found.problems == [f"{store.path}:4: row left out: its schema is 2, this optkit reads up to 1; a newer optkit reads it"]
    said: list[str] = []
    assert RecordStore(store.folder, warn=said.append).latest(lambda row: row.get("n") == 3) is None
    assert len(said) == 1
    store.append({"n": 4})
    assert store.path.read_bytes().startswith(before)
    assert [row["n"] for row in store.read().rows] == [0, 1, 2, 4]


@pytest.mark.parametrize(
    "row", [None, [], {}, {"schema": 0, "id": "a", "time": 1.0}, {"schema": True}, {"schema": 1, "id": 1, "time": 1.0}]
)
def test_a_good_digest_over_nonsense_is_no_row(store, row):
    rows = filled(store)
    with open(store.path, "ab") as file:
        file.write(sealed(row))
    found = store.read()
    assert found.rows == rows
    assert found.problems == [f"{store.path}:4: row left out: it is no record"]


def test_a_record_in_a_records_text_is_no_row(store):
    rows = filled(store, 1)
    store.append({"text": store.path.read_text()})
    data = store.path.read_bytes()
    store.path.write_bytes(data[:-3] + b"?" + data[-2:])
    found = store.read()
    assert found.rows == rows
    assert found.problems


def test_four_writers_of_400_rows_each_keep_all(store):
    def write(writer: int) -> None:
        for number in range(400):
            store.append({"writer": writer, "n": number})

    assert run_together(*[lambda writer=writer: write(writer) for writer in range(4)]) == [0] * 4
    rows, problems = store.read()
    assert problems == []
    assert len({row["id"] for row in rows}) == 1600
    for writer in range(4):
        assert [row["n"] for row in rows if row["writer"] == writer] == list(range(400))


@pytest.mark.parametrize("use", ["read", "latest", "append"])
def test_everybody_waits_for_the_write_in_progress(store, use):
    rows = filled(store, 1)
    second = {"schema": 1, "id": "second", "time": 1.0}

    def child() -> None:
        if use == "read":
            assert store.read() == ([*rows, second], [])
        elif use == "latest":
            assert store.latest(lambda row: True) == second
        else:
            store.append({"n": "third"})

    with open(store.path, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(sealed(second)[:80])
        waiter = fork(child)
        while not waits_for_a_lock(file.fileno()) and not has_ended(waiter):
            os.sched_yield()
        file.write(sealed(second)[80:])
        fcntl.flock(file, fcntl.LOCK_UN)  # the child has this descriptor too: closing it here would not let go
    assert exit_status(waiter) == 0
    found = store.read()
    assert found.rows[:2] == [*rows, second]
    assert found.problems == []


def test_readers_meet_no_half_of_a_row(store):
    store.append({"n": -1, "text": ""})

    def write() -> None:
        for number in range(150):
            store.append({"n": number, "text": "x" * 50_000})

    def read() -> None:
        seen = 0
        while seen < 151:
            found = store.read()
            assert found.problems == []
            assert len(found.rows) >= seen
            seen = len(found.rows)
            assert store.latest(lambda row: True)["n"] >= seen - 2

    assert run_together(write, read, read) == [0, 0, 0]


def test_a_kill_at_any_line_loses_no_acknowledged_row(store):
    filled(store)
    acknowledged = store.folder / "acknowledged"
    acknowledged.touch()

    def append() -> None:
        row_id = store.append({"n": "next"})
        acknowledged.write_text(acknowledged.read_text() + row_id + "\n")

    for lines in killed_at_each_line(append, [optkit.store]):
        found = store.read()
        assert found.problems == []
        assert len(found.rows) <= 3 + lines + 1
        assert [row["n"] for row in found.rows[:3]] == [0, 1, 2]
    ids = [row["id"] for row in store.read().rows]
    assert len(set(ids)) == len(ids) >= 4
    assert set(acknowledged.read_text().split()) <= set(ids)


def test_kills_in_the_middle_of_large_appends(store):
    for _ in range(20):
        told, tell = os.pipe()

        def append(tell: int = tell) -> None:
            for number in range(10**9):
                os.write(tell, store.append({"n": number, "text": "x" * 200_000}).encode())

        child = fork(append)
        os.close(tell)
        acknowledged = [os.read(told, 12).decode() for _ in range(2)]
        os.kill(child, signal.SIGKILL)
        assert exit_status(child) == -signal.SIGKILL
        os.close(told)
        after = store.append({"n": "after"})
        found = store.read()
        assert {*acknowledged, after} <= {row["id"] for row in found.rows}
        assert len(found.problems) <= 1  # the row that was being written
        store.path.unlink()


@pytest.mark.parametrize("room", [0, 1, 65, 100])
def test_on_a_full_disk_the_file_is_as_before(store, room):
    rows = filled(store)
    before = store.path.read_bytes()
    with file_size_limit(len(before) + room), pytest.raises(OptkitError, match="record not kept: .*OPTKIT_RECORDS_DIR"):
        store.append({"text": "x" * 1000})
    assert store.path.read_bytes() == before
    store.append({"n": "room again"})
    assert store.read().rows[:-1] == rows


def test_a_disk_that_fills_up_loses_no_acknowledged_row(tmp_path):
    with file_system(tmp_path / "disk", "200k"):
        store = RecordStore(tmp_path / "disk" / "records")
        ids = []
        with pytest.raises(OptkitError, match="record not kept: .*No space left on device"):
            for number in range(1000):
                ids.append(store.append({"n": number, "text": "x" * 1500}))
        assert len(ids) > 50
        with pytest.raises(OptkitError, match="No space left"):
            store.append({"n": "again", "text": "x" * 10_000})
        rows, problems = store.read()
        assert ([row["id"] for row in rows], problems) == (ids, [])


def test_where_nothing_can_be_written_or_read_one_line_says_so(place):
    (place / "file").touch()
    with pytest.raises(OptkitError, match="record not kept"):
        RecordStore(place / "file").append({})
    with pytest.raises(OptkitError, match="records not read: .*Not a directory"):
        RecordStore(place / "file").read()
    for name, make in (("link", lambda path: path.symlink_to(place / "file")), ("pipe", os.mkfifo), ("folder", os.mkdir)):
        store = RecordStore(place / name)
        store.folder.mkdir()
        make(store.path)
        for use in (lambda store=store: store.append({}), store.read, lambda store=store: store.latest(lambda row: True)):
            with pytest.raises(OptkitError):
                use()
    assert (place / "file").read_bytes() == b""


def test_read_only_records_are_read(place):
    store = RecordStore(place / "records")
    rows = filled(store)
    with read_only(store.folder):
        assert store.read().rows == rows
        with pytest.raises(OptkitError, match="record not kept: .*ermission denied"):
            store.append({})
