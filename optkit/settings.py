"""Settings: what techniques want of the loader, the engine and the batches, resolved once and read by whoever owns the role.

A setting is written in ``configure`` and read later, so the order of techniques never matters. Each value carries its reason and
who asked for it. Precedence: flag > must > profile > prefer > default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from optkit.errors import UsageError, did_you_mean

#: name -> (default, meaning). ``None`` as a default means "the model's own".
KNOWN: dict[str, tuple[Any, str]] = {
    "load.dtype": (None, "dtype of the weights: float32, bfloat16, float16; default the checkpoint's"),
    "load.attention": ("sdpa", "attention implementation, always passed explicitly"),
    "load.device_map": (None, "where modules are placed: a device, 'auto', or a mapping module -> device"),
    "load.trust_remote_code": (False, "run Python files of the model's folder or repository"),
    "generate.cache": ("dynamic", "KV cache: dynamic, static, sliding, quantized, offloaded, off"),
    "generate.cache_bits": (None, "bits of a quantized KV cache: 2, 4 or 8"),
    "generate.cache_window": (None, "tokens that a sliding KV cache keeps"),
    "generate.max_new_tokens": (64, "upper bound of new tokens a prompt"),
    "generate.do_sample": (False, "draw tokens instead of taking the most probable one"),
    "generate.temperature": (None, "divisor of the logits before sampling"),
    "generate.top_k": (None, "sample among the k most probable tokens"),
    "generate.top_p": (None, "sample among the tokens that hold this probability"),
    "generate.repetition_penalty": (None, "divisor of the logits of tokens that were already used"),
    "generate.no_repeat_ngram_size": (None, "n-grams of this size appear once (ruins structured answers)"),
    "generate.num_beams": (1, "beams of beam search"),
    "generate.length_penalty": (None, "exponent on the length in beam search"),
    "generate.prompt_lookup_tokens": (None, "tokens proposed from the prompt a step (speculative decoding)"),
    "generate.prompt_lookup_ngram": (2, "newest tokens, at most, that a proposal's place in the text must share"),
    "generate.slots": (None, "sequences decoded at once, at most: a slot whose text has ended takes the next prompt (continuous batching)"),
    "batch.size": (8, "samples a batch"),
    "batch.max_length": (None, "tokens a sample is cut to; default the model's own limit"),
    "train.learning_rate": (None, "Trainer's learning_rate"),
    "train.optim": (None, "Trainer's optim"),
}

Check = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low:,} to {high:,}"


def _number(low: float, high: float) -> Check:
    """Above ``low``, up to ``high``."""
    return (
        lambda value: type(value) in (int, float) and math.isfinite(value) and low < value <= high,
        f"a number above {low:g}, at most {high:g}",
    )


def _one_of(*values: Any) -> Check:
    return lambda value: any(type(value) is type(other) and value == other for other in values), ", ".join(map(str, values))


#: name -> which values it takes, and that in words. ``None`` is taken where it is the default. A name that is not here takes any.
ACCEPTS: dict[str, Check] = {
    "load.dtype": _one_of("float32", "bfloat16", "float16", "float64"),
    "load.attention": (
        lambda value: isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_.-]{0,60}", value) is not None,
        "the name of an implementation that is installed, not a kernel of the hub",
    ),
    "load.device_map": (lambda value: isinstance(value, str | dict), "a device, auto, or a mapping module -> device"),
    "load.trust_remote_code": _one_of(True, False),
    "generate.cache": _one_of("dynamic", "static", "sliding", "quantized", "offloaded", "off"),
    "generate.cache_bits": _one_of(2, 4, 8),
    "generate.cache_window": _whole(1, 10**8),
    "generate.max_new_tokens": _whole(1, 10**8),
    "generate.do_sample": _one_of(True, False),
    "generate.temperature": _number(0, 1e6),
    "generate.top_k": _whole(1, 10**8),
    "generate.top_p": _number(0, 1),
    "generate.repetition_penalty": _number(0, 1e6),
    "generate.no_repeat_ngram_size": _whole(1, 10**6),
    "generate.num_beams": _whole(1, 10**4),
    "generate.length_penalty": _number(-1e6, 1e6),
    "generate.prompt_lookup_tokens": _whole(1, 10**6),
    "generate.prompt_lookup_ngram": _whole(1, 10**6),
    "generate.slots": _whole(1, 10**6),
    "batch.size": _whole(1, 10**6),
    "batch.max_length": _whole(1, 10**8),
}

Strength = Literal["flag", "must", "profile", "prefer", "default"]
_RANK: dict[str, int] = {"flag": 0, "must": 1, "profile": 2, "prefer": 3, "default": 4}


class Setting(BaseModel):
    """One wish: ``value`` for the setting ``name``, with the reason. ``by`` is filled in by the planner."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: Any
    because: str
    by: str = ""
    strength: Strength = "prefer"


class Limit(BaseModel):
    """The values of a setting that a technique can live with: an ``allowed`` list, or a ``maximum``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    allowed: tuple[Any, ...] | None = None
    maximum: float | None = None
    because: str
    by: str = ""

    def admits(self, value: Any) -> bool:
        if self.allowed is not None and value not in self.allowed:
            return False
        return self.maximum is None or value is None or value <= self.maximum

    def describe(self) -> str:
        if self.allowed is not None:
            return "one of " + ", ".join(str(value) for value in self.allowed)
        return f"at most {self.maximum:g}"


class Settings(Mapping[str, Any]):
    """The resolved settings: a read-only mapping from name to value, with ``why(name)`` for the reason."""

    def __init__(self, resolved: Mapping[str, Setting]):
        self._resolved = dict(resolved)

    def __getitem__(self, name: str) -> Any:
        if name in self._resolved:
            return self._resolved[name].value
        return KNOWN[check_name(name)][0]

    def __iter__(self) -> Iterator[str]:
        return iter(KNOWN)

    def __len__(self) -> int:
        return len(KNOWN)

    def chosen(self) -> list[Setting]:
        """The settings that somebody asked for, in order of their names."""
        return [self._resolved[name] for name in sorted(self._resolved)]

    def why(self, name: str) -> str:
        setting = self._resolved.get(name)
        return f"{setting.because} ({setting.by})" if setting else "default"

    def to_json(self) -> list[dict[str, Any]]:
        return [setting.model_dump(mode="json") for setting in self.chosen()]

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> Settings:
        return cls({row["name"]: Setting(**row) for row in rows})


def check_name(name: str) -> str:
    """:raises UsageError: for a setting that does not exist."""
    if name not in KNOWN:
        raise UsageError(f"unknown setting '{name}'{did_you_mean(name, KNOWN)} known: {', '.join(KNOWN)}")
    return name


def wrong_value(wish: Setting) -> str:
    """Why a setting cannot have this value, or nothing."""
    accepts, words = ACCEPTS.get(check_name(wish.name), (None, ""))
    if accepts is None or accepts(wish.value) or (wish.value is None and KNOWN[wish.name][0] is None):
        return ""
    shown = repr(wish.value)
    return f"setting '{wish.name}' = {shown if len(shown) <= 80 else shown[:79] + '…'} ({wish.by or 'asked for'}): must be {words}"


def resolve(wishes: list[Setting], limits: list[Limit]) -> tuple[Settings, list[str]]:
    """Resolve all wishes. :raises UsageError: with every value that its setting cannot have.

    :return: the settings, and one sentence a conflict: two different musts (or flag against must) for one name, and values that a
        limit does not admit.
    """
    if wrong := list(dict.fromkeys(filter(None, map(wrong_value, wishes)))):
        raise UsageError("\n".join(wrong))
    conflicts: list[str] = []
    resolved: dict[str, Setting] = {}
    for name in dict.fromkeys(check_name(wish.name) for wish in wishes):
        rivals = sorted((wish for wish in wishes if wish.name == name), key=lambda wish: _RANK[wish.strength])
        winner = resolved[name] = rivals[0]
        for other in rivals[1:]:
            if _RANK[other.strength] <= _RANK["must"] and other.value != winner.value:
                conflicts.append(
                    f"setting '{name}': {winner.by} asks for {winner.value} ({winner.because}), "
                    f"{other.by} for {other.value} ({other.because}); drop one of them or change its option"
                )
    settings = Settings(resolved)
    for limit in limits:
        value = settings[check_name(limit.name)]
        if not limit.admits(value):
            source = resolved[limit.name].by if limit.name in resolved else "the default"
            conflicts.append(
                f"setting '{limit.name}' is {value} ({source}), and {limit.by} needs {limit.describe()}: {limit.because}; "
                f"set it with --set {limit.name}=…, or leave out {limit.by}"
            )
    return settings, conflicts
