"""What the files of a model's folder ask to be run, imported or fetched. None of it happens unless the user says so, and all is named.

transformers is told so explicitly where a model is loaded (``optkit.loading``); here what it would leave out in silence is found, and
what it would do in silence is refused. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optkit.canonical import parse_foreign
from optkit.errors import UsageError, quoted

#: Files that libraries read beside the weights, and the keys in them that name Python code, at any depth.
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
CODE_KEYS = frozenset({"auto_map", "custom_generate", "custom_pipelines", "use_kernels", "kernel_config"})
#: Keys that name an implementation: one of the hub's where the value holds a slash.
IMPLEMENTATION_KEYS = frozenset({"attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"})
LARGEST = 2**26


def refused(folder: Path) -> str:
    """One line that names all that is not run, or nothing."""
    found = [f"{name}: {key}" for name in FILES for key in dict.fromkeys(_keys(_read(folder / name)))]
    if (folder / "custom_generate" / "generate.py").exists():
        found.append("custom_generate/generate.py")
    if not found:
        return ""
    return f"the model's folder names code, which is neither run nor fetched ({', '.join(found)}); load.trust_remote_code allows it"


def check_folder(folder: Path) -> None:
    """:raises UsageError: where loading would take something else than this folder's own weights without a word."""
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            f"{quoted(str(folder), 200)} holds an adapter beside the model (adapter_config.json), which transformers would add in silence; "
            "move the adapter's files to a folder of their own"
        )
    config = _read(folder / "config.json")
    names = [config.get("transformers_weights")] if isinstance(config, dict) else []
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        content = _read(folder / index)
        parts = content.get("weight_map") if isinstance(content, dict) else None
        names += sorted({str(name) for name in parts.values()}) if isinstance(parts, dict) else []
    for name in names:
        if name is not None and (not isinstance(name, str) or "/" in name or "\\" in name or name in (".", "..")):
            raise UsageError(f"{quoted(str(folder), 200)} takes weights from {quoted(str(name))}, which is no file of the folder itself")


def _read(path: Path) -> Any:
    """The file's JSON, ``None`` if it is not there; ``UsageError`` for what is no JSON."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        return parse_foreign(path.read_text(encoding="utf-8"), finite=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{quoted(str(path), 200)} is not readable JSON: {' '.join(str(error).split())[:200]}") from None


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for inner in value:
            yield from _keys(inner)
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if (key in CODE_KEYS and inner) or (key in IMPLEMENTATION_KEYS and "/" in str(inner)):
            yield key
        yield from _keys(inner)
