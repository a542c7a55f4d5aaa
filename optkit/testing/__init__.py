"""The kit with which a plugin's author tests a plugin: checks that every technique must pass, tiny models, whole runs.

| name | what |
|---|---|
| ``TechniqueTests`` | a pytest class: subclass it, name the plugin, and get all checks |
| ``check_technique`` | the same checks as a function; ``optkit plugins check`` prints what it gives |
| ``tiny_model``, ``save_tiny_model``, ``KINDS`` | models of four architectures, small enough for a test |
| ``prompts``, ``plain_greedy``, ``plain_scores`` | token ids, and what transformers alone makes of them |
| ``optkit.testing.fixtures`` | the pytest fixture ``optkit_run``, which drives whole runs |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optkit.testing.checking import Result, check_technique
    from optkit.testing.models import KINDS, plain_greedy, plain_scores, prompts, save_tiny_model, tiny_model
    from optkit.testing.pytest_class import TechniqueTests

_HOME = {
    "KINDS": "models",
    "Result": "checking",
    "TechniqueTests": "pytest_class",
    "check_technique": "checking",
    "plain_greedy": "models",
    "plain_scores": "models",
    "prompts": "models",
    "save_tiny_model": "models",
    "tiny_model": "models",
}

__all__ = [
    "KINDS",
    "Result",
    "TechniqueTests",
    "check_technique",
    "plain_greedy",
    "plain_scores",
    "prompts",
    "save_tiny_model",
    "tiny_model",
]


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used: the checks need no pytest, and the import checks no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'optkit.testing' has no attribute '{name}'")
    return getattr(importlib.import_module(f"optkit.testing.{_HOME[name]}"), name)
