"""Where a command's options come from: flag > OPTKIT_* > ./optkit.toml > [tool.optkit] of ./pyproject.toml > profile > default."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from optkit.errors import UsageError, did_you_mean, quoted

#: Keys of the files, named as the flags are.
KEYS = (
    "profile", "plugins", "no-plugin", "set", "model", "task", "samples", "limit", "repeats", "seed", "each", "reference", "thorough", "shrink",
    "metric", "cache-dir", "cache-max-age", "timeout", "format", "profiles-dir", "store-text",
)  # fmt: skip
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and where each came from. :raises UsageError: with every unknown key at once."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for path, table in ((folder / "pyproject.toml", ("tool", "optkit")), (folder / "optkit.toml", ())):
        found = _table(path, table)
        label = f"{path.name}" + (f" [{'.'.join(table)}]" if table else "")
        for key, value in found.items():
            if key not in KEYS:
                problems.append(f"{label}: unknown key '{key}'{did_you_mean(key, KEYS)}")
            values[key.replace("-", "_")] = value
            origins[key.replace("-", "_")] = label
    if problems:
        raise UsageError("\n".join(problems) + f"\nknown keys: {', '.join(KEYS)}")
    return values, origins


def _table(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path.name}: {' '.join(str(error).split())[:200]}") from None
    for key in keys:
        content = content.get(key, {}) if isinstance(content, dict) else {}
    return content if isinstance(content, dict) else {}


def parse_pairs(pairs: list[str]) -> dict[str, Any]:
    """``["nf4.blocksize=64"]`` -> values in the types that they read as: numbers, booleans, text. :raises UsageError:"""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or "." not in key:
            raise UsageError(f"--set {quoted(pair)[1:-1]}: write TECHNIQUE.OPTION=VALUE or GROUP.SETTING=VALUE, such as nf4.blocksize=64")
        values[key.strip()] = parse_value(text.strip())
    return values


def parse_value(text: str) -> Any:
    if len(text) > 1000:
        raise UsageError("--set: a value has at most 1,000 characters")
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?((\d+\.\d*|\.\d+)([eE][+-]?\d{1,3})?|\d+[eE][+-]?\d{1,3})", text):
        return float(text)
    return text


def flatten(table: dict[str, Any]) -> list[str]:
    """``{"name": {"option": 64}}`` or ``{"name.option": 64}`` of a file -> ``["name.option=64"]``."""
    pairs = []
    for key, value in table.items():
        if isinstance(value, dict):
            pairs += [f"{key}.{pair}" for pair in flatten(value)]
        else:
            pairs.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return pairs


def parse_duration(text: str) -> float:
    """``30d``, ``12h``, ``90`` (seconds) -> seconds. :raises UsageError:"""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*([smhdw]?)\s*", text)
    if not match:
        raise UsageError(f"'{text}' is no duration; write 90s, 15m, 12h, 30d or 2w")
    return float(match[1]) * _UNITS[match[2] or "s"]
