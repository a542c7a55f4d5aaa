"""The checks as a pytest class."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from optkit.testing.checking import CHECKS, result_of
from optkit.testing.subject import Subject


class TechniqueTests:
    """Subclass it and name the plugin; every check of the kit is then a test.

    ::

        class TestRounding(TechniqueTests):
            plugin = "rounding"
            options = {"bits": 4}

    A check that the technique declares in ``Technique.exceptions`` is skipped with its reason, as is one that cannot be made here.

    :cvar plugin: the technique's name, installed with its entry point.
    :cvar options: options that make it do something on a tiny model.
    :cvar partners: technique -> options: those that it is run together with; by default all that are ready and build no engine.
    """

    plugin: str
    options: dict[str, Any] = {}
    partners: dict[str, dict[str, Any]] | None = None

    @classmethod
    @functools.cache
    def subject(cls) -> Subject:
        return Subject(cls.plugin, dict(cls.options), cls.partners)

    @classmethod
    def teardown_class(cls) -> None:
        cls.subject().close()
        cls.subject.cache_clear()  # type: ignore[attr-defined]

    @pytest.mark.parametrize("check", CHECKS)
    def test_technique(self, check: str) -> None:
        result = result_of(self.subject(), check)
        if result.state in ("exception", "not checked"):
            pytest.skip(f"{result.state}: {result.detail}")
        assert result.state == "ok", f"{self.plugin}, {check}: {result.detail}"
