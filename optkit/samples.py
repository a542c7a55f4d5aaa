"""Samples: bundled, JSONL, plain text, Hugging Face datasets, random tokens. Reading them needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optkit.canonical import digest, parse_foreign
from optkit.errors import UnavailableError, UsageError, quoted
from optkit.sources import ModelSource, bundled_folder, user_path

#: Characters of one sample when a plain text file is cut at paragraphs.
TEXT_SAMPLE_CHARACTERS = 2000
#: Bytes of a file of samples, which is read whole, and samples and tokens of ``random:``.
LARGEST_FILE = 2**30
MOST_RANDOM = (100_000, 1_000_000)
#: Samples beyond those that are evaluated that techniques may calibrate on.
CALIBRATION_SAMPLES = 64


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
        drawn = self.id if self.extra else None  # random tokens are drawn from the id
        return digest([self.prompt, self.answer, self.text, self.messages, self.extra, drawn])

    @property
    def start(self) -> int:
        """The first scored position: the answer's, or the second token where a prompt alone is scored."""
        return len(self.prompt_ids) if self.answer_ids else 1

    def __len__(self) -> int:
        """Tokens, once encoded."""
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class SampleSet:
    """Samples with a name and a digest over their contents. ``calibration`` are others that are never evaluated."""

    name: str
    samples: list[Sample]
    calibration: list[Sample] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return digest([sample.digest for sample in self.samples])

    @property
    def has_prompts(self) -> bool:
        return any(sample.text is None for sample in self.samples)


def sample_set(text: str | None, source: ModelSource, *, limit: int | None = None) -> SampleSet:
    """Samples that a user means.

    ``bundled`` or ``bundled:names``; ``random:64x128`` (64 prompts of 128 random tokens; 16 of 64 is the default for random weights);
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
        samples = file_samples(user_path(text))
    if not samples:
        raise UsageError(f"'{text}' holds no samples")
    evaluated = samples[:limit] if limit is not None else samples
    return SampleSet(text, evaluated, (samples[len(evaluated) :] or others(text))[:CALIBRATION_SAMPLES])


def others(text: str) -> list[Sample]:
    """Samples beside those that are evaluated, where a source can give more of its kind."""
    if text.startswith("random:"):
        return random_samples(text.removeprefix("random:"), "calibration")
    return []


def bundled_samples(name: str) -> list[Sample]:
    folder = bundled_folder() / "samples"
    path = folder / f"{name}.jsonl"
    if not re.fullmatch(r"[a-z]{1,40}", name) or not path.is_file():
        raise UsageError(
            f"no bundled samples named {quoted(name)}; there are {', '.join(sorted(file.stem for file in folder.glob('*.jsonl')))}"
        )
    return jsonl_samples(path)


def random_samples(shape: str, name: str = "random") -> list[Sample]:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", shape)
    if not match or not int(match[1]) or not int(match[2]):
        raise UsageError(f"random:{shape} is not COUNTxTOKENS, such as random:64x128")
    count, tokens = int(match[1]), int(match[2])
    if count > MOST_RANDOM[0] or tokens > MOST_RANDOM[1]:
        raise UsageError(f"random:{shape} is more than {MOST_RANDOM[0]:,} samples or {MOST_RANDOM[1]:,} tokens each")
    return [Sample(id=f"{name}/{index}", prompt="", extra={"random_tokens": tokens}) for index in range(count)]


def file_samples(path: Path) -> list[Sample]:
    if not path.is_file():
        raise UsageError(f"no samples at {quoted(str(path))}; give a .jsonl or text file, bundled, random:COUNTxTOKENS, or hf:NAME")
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
        rows = parse_foreign(content) if path.suffix == ".json" else None
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    if rows is not None and not isinstance(rows, list):
        raise UsageError(f"{path}: a JSON file of samples is a list of objects")
    numbered = enumerate(rows, 1) if rows is not None else ((n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip())
    return [sample_from(row, f"{path.name}:{number}") for number, row in numbered]


def sample_from(row: Any, where: str) -> Sample:
    if isinstance(row, str):
        try:
            row = parse_foreign(row)
        except ValueError as error:
            raise UsageError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a sample is an object with 'prompt', 'messages' or 'text'")
    prompt, answer, text, messages = (row.get(name) for name in ("prompt", "answer", "text", "messages"))
    if prompt is not None and text is None and messages is None and isinstance(prompt, str):
        kind: dict[str, Any] = {"prompt": prompt}
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
    """:raises UsageError: for what is no UTF-8 or has more bytes than ``LARGEST_FILE``."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UsageError(f"'{path}' has {path.stat().st_size:,} bytes, more than the {LARGEST_FILE:,} that are read; split the file")
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
