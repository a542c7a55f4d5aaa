"""The pytest fixture ``optkit_run``: whole runs of the command line in a place of their own.

Switch it on in a ``conftest.py`` with ``pytest_plugins = ["optkit.testing.fixtures"]``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


class OptkitRun:
    """Calls ``optkit`` as a user would, in an empty folder, with its own memo, records, configuration and a tiny model.

    :ivar here: the working folder. :ivar site: a folder on the module path, where ``plugin`` installs.
    :ivar environment: what is added to the process's environment.
    """

    def __init__(self, root: Path):
        self.here, self.site, self._root = root / "here", root / "site", root
        for folder in (self.here, self.site):
            folder.mkdir()
        own = {f"OPTKIT_{name.upper()}_DIR": str(root / name) for name in ("cache", "records", "config")}
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH", "")]))
        self.environment = own | {"PYTHONPATH": path, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    @property
    def model(self) -> Path:
        """The folder of a tiny Llama, made when it is first asked for."""
        folder = self._root / "tiny-llama"
        if not folder.exists():
            from optkit.testing.models import save_tiny_model

            save_tiny_model(folder)
        return folder

    def plugin(self, name: str, source: str, distribution: str | None = None, metadata: str = "") -> Path:
        """Install a plugin module with its entry point in ``site``: what ``pip install`` would leave there. Gives the module's file.

        :param metadata: further lines of the distribution's METADATA, such as ``Requires-Dist: optkit>=99``.
        """
        distribution = distribution or f"optkit-{name}"
        module = "plugin_" + "".join(letter if letter.isalnum() else "_" for letter in f"{distribution}_{name}")
        info = self.site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{metadata}")
        points = info / "entry_points.txt"
        lines = points.read_text() if points.exists() else "[optkit.techniques]\n"
        points.write_text(f"{lines}{name} = {module}\n")
        file = self.site / f"{module}.py"
        file.write_text(textwrap.dedent(source))
        return file

    def __call__(self, *arguments: str, code: int | None = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """``optkit …`` in a process of its own. An exit code other than ``code`` fails the test; ``None`` allows any."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OPTKIT_")}
        done = subprocess.run(
            [sys.executable, "-m", "optkit.cli", *arguments], cwd=self.here, env=inherited | self.environment | (env or {}),
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        if code is not None and done.returncode != code:
            pytest.fail(f"optkit {' '.join(arguments)} ended with {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}")
        return done

    def run(self, plugins: Sequence[str] = (), *arguments: str, set: dict[str, Any] | None = None, code: int = 0) -> dict[str, Any]:
        """``optkit run`` on the tiny model with one process pair, four samples, and twelve others to calibrate with: the record.

        :param arguments: further options, such as ``"--each"``. :param set: options and settings by dotted name.
        """
        samples = self.here / "samples.jsonl"
        samples.write_text("".join(json.dumps({"prompt": f"count {n}", "answer": str(n)}) + "\n" for n in range(16)))
        pairs = {"generate.max_new_tokens": 6} | (set or {})
        settings = [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]
        fixed = [
            "--format",
            "json",
            "--profile",
            "cpu",
            "--repeats",
            "1",
            "--limit",
            "4",
            "--model",
            str(self.model),
            "--samples",
            str(samples),
        ]
        done = self("run", *fixed, "--plugins", ",".join(plugins), *settings, *arguments, code=code)
        return json.loads(done.stdout)


@pytest.fixture
def optkit_run(tmp_path: Path) -> OptkitRun:
    """Whole runs of ``optkit`` in a place of their own; see ``OptkitRun``."""
    root = tmp_path / "optkit"
    root.mkdir()
    return OptkitRun(root)
