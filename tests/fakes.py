"""Techniques and distributions made for tests: real entry points in a temporary site folder, no mocks."""

import sys
import textwrap
from pathlib import Path


def distribution(site: Path, name: str, entry_points: str, modules: dict[str, str], version: str = "1.0") -> None:
    """Write a distribution with entry points and modules into ``site``."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
    for module, code in modules.items():
        (site / f"{module}.py").write_text(textwrap.dedent(code))


def plugin(name: str, body: str = "", **facts: str) -> str:
    """Source of a plugin module. ``facts`` are source texts of Technique's arguments."""
    arguments = {"stage": "'engine'", "summary": "'for tests'"} | facts
    listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return (
        f"from optkit import Claims, Limit, Options, Setting, Technique, hookimpl\ntechnique = Technique(name={name!r}, {listed})\n"
        + textwrap.dedent(body)
    )


def install(monkeypatch, site: Path, plugins: dict[str, str], name: str = "optkit-fake") -> None:
    """Install plugin modules (technique name -> source) as one distribution and make them importable."""
    modules = {f"fake_{key.replace('-', '_')}_{abs(hash((name, key))) % 10**6}": source for key, source in plugins.items()}
    points = "\n".join(f"{key} = {module}" for key, module in zip(plugins, modules, strict=True))
    distribution(site, name, f"[optkit.techniques]\n{points}\n", modules)
    monkeypatch.syspath_prepend(str(site))
    for module in modules:
        sys.modules.pop(module, None)
