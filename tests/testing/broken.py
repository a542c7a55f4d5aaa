"""Plugins that are broken in every way that we could think of, and a site that holds all of them at once."""

from optkit.testing.fixtures import OptkitRun
from tests.fakes import plugin

OPTIONS = "from typing import Any\nfrom optkit import Options\nclass O(Options): "
CONFIGURE = "@hookimpl\ndef configure(options, task, machine):\n    "
#: kind -> source, and words of the cause that is shown. Each is refused when it is asked for.
BROKEN = {
    "import-error": ("import a_module_that_is_not_there", "ModuleNotFoundError"),
    "syntax-error": ("def (", "SyntaxError"),
    "null-bytes": ("x = 1\0", "null bytes"),
    "system-exit": ("raise SystemExit(0)", "SystemExit"),
    "keyboard-interrupt": ("raise KeyboardInterrupt", "it raises KeyboardInterrupt"),
    "own-base-exception": ("class Odd(BaseException): ...\nraise Odd('no exception')", "Odd: no exception"),
    "recursion": ("def f(): return f()\nf()", "RecursionError"),
    "memory": ("raise MemoryError('all of it')", "MemoryError"),
    "long-message": ("raise ValueError('line\\n' * 10_000)", "ValueError: line line"),
    "message-raises": ("class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd", "its message cannot be shown"),
    "segfault": ("import ctypes\nctypes.string_at(0)", "it kills the process (SIGSEGV)"),
    "aborts": ("import os\nos.abort()", "it kills the process (SIGABRT)"),
    "ends-as-if-well": ("import os\nos._exit(0)", "it ends the process with status 0"),
    "no-technique": ("technique = {'name': 'no-technique'}", "has no `technique = Technique(...)`"),
    "technique-raises": ("def __getattr__(name): raise RuntimeError(name)", "RuntimeError: technique"),
    "other-name": (plugin("another"), "its technique 'another'"),
    "two-line-summary": (plugin("two-line-summary", summary="'one\\ntwo'"), "one line that says what the technique does"),
    "unknown-stage": (plugin("unknown-stage", stage="'nowhere'"), "ValidationError"),
    "options-of-wrong-type": (plugin("options-of-wrong-type", options="dict"), "ValidationError"),
    "option-without-default": (OPTIONS + "x: int\n" + plugin("option-without-default", options="O"), "no usable defaults"),
    "option-that-is-no-data": (
        OPTIONS + "x: Any = object()\n" + plugin("option-that-is-no-data", options="O"), "no usable defaults",
    ),
    "options-exit": (
        "from pydantic import model_validator\nfrom optkit import Options\nclass O(Options):\n    @model_validator(mode='after')\n"
        "    def check(self): raise SystemExit(0)\n" + plugin("options-exit", options="O"),
        "SystemExit",
    ),
    "requirement-of-no-form": (plugin("requirement-of-no-form", requires="('not a requirement!',)"), "InvalidRequirement"),
    "unknown-hook": (plugin("unknown-hook", "@hookimpl\ndef transfrom_model(model): ..."), "did you mean 'transform_model'"),
    "wrong-signature": (plugin("wrong-signature", "@hookimpl\ndef transform_model(model, colour): ..."), "colour"),
    "hook-not-callable": (plugin("hook-not-callable", "transform_model = 5"), "would never be called"),
    "hook-not-marked": (plugin("hook-not-marked", "def transform_model(model): ..."), "would never be called"),
    "hook-of-another-project": (
        plugin("hook-of-another-project", "import pluggy\n@pluggy.HookimplMarker('llm')\ndef transform_model(model): ..."),
        "would never be called",
    ),
    "hook-wrapper": (plugin("hook-wrapper", "@hookimpl(wrapper=True)\ndef transform_model(model): return (yield)"), "nothing to wrap"),
    "configure-raises": (plugin("configure-raises", CONFIGURE + "raise KeyError('x')"), "fails in `configure`: KeyError"),
    "configure-exits": (plugin("configure-exits", CONFIGURE + "raise SystemExit(0)"), "fails in `configure`: SystemExit"),
    "configure-gives-text": (plugin("configure-gives-text", CONFIGURE + "return 'static cache, please'"), "str, and optkit.Claims or None"),
    "configure-unknown-setting": (
        plugin("configure-unknown-setting", CONFIGURE + "return Claims(settings=(Setting(name='generate.cash', value=1, because=''),))"),
        "did you mean 'generate.cache'",
    ),
    "configure-no-data": (
        plugin("configure-no-data", CONFIGURE + "return Claims(settings=(Setting(name='generate.cache', value=object(), because=''),))"),
        "fails in `configure`",
    ),
}  # fmt: skip
#: Bad manners that must not harm: the plugin works.
RUDE = {
    "prints": 'print(\'{"not": "your JSON"}\')\n' + plugin("prints", CONFIGURE + "print('nor this')"),
    "closes-stdout": "import sys\nsys.stdout.close()\n" + plugin("closes-stdout"),
    "changes-path": "import os, sys\nsys.path.clear()\nos.chdir('/')\n" + plugin("changes-path"),
    "escape-sequences": plugin("escape-sequences", summary="'\\x1b[2J\\u202ered [bold]text'"),
}
#: A technique that does something, to be used beside them.
GOOD = '"""Louder: for tests."""\n' + plugin(
    "good",
    "@hookimpl\ndef transform_model(model): model.lm_head.weight.data.mul_(1.5)",
    stage="'merge'", adds="{'weights-changed'}", lossy="True",
)  # fmt: skip


def install_all(run: OptkitRun) -> None:
    """Every kind in one site, each of which some command may stumble over."""
    for name, (source, _) in BROKEN.items():
        run.plugin(name, source, "optkit-broken")
    for name, source in (RUDE | {"good": GOOD, "twin": plugin("twin")}).items():
        run.plugin(name, source, "optkit-fine")
    run.plugin("twin", plugin("twin"), "optkit-twin")
    run.plugin("newer", plugin("newer"), "optkit-newer", "Requires-Dist: optkit>=99\n")
    run.plugin("not a name; rm -rf", plugin("good"), "optkit-odd-name")
    for name, points in {"unclosed": "[optkit.techniques\nx", "valueless": "[optkit.techniques]\nx =\n"}.items():
        entry_points(run.site, name, points.encode())
    entry_points(run.site, "bare", b"[optkit.techniques]\nbare = nowhere\n")  # without METADATA


def entry_points(site, name, content):
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_bytes(content)
