"""``optkit plugins new``: a complete distribution with a technique that works, to be changed into the author's own."""

from __future__ import annotations

import datetime
import re
from importlib import resources
from pathlib import Path

import optkit
from optkit.errors import OptkitError, UsageError

#: Template -> where it is written. ``@NAME@`` and its like are replaced in both.
FILES = {
    "pyproject.txt": "pyproject.toml",
    "plugin.txt": "optkit_@MODULE@/__init__.py",
    "test_plugin.txt": "tests/test_@MODULE@.py",
    "readme.txt": "README.md",
    "workflow.txt": ".github/workflows/test.yml",
    "license.txt": "LICENSE",
    "gitignore.txt": ".gitignore",
}
LONGEST = 41


def write_distribution(name: str, folder: str = ".") -> Path:
    """Write ``optkit-NAME`` into ``folder``; gives its path.

    :raises UsageError: for a name that no technique can have or that one has here, and where the folder is already there.
    """
    check_name(name)
    target = Path(folder) / f"optkit-{name}"
    if target.exists():
        raise UsageError(f"'{target}' is already there; choose another name, or another --folder")
    module = name.replace("-", "_")
    words = {
        "@NAME@": name,
        "@MODULE@": module,
        "@CLASS@": "".join(part.capitalize() for part in name.split("-")),
        "@OPTKIT@": optkit.__version__,
        "@YEAR@": str(datetime.date.today().year),
    }
    for template, path in FILES.items():
        text = (resources.files("optkit.scaffold") / "template" / template).read_text(encoding="utf-8")
        file = target / _filled(path, words)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_filled(text, words), encoding="utf-8")
        except OSError as error:
            raise OptkitError(f"cannot write {file}: {error.strerror or error}") from None
    return target


def check_name(name: str) -> None:
    """:raises UsageError: for a name that no technique can have, or that one has already."""
    from optkit.plugin_loading import entry_points
    from optkit.registry import GROUP

    if name.startswith("optkit-"):
        raise UsageError(f"{ascii(name[:60])}: give the technique's name alone; its distribution is called optkit-NAME by itself")
    if len(name) > LONGEST or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name, re.ASCII):
        rule = f"lower-case letters, digits and single hyphens, at most {LONGEST} of them"
        raise UsageError(f"{ascii(name[:60])} cannot be a technique's name: {rule}, such as my-technique")
    taken = next((point.distribution for point in entry_points(GROUP, []) if point.name == name), None)
    if taken:
        raise UsageError(f"'{name}' is already a technique of {taken}; two of one name exclude each other, so choose another")


def _filled(text: str, words: dict[str, str]) -> str:
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text
