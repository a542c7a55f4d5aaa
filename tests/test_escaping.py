"""Model output, plugins' texts and records with escape sequences and markup: no form of a report lets any of it act.

Every string of a true record is made hostile, so that a field that is shown tomorrow is tested too.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from rich.errors import MarkupError

from optkit.report import history, picture, plans, progress, text
from optkit.report.markdown import table as markdown_table
from optkit.report.terminal import outputs, plain_table, record_view

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu-bundled.json"
PAYLOADS = (
    "\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31mred\x90q\x9c",
    "\u202egnp.exe\u2066\u200b\ufeff",
    "a\rb\x08c\x00d\x7fe",
    "[bold red]loud[/bold red] [link=http://evil.example]x[/link] [/] [@click=quit]y",
    "<script>alert(1)</script><img src=x onerror=alert(1)>&lt;",
    "![p](http://evil.example/p.png) [l](javascript:alert(1)) [r][1]\n[1]: http://evil.example",
    "a | b \\| c \\\\| d `e` ]( ][ ]:",
    "=cmd|' /C calc'!A0",
)
#: Strings that decide what is drawn and how, and are written by optkit alone.
KEPT = {"state", "device", "kind", "predictions_from"}


def hostile(value: Any, payload: str) -> Any:
    """The value with ``payload`` in front of every string, and of every key of the tables whose keys are shown."""
    if isinstance(value, str):
        return payload + value
    if isinstance(value, list):
        return [hostile(item, payload) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {key: item if key in KEPT else hostile(item, payload) for key, item in value.items()}
    for table in ("proof", "outputs"):
        if isinstance(changed.get(table), dict):
            changed[table] = {payload + key: item for key, item in changed[table].items()}
    if isinstance(changed.get("quality"), dict):
        changed["quality"][payload + "of a plugin"] = {"value": 1.0}
        changed["quality"][payload + "that failed"] = {"error": payload}
    return changed


@pytest.fixture(params=PAYLOADS, ids=range(len(PAYLOADS)))
def payload(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def record(payload: str) -> dict[str, Any]:
    plain = json.loads(RECORD.read_text())
    plain["outputs"] = {arm["name"]: ["an answer", "another"] for arm in plain["arms"]}
    plain["arms"].append(plain["arms"][-1] | {"name": "broken", "state": "failed", "reason": "it broke", "proof": {}, "quality": {}})
    made = hostile(plain, payload)
    assert payload in made["arms"][0]["name"] and made["arms"][0]["name"] == made["reference"]
    return made


def printed(view: Any, *, terminal: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=3000, force_terminal=terminal, color_system="truecolor" if terminal else None, highlight=False).print(view)
    return stream.getvalue()


def assert_harmless(shown: str) -> None:
    """Nothing but characters that are drawn, and ends of lines."""
    bad = {character for character in shown if character != "\n" and unicodedata.category(character)[0] == "C"}
    assert not bad, bad


def test_the_payloads_are_seen_by_what_looks_for_them(payload):
    """What is tested below could fail: shown without care, each does something, or has what a spreadsheet or a table would take."""
    acts = any(unicodedata.category(character)[0] == "C" for character in payload)
    try:
        rich = "[" in payload and printed(payload).strip() != payload.strip()
    except MarkupError:
        rich = True
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(payload)
    marked = any(tag in html for tag in ("<script", "<img", "<a ", "<code"))
    assert acts or rich or marked or payload.startswith("=")


def views(record: dict[str, Any], payload: str) -> dict[str, Any]:
    return {
        "a record": record_view(record, 2),
        "outputs": outputs(record, 2),
        "a list": history.overview([record | {"time": 1.0}]),
        "any table": plain_table(payload, [payload], [[payload]]),
        "profiles": plans.profiles_view([{"name": payload, "auto": True, "fits": True, "problem": payload, "summary": "", "source": payload}]),
        "checks": plans.doctor_view([{"name": payload, "status": "fail", "detail": payload, "fix": payload}]),
    }  # fmt: skip


def test_the_terminal_shows_text_and_no_commands(record, payload):
    for view in views(record, payload).values():
        assert_harmless(printed(view))
        drawn = printed(view, terminal=True)
        assert_harmless(re.sub(r"\x1b\[[0-9;]*m", "", drawn))  # colours of our own
        assert "\x1b[31mred" not in drawn and "]8;;" not in drawn.replace(text.clean(payload), "")


@pytest.mark.parametrize("payload", [next(payload for payload in PAYLOADS if "[/bold red]" in payload)], ids=["markup"])
def test_rich_reads_no_markup_in_them(record, payload):
    for view in views(record, payload).values():
        assert "[bold red]loud[/bold red] [link=http://evil.example]x[/link]" in printed(view)


@pytest.mark.parametrize("listed", [False, True])
def test_markdown_makes_tables_and_nothing_else(record, listed):
    shown = history.render([record | {"time": 1.0}], "markdown", listed)
    assert_harmless(shown)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(shown)
    assert set(re.findall(r"<(\w+)", html)) <= {"h2", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "p"}
    for found in re.findall(r"<table>.*?</table>", html, re.S):
        rows = [len(re.findall(r"<t[hd][ >]", row)) for row in re.findall(r"<tr>.*?</tr>", found, re.S)]
        assert len(set(rows)) == 1
    if not listed:
        arms = len(record["arms"])
        assert html.count("<tr>") >= arms + 1  # no row was lost to another reading


def test_cells_say_what_they_said(payload):
    """Escaped, and not dropped: a reader of the table sees the text."""
    html = MarkdownIt("commonmark").enable("table").render(markdown_table(["a", "b"], [[payload, "next"]]))
    cells = re.findall(r"<td>(.*?)</td>", html, re.S)
    assert len(cells) == 2 and cells[1] == "next"
    seen = xml.etree.ElementTree.fromstring(f"<td>{cells[0]}</td>").text or ""
    assert seen == " ".join(text.clean(payload).replace("\n", " ").replace("`", "'").strip().split("  "))


def test_the_picture_is_text_and_shapes(record):
    shown = picture.render(record)
    assert_harmless(shown)
    tree = xml.etree.ElementTree.fromstring(shown)
    tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert tags <= {"svg", "style", "defs", "clipPath", "rect", "g", "text", "circle", "path"}
    attributes = {(name.rpartition("}")[2], value) for element in tree.iter() for name, value in element.attrib.items()}
    assert not [name for name, _ in attributes if name.startswith("on") or name == "href"]
    assert not [value for _, value in attributes if "url(" in value and "url(#" not in value]


def test_json_is_plain_ascii_and_says_all(record):
    shown = history.render([record], "json", False)
    assert shown.isascii()
    assert_harmless(shown)
    assert json.loads(shown) == [record]


@pytest.mark.parametrize("kind", [progress.Lines, progress.Quiet])
def test_progress_and_warnings(kind, payload, capsys):
    watch = kind()
    watch.progress(1, 2, f"x{payload}")
    watch.warn(payload)
    shown = capsys.readouterr()
    assert_harmless(shown.out + shown.err)
    if "[/bold red]" in payload:
        assert "[bold red]loud[/bold red]" in shown.err


def test_errors(payload, capsys, monkeypatch):
    from optkit import cli
    from optkit.errors import UsageError

    def fail() -> None:
        raise UsageError(f"wrong: {payload}")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert_harmless(shown)
    assert shown.startswith("optkit: wrong: ")


def test_no_form_of_a_report_is_left_out():
    """A new file in ``optkit/report`` that makes text for people needs a test here."""
    folder = Path(plans.__file__).parent
    known = {"__init__", "history", "markdown", "picture", "plans", "plugin", "progress", "rows", "terminal", "text"}
    assert {path.stem for path in folder.glob("*.py")} == known
