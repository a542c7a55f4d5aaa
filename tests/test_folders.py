"""Where things lie, who may read them, and which folders are optkit's own."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from optkit import folders
from optkit.errors import OptkitError
from tests.faults import run_together


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("OPTKIT_CACHE_DIR", "OPTKIT_RECORDS_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ana")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_default_places():
    assert folders.cache_folder() == Path("/home/ana/.cache/optkit")
    assert folders.records_folder() == Path("/home/ana/.local/share/optkit/records")


def test_xdg_places_unless_relative(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/x")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert folders.cache_folder() == Path("/var/tmp/x/optkit")
    assert folders.records_folder() == Path("/home/ana/.local/share/optkit/records")


def test_the_variable_goes_before_xdg_and_the_argument_before_the_variable(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/x")
    monkeypatch.setenv("OPTKIT_CACHE_DIR", "~/mine")
    monkeypatch.setenv("OPTKIT_RECORDS_DIR", "here")
    assert folders.cache_folder() == Path("/home/ana/mine")
    assert folders.cache_folder("/elsewhere") == Path("/elsewhere")
    assert folders.records_folder() == Path.cwd() / "here"


def test_a_private_folder_and_its_new_parents_are_for_the_user_alone(tmp_path):
    folders.make_private_folder(tmp_path / "a" / "b")
    assert mode(tmp_path / "a") == mode(tmp_path / "a" / "b") == 0o700


def test_a_cache_folder_is_private_and_tagged(tmp_path):
    folder = tmp_path / "optkit" / "memo"
    assert not folders.is_cache_folder(folder)
    folders.make_cache_folder(folder)
    assert folders.is_cache_folder(folder)
    assert mode(folder) == 0o700
    assert (folder / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    folders.make_cache_folder(folder)
    assert os.listdir(folder) == ["CACHEDIR.TAG"]


def test_an_empty_folder_can_become_one_but_a_users_folder_cannot(tmp_path):
    folders.make_cache_folder(tmp_path)
    assert folders.is_cache_folder(tmp_path)
    users = tmp_path / "thesis"
    users.mkdir()
    (users / "chapter.tex").write_text("text")
    with pytest.raises(OptkitError, match="holds other files: choose an empty or a new folder"):
        folders.make_cache_folder(users)
    assert os.listdir(users) == ["chapter.tex"]


@pytest.mark.parametrize("tag", [b"", b"Signature: 8a477f597d28d172789f06886806bc55\n# created by cargo\n"])
def test_a_tag_of_somebody_else_is_not_optkits(tmp_path, tag):
    (tmp_path / "CACHEDIR.TAG").write_bytes(tag)
    assert not folders.is_cache_folder(tmp_path)
    with pytest.raises(OptkitError):
        folders.make_cache_folder(tmp_path)
    assert (tmp_path / "CACHEDIR.TAG").read_bytes() == tag


def test_a_link_to_a_tag_is_no_tag(tmp_path):
    folders.make_cache_folder(tmp_path / "cache")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "CACHEDIR.TAG").symlink_to(tmp_path / "cache" / "CACHEDIR.TAG")
    assert not folders.is_cache_folder(tmp_path / "other")


def test_many_processes_make_one_folder_at_once(tmp_path):
    for number in range(5):
        folder = tmp_path / str(number) / "memo"
        assert run_together(*[lambda folder=folder: folders.make_cache_folder(folder)] * 4) == [0, 0, 0, 0]
        assert os.listdir(folder) == ["CACHEDIR.TAG"]


def test_a_write_that_fails_leaves_the_old_file_and_no_temp_file(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "inside").touch()
    with pytest.raises(OSError):
        folders.write_durably(str(tmp_path / "place"), b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_write_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order: list[str] = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, name=name, real=real: (order.append(name), real(*arguments)))
    folders.write_durably(str(tmp_path / "file"), b"data")
    assert order == ["fsync", "rename", "fsync"]
    assert (tmp_path / "file").read_bytes() == b"data"


def test_a_lock_is_let_go_and_its_file_removed(tmp_path):
    path = str(tmp_path / "lock")
    waits: list[str] = []
    first = folders.acquire(path, lambda: waits.append("first"))
    with pytest.raises(BlockingIOError):  # whoever waits says so; here it leaves instead of waiting
        folders.acquire(path, _leave)
    folders.release(path, first)
    assert not os.path.exists(path)
    folders.release(path, folders.acquire(path, lambda: waits.append("second")))
    assert waits == []


def test_who_waited_holds_the_lock_that_others_will_ask_for(tmp_path):
    """Not the file that the holder before removed."""
    path = str(tmp_path / "lock")
    first = folders.acquire(path, _leave)
    waiting = threading.Event()
    second: list[int] = []
    waiter = threading.Thread(target=lambda: second.append(folders.acquire(path, waiting.set)))
    waiter.start()
    assert waiting.wait(60)
    folders.release(path, first)
    waiter.join()
    with pytest.raises(BlockingIOError):
        folders.acquire(path, _leave)
    folders.release(path, second[0])


def _leave() -> None:
    raise BlockingIOError


def test_only_a_lock_file_that_nobody_holds_is_removed(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    held = folders.acquire(str(tmp_path / "held.lock"), _leave)
    (tmp_path / "left.lock").touch()
    for name in ("held.lock", "left.lock", "absent.lock"):
        folders.remove_unheld(name, dir_fd=folder)
    assert os.listdir(tmp_path) == ["held.lock"]
    folders.release(str(tmp_path / "held.lock"), held)
    os.close(folder)
