"""Models: bundled, local folder, hub id, random weights from a config.

Naming and fingerprinting a source needs no torch; loading it does, and happens in the trial's process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from optkit import foreign_code
from optkit.canonical import digest, parse_foreign
from optkit.errors import UnavailableError, UsageError, quoted

#: How long the hub may take to say which commit is the newest.
HUB_TIMEOUT_SECONDS = 10.0
HUB_ID = re.compile(r"\w[\w.-]{0,95}(?<![.-])(/\w[\w.-]{0,95}(?<![.-]))?", re.ASCII)
#: Bytes of a ``config.json``.
LARGEST_CONFIG = 2**24


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    :ivar kind: ``folder``, ``hub`` or ``random``.
    :ivar location: the folder, the hub id, or the ``config.json`` file.
    :ivar revision: the commit of a hub model, once it is known.
    :ivar shrink: build a two-layer version of the same architecture (random weights where the layers were cut from a config).
    """

    name: str
    kind: str
    location: str
    shrink: bool = False
    revision: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the model's values: digests of the folder's files, the hub's commit, or the config and "random"."""
        base: dict[str, Any] = {"kind": self.kind, "shrink": self.shrink}
        if self.kind == "folder":
            return base | {"files": folder_digest(Path(self.location))}
        if self.kind == "random":
            return base | {"config": hashlib.sha256(Path(self.location).read_bytes()).hexdigest()}
        return base | {"id": self.location, "commit": self.revision}

    def resolved(self) -> ModelSource:
        """This source with its commit: the cached one, else the hub's newest, which is asked for here and nowhere else.

        :raises UnavailableError: when the hub does not answer, or knows no such model.
        """
        if self.kind != "hub" or self.revision:
            return self
        return replace(self, revision=hub_commit(self.location) or newest_commit(self.location))


def model_source(text: str | None, *, shrink: bool = False) -> ModelSource:
    """The source that a user means: nothing or ``bundled``, a folder, ``random:CONFIG.json``, or a hub id.

    :raises UsageError: for a path that does not exist or holds no ``config.json``.
    """
    if text in (None, "", "bundled"):
        return ModelSource("bundled", "folder", str(bundled_folder()), shrink)
    assert text is not None
    if text.startswith("random:"):
        path = user_path(text.removeprefix("random:"))
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise UsageError(f"{quoted(str(path))} is not a file; random: takes a model's config.json")
        check_config(path)
        name = path.stem if path.stem != "config" else path.resolve().parent.name
        return ModelSource(f"random:{name}", "random", str(path.resolve()), shrink)
    path = user_path(text)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{quoted(str(path))} has no config.json; a local model is a Hugging Face folder")
        check_config(path / "config.json")
        foreign_code.check_folder(path)
        return ModelSource(path.resolve().name, "folder", str(path.resolve()), shrink)
    if path.exists() or not HUB_ID.fullmatch(text):
        raise UsageError(f"no model folder at {quoted(text)}; give a Hugging Face folder, a hub id, random:CONFIG.json, or 'bundled'")
    return ModelSource(text, "hub", text, shrink)


def user_path(text: str) -> Path:
    """The path that a user names, whether something is there or not.

    :raises UsageError: for what can be no path here: too long, with a NUL, below a file or a folder that may not be read.
    """
    try:
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{quoted(text)} is no path that can be read: {reason}") from None
    return path


def bundled_folder() -> Path:
    """The folder of the model that comes with optkit."""
    return Path(str(resources.files("optkit") / "bundled"))


def check_config(path: Path) -> dict[str, Any]:
    """The parsed ``config.json``. :raises UsageError: when it is not one."""
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        config = parse_foreign(path.read_text(encoding="utf-8"), finite=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' is not readable JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UsageError(f"'{path}' names no model_type; it is not a transformers config.json")
    return config


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of a model folder's files.

    Contents are read once: a digest is kept under the file's path, size, modification time and inode, and the list of them is cheap.
    """
    rows = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py"):
            rows.append([str(path.relative_to(folder)), file_digest(path)])
    return digest(rows)


def file_digest(path: Path) -> str:
    from optkit.folders import cache_folder, make_private_folder

    state = path.stat()
    key = digest([str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino])
    folder = cache_folder() / "digests"
    try:
        known = (folder / key).read_text(encoding="ascii")
        if len(known) == 64:
            return known
    except (OSError, ValueError):
        pass
    with path.open("rb") as handle:
        value = hashlib.file_digest(handle, "sha256").hexdigest()
    try:
        make_private_folder(folder)
        temporary = folder / f"{key}.{os.getpid()}"
        temporary.write_text(value, encoding="ascii")
        temporary.replace(folder / key)
    except OSError:
        pass  # a digest that cannot be kept is computed again
    return value


def hub_commit(name: str) -> str | None:
    """The commit of a hub model in the local cache, without network; ``None`` when it is not there."""
    root = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface")) / "hub")
    reference = root / f"models--{name.replace('/', '--')}" / "refs" / "main"
    try:
        return reference.read_text(encoding="ascii").strip()
    except OSError:
        return None


def newest_commit(name: str) -> str:
    """The newest commit of a hub model. :raises UnavailableError: after one short try."""
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UnavailableError(f"'{name}' is not in the hub's local cache, and HF_HUB_OFFLINE is set; give a local folder with --model")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/api/models/{name}")
    if os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS) as answer:
            return str(json.loads(answer.read(1 << 24))["sha"])
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError(hub_offline_message(name, error)) from None


def hub_offline_message(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160]
    return f"cannot fetch '{name}' from the hub ({reason}); check the name and the network, or give a local folder with --model"
