"""Models and samples: bundled, local folder, hub id, random weights from a config; JSONL, plain text, Hugging Face datasets.

Naming and fingerprinting a source needs no torch; loading it does, and happens in the trial's process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from optkit.canonical import digest
from optkit.errors import OptkitError, UnavailableError, UsageError

#: Characters of one sample when a plain text file is cut at paragraphs.
TEXT_SAMPLE_CHARACTERS = 2000


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    :ivar kind: ``folder``, ``hub`` or ``random``.
    :ivar location: the folder, the hub id, or the ``config.json`` file.
    :ivar shrink: build a two-layer version of the same architecture (random weights where the layers were cut from a config).
    """

    name: str
    kind: str
    location: str
    shrink: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the model's values: digests of the folder's files, the hub's commit, or the config and "random"."""
        base: dict[str, Any] = {"kind": self.kind, "shrink": self.shrink}
        if self.kind == "folder":
            return base | {"files": folder_digest(Path(self.location))}
        if self.kind == "random":
            return base | {"config": hashlib.sha256(Path(self.location).read_bytes()).hexdigest()}
        return base | {"id": self.location, "commit": hub_commit(self.location)}


@dataclass
class Sample:
    """One thing to generate from or to score. Either ``text`` alone (scored whole), or ``prompt`` with or without ``answer``."""

    id: str
    prompt: str | None = None
    answer: str | None = None
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    #: filled in the trial's process: token ids of the prompt (with the beginning-of-text id) and of the answer (with end-of-text).
    prompt_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return digest([self.prompt, self.answer, self.text, self.messages])

    @property
    def start(self) -> int:
        """The first scored position: the answer's, or the second token where a prompt alone is scored."""
        return len(self.prompt_ids) if self.answer_ids else 1

    def __len__(self) -> int:
        """Tokens, once encoded."""
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class SampleSet:
    """Samples with a name and a digest over their contents."""

    name: str
    samples: list[Sample]

    @property
    def digest(self) -> str:
        return digest([sample.digest for sample in self.samples])

    @property
    def has_answers(self) -> bool:
        return any(sample.answer is not None for sample in self.samples)

    @property
    def has_prompts(self) -> bool:
        return any(sample.text is None for sample in self.samples)


# ---------------------------------------------------------------- models


def model_source(text: str | None, *, shrink: bool = False) -> ModelSource:
    """The source that a user means: nothing or ``bundled``, a folder, ``random:CONFIG.json``, or a hub id.

    :raises UsageError: for a path that does not exist or holds no ``config.json``.
    """
    if text in (None, "", "bundled"):
        return ModelSource("bundled", "folder", str(bundled_folder()), shrink)
    assert text is not None
    if text.startswith("random:"):
        path = Path(text.removeprefix("random:")).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise UsageError(f"'{path}' is not a file; random: takes a model's config.json")
        check_config(path)
        return ModelSource(f"random:{path.stem if path.stem != 'config' else path.parent.name}", "random", str(path.resolve()), shrink)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"'{path}' has no config.json; a local model is a Hugging Face folder")
        check_config(path / "config.json")
        return ModelSource(path.resolve().name, "folder", str(path.resolve()), shrink)
    if text.startswith((".", "/", "~")) or path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise UsageError(f"no model folder at '{text}'; give a Hugging Face folder, a hub id, random:CONFIG.json, or 'bundled'")
    return ModelSource(text, "hub", text, shrink)


def bundled_folder() -> Path:
    """The folder of the model that comes with optkit."""
    return Path(str(resources.files("optkit") / "bundled"))


def check_config(path: Path) -> dict[str, Any]:
    """The parsed ``config.json``. :raises UsageError: when it is not one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
    from optkit.folders import cache_folder, make_cache_folder

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
        make_cache_folder(folder)
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


def hub_offline_message(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160]
    return f"cannot fetch '{name}' from the hub ({reason}); check the name and the network, or give a local folder with --model"


# ---------------------------------------------------------------- samples


def sample_set(text: str | None, source: ModelSource, *, limit: int | None = None) -> SampleSet:
    """Samples that a user means.

    ``bundled`` or ``bundled:names``; ``random:64x128`` (64 prompts of 128 random tokens, the default for random weights);
    a ``.jsonl`` or ``.json`` file with ``prompt``/``messages``/``text`` and ``answer``; a plain text file; ``hf:NAME[:SPLIT]``.
    """
    if not text:
        text = "random:16x64" if source.kind == "random" else "bundled"
    if text.startswith("random:"):
        samples = random_samples(text.removeprefix("random:"))
    elif text == "bundled" or text.startswith("bundled:"):
        samples = bundled_samples(text.partition(":")[2] or "seeds")
    elif text.startswith("hf:"):
        samples = dataset_samples(text.removeprefix("hf:"), limit)
    else:
        samples = file_samples(Path(text).expanduser())
    if limit is not None:
        samples = samples[:limit]
    if not samples:
        raise UsageError(f"'{text}' holds no samples")
    return SampleSet(text, samples)


def bundled_samples(name: str) -> list[Sample]:
    folder = bundled_folder() / "samples"
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise UsageError(f"no bundled samples named '{name}'; there are {', '.join(sorted(file.stem for file in folder.glob('*.jsonl')))}")
    return jsonl_samples(path)


def random_samples(shape: str) -> list[Sample]:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", shape)
    if not match or not int(match[1]) or not int(match[2]):
        raise UsageError(f"random:{shape} is not COUNTxTOKENS, such as random:64x128")
    count, tokens = int(match[1]), int(match[2])
    return [Sample(id=f"random/{index}", prompt="", extra={"random_tokens": tokens}) for index in range(count)]


def file_samples(path: Path) -> list[Sample]:
    if not path.is_file():
        raise UsageError(f"no samples at '{path}'; give a .jsonl or text file, bundled, random:COUNTxTOKENS, or hf:NAME")
    if path.suffix in (".jsonl", ".json"):
        return jsonl_samples(path)
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", read_text(path)) if part.strip()]
    return [Sample(id=f"{path.name}/{index}", text=text) for index, text in enumerate(gather(paragraphs))]


def gather(paragraphs: Iterable[str]) -> list[str]:
    """Paragraphs joined until a sample has about 2,000 characters."""
    texts, current = [], ""
    for paragraph in paragraphs:
        if current and len(current) + len(paragraph) > TEXT_SAMPLE_CHARACTERS:
            texts.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return [*texts, current] if current else texts


def jsonl_samples(path: Path) -> list[Sample]:
    """One JSON object a line (or one JSON list). :raises UsageError: with the file and the line."""
    content = read_text(path)
    try:
        rows = json.loads(content) if path.suffix == ".json" else None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    if rows is not None and not isinstance(rows, list):
        raise UsageError(f"{path}: a JSON file of samples is a list of objects")
    numbered = enumerate(rows, 1) if rows is not None else ((n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip())
    return [sample_from(row, f"{path.name}:{number}") for number, row in numbered]


def sample_from(row: Any, where: str) -> Sample:
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: not valid JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a sample is an object with 'prompt', 'messages' or 'text'")
    prompt, answer, text, messages = (row.get(name) for name in ("prompt", "answer", "text", "messages"))
    if prompt is not None and text is None and messages is None and isinstance(prompt, str):
        kind = {"prompt": prompt}
    elif isinstance(messages, list) and messages and prompt is None and text is None:
        kind = {"messages": check_messages(messages, where)}
    elif isinstance(text, str) and prompt is None and messages is None:
        kind = {"text": text}
    else:
        raise UsageError(f"{where}: a sample has exactly one of 'prompt' (text), 'messages' (a list) and 'text' (text)")
    if answer is not None and not isinstance(answer, str):
        answer = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    return Sample(id=str(row.get("id", where))[:200], answer=answer if "text" not in kind else None, **kind)


def check_messages(messages: list[Any], where: str) -> list[dict[str, str]]:
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UsageError(f"{where}: each message has a 'role' and a 'content', both text")
    return messages


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read '{path}' as UTF-8 text: {error}") from None


def dataset_samples(name: str, limit: int | None) -> list[Sample]:
    """Rows of a Hugging Face dataset that have the fields of a sample. :raises UnavailableError: without the extra or the network."""
    try:
        import datasets
    except ImportError:
        raise UnavailableError("hf: samples need the library datasets: pip install 'optkit[eval]'") from None
    name, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "test")
    except Exception as error:  # the library raises many kinds
        raise UnavailableError(f"cannot load the dataset '{name}': {' '.join(str(error).split())[:200]}") from None
    return [sample_from(dict(row), f"{name}:{index}") for index, row in enumerate(rows.select(range(min(limit or len(rows), len(rows)))))]
