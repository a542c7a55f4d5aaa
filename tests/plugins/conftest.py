"""Fixtures of the technique tests: a machine, and a hand-made trial for hooks that are tried without the runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def make_trial(tmp_path: Path) -> Callable[..., Any]:
    """``make_trial(technique, options, settings={...}, task=..., tokenizer=...)`` -> ``TrialContext`` on the CPU."""

    def make(
        technique: str,
        options: Any,
        settings: dict[str, Any] | None = None,
        task: str = "generate",
        tokenizer: Any = None,
        **fields: Any,
    ) -> Any:
        from optkit.context import TrialContext
        from optkit.settings import Setting, Settings
        from optkit.sources import ModelSource

        resolved = {name: Setting(name=name, value=value, because="test", by="test") for name, value in (settings or {}).items()}
        fields.setdefault("machine", None)
        return TrialContext(
            technique=technique,
            options=options,
            settings=Settings(resolved),
            task=task,
            device="cpu",
            seed=0,
            source=ModelSource("tiny", "random", "tiny.json"),
            folder=tmp_path,
            tokenizer=tokenizer,
            **fields,
        )

    return make
