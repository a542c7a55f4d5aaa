"""optkit: which optimizations should I switch on, what does each really do on this machine, and is the model still as good?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optkit.api import Optimized, optimize, run
    from optkit.context import TrialContext
    from optkit.engine import Engine, TransformersEngine
    from optkit.errors import OptkitError, UnavailableError, UsageError
    from optkit.hookspecs import hookimpl
    from optkit.machine import Machine
    from optkit.samples import Sample
    from optkit.settings import Limit, Setting, Settings
    from optkit.sources import ModelSource
    from optkit.technique import Claims, Devices, Options, Technique

__version__ = "0.1.0"

_HOME = {
    "Claims": "technique",
    "Devices": "technique",
    "Engine": "engine",
    "Limit": "settings",
    "Machine": "machine",
    "ModelSource": "sources",
    "Optimized": "api",
    "Options": "technique",
    "OptkitError": "errors",
    "Sample": "samples",
    "Setting": "settings",
    "Settings": "settings",
    "Technique": "technique",
    "TransformersEngine": "engine",
    "TrialContext": "context",
    "UnavailableError": "errors",
    "UsageError": "errors",
    "hookimpl": "hookspecs",
    "optimize": "api",
    "run": "api",
}

__all__ = [
    "Claims",
    "Devices",
    "Engine",
    "hookimpl",
    "Limit",
    "Machine",
    "ModelSource",
    "optimize",
    "Optimized",
    "Options",
    "OptkitError",
    "run",
    "Sample",
    "Setting",
    "Settings",
    "Technique",
    "TransformersEngine",
    "TrialContext",
    "UnavailableError",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``optkit --help`` stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'optkit' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"optkit.{_HOME[name]}"), name)
    globals()[name] = value
    return value
