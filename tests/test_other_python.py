"""What one version of Python kept in the memo, another finds: with interpreters that are really there.

Only the standard library is needed to find an entry, so any interpreter will do. To write one, it gets joblib, which is Python alone as well.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optkit.memo import Memo
from optkit.memo_entry import Key

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
HERE = platform.python_version().rpartition(".")[0]
#: Folders of interpreters beside those on PATH.
USUAL = ("/usr/bin", "/usr/local/bin", "/opt/python/*/bin", "~/.pyenv/versions/*/bin", "~/.local/share/uv/python/*/bin")
#: joblib, and what newer ones no longer bring in themselves.
JOBLIB = ("joblib", "cloudpickle")
#: What JSON writers differ in: floats at their ends, negative zero, whole floats, long integers, letters outside ASCII, order of keys.
SPEC: dict[str, Any] = {
    "z": [0.1, 1e22, 5e-324, 1.7976931348623157e308, -0.0, 2.0, 1 / 3],
    "a": {"ü": "é\u2028𝄞", "n": 10**25, "none": None, "true": True},
    "": [],
}
VALUE: list[Any] = [{"text": "naïve 🙂", "nll": 0.30000000000000004}, [1e-7, 123456789.123456789], "\x00\x7f"]

FIND = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from optkit.memo import Memo
said = []
spec = json.loads(sys.argv[3])
found = Memo(Path(sys.argv[2]), warn=said.append).lookup("metrics", spec)
foreign = sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - {"optkit", "__main__"})
print(json.dumps([found and found.value, said, foreign, list(sys.version_info[:2])]))
"""
KEEP = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[4]]
from optkit.memo import Memo
value = json.loads(sys.argv[5])
print(json.dumps(Memo(Path(sys.argv[2]), warn=print).compute("metrics", lambda spec: value, json.loads(sys.argv[3]))[1].source))
"""


def answer(python: str, code: str, *arguments: str) -> Any:
    """What the code prints last, as JSON; nothing of this environment is seen by it, and no compiled file is left."""
    done = subprocess.run([python, "-I", "-B", "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def interpreter(version: str) -> str:
    """The path of a Python of this version. A shim that starts nothing is passed over."""
    places = [folder for place in USUAL for folder in sorted(Path("/").glob(os.path.expanduser(place).lstrip("/")))]
    for folder in [*os.get_exec_path(), *places]:
        found = shutil.which(f"python{version}", path=str(folder))
        if found and _version_of(found) == version:
            return found
    pytest.skip(f"no python{version} on PATH or in {', '.join(USUAL)}")


def _version_of(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


@pytest.fixture(params=[version for version in VERSIONS if version != HERE])
def python(request: pytest.FixtureRequest) -> str:
    """Each other Python that optkit works with."""
    return interpreter(request.param)


@pytest.fixture
def memo(tmp_path: Path) -> Memo:
    return Memo(tmp_path / "memo", warn=pytest.fail)


def turned_round(value: Any) -> Any:
    """The same object with its keys in another order."""
    if isinstance(value, dict):
        return {key: turned_round(value[key]) for key in reversed(value)}
    return [turned_round(item) for item in value] if isinstance(value, list) else value


def test_what_this_python_kept_another_one_finds(python: str, memo: Memo) -> None:
    memo.compute("metrics", lambda spec: VALUE, SPEC)
    found, said, foreign, version = answer(python, FIND, str(ROOT), str(memo.folder), json.dumps(turned_round(SPEC)))
    assert found == VALUE and said == []
    assert foreign == []  # a hit needs the standard library alone
    assert tuple(version) != sys.version_info[:2]


def test_what_another_python_kept_this_one_finds(python: str, memo: Memo, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for name in JOBLIB:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            (site / name).symlink_to(Path(spec.origin).parent)
    given = (str(ROOT), str(memo.folder), json.dumps(turned_round(SPEC)), str(site), json.dumps(VALUE))
    assert answer(python, KEEP, *given) == "computed"
    hit = memo.lookup("metrics", SPEC)
    assert hit is not None and hit.value == VALUE
    theirs = Path(Key.of(memo.folder, "metrics", SPEC).path).read_bytes()
    memo.compute("metrics", lambda spec: VALUE, SPEC, force=True)
    ours = Path(Key.of(memo.folder, "metrics", SPEC).path).read_bytes()
    assert without_times(theirs) == without_times(ours)


def without_times(entry: bytes) -> bytes:
    """The second line of an entry up to its times, and what comes behind them."""
    body = entry.split(b"\n", 1)[1]
    assert body.count(b',"seconds":') == 1
    return body.split(b',"seconds":')[0] + body.split(b',"value":')[1]


def test_another_python_takes_no_damaged_entry_either(python: str, memo: Memo) -> None:
    memo.compute("metrics", lambda spec: VALUE, SPEC)
    path = Path(Key.of(memo.folder, "metrics", SPEC).path)
    entry = bytearray(path.read_bytes())
    entry[-3] ^= 1
    path.write_bytes(entry)
    found, said, _, _ = answer(python, FIND, str(ROOT), str(memo.folder), json.dumps(SPEC))
    assert found is None and len(said) == 1 and "not used" in said[0]
