"""Running the checks: which there are, what each found, and the exceptions that a technique declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optkit.errors import OptkitError
from optkit.plugin_loading import one_line
from optkit.testing.models import KINDS
from optkit.testing.subject import Subject


class CheckFailed(AssertionError):
    """What is wrong, where, and what to do."""


class NotChecked(Exception):
    """Why a check cannot be made here."""


@dataclass(frozen=True)
class Result:
    """One check: ``state`` is ``ok``, ``failed``, ``exception`` (fails, as the technique declares) or ``not checked``."""

    check: str
    state: str
    detail: str


#: Checks of the plugin as it is installed, and of what it does to each tiny model.
PLUGIN_CHECKS = ("manifest", "imports", "import-time", "hooks", "dependency")
MODEL_CHECKS = ("runs", "effect", "bytes", "saves")
CHECKS = (
    *PLUGIN_CHECKS,
    *(f"{check}[{kind}]" for check in MODEL_CHECKS for kind in KINDS),
    "combines",
    "exceptions",
)


def check_technique(
    name: str, options: Mapping[str, Any] | None = None, partners: dict[str, dict[str, Any]] | None = None,
    report: Callable[[Result], None] = lambda result: None,
) -> list[Result]:  # fmt: skip
    """Every check of the technique ``name`` with these options.

    :param partners: technique -> options: those that it is run together with; by default all that are ready and build no engine.
    :raises UsageError: for a name that nothing installed has.
    """
    subject = Subject(name, dict(options or {}), partners)
    results = []
    try:
        subject.registry.get(name)  # an unknown name is the caller's mistake, not a failed check
        for check in CHECKS:
            results.append(result_of(subject, check))
            report(results[-1])
    finally:
        subject.close()
    return results


def result_of(subject: Subject, check: str) -> Result:
    """One check, made once a subject."""
    key = f"result {check}"
    if key not in subject._known:
        subject._known[key] = _make(subject, check)
    return subject._known[key]


def _make(subject: Subject, check: str) -> Result:
    from optkit.testing import model_checks, plugin_checks

    if check == "exceptions":
        return _exceptions(subject)
    name, _, kind = check.rstrip("]").partition("[")
    room = plugin_checks if name in PLUGIN_CHECKS else model_checks
    function = getattr(room, "check_" + name.replace("-", "_"))
    try:
        detail = function(subject, kind) if kind else function(subject)
    except NotChecked as reason:
        return Result(check, "not checked", str(reason))
    except CheckFailed as failure:
        why = declared(subject, check)
        return Result(check, "exception" if why else "failed", f"{why} ({failure})" if why else str(failure))
    except (OptkitError, Exception) as error:
        why = declared(subject, check)
        return Result(check, "exception" if why else "failed", f"{why} ({one_line(error)})" if why else one_line(error))
    return Result(check, "ok", detail)


def declared(subject: Subject, check: str) -> str:
    """The technique's own reason why it cannot pass, given for the check, for the kind of model, or for the two together."""
    technique = subject.row.technique
    name, _, kind = check.rstrip("]").partition("[")
    exceptions = technique.exceptions if technique else {}
    return next((exceptions[key] for key in (check, name, kind) if exceptions.get(key)), "")


def _exceptions(subject: Subject) -> Result:
    """Each declared exception is one that is needed: a reason that has gone must not hide a fault that comes.

    Exceptions speak of the default options: with others, a check may pass that they cannot.
    """
    technique = subject.row.technique
    if technique is None or not technique.exceptions:
        return Result("exceptions", "ok", "none declared")
    others = [check for check in CHECKS if check != "exceptions"]
    for key, reason in technique.exceptions.items():
        covered = [check for check in others if key in (check, check.partition("[")[0], check.rstrip("]").partition("[")[2])]
        if not covered:
            return Result(
                "exceptions", "failed", f"'{key}' is no check and no model; there are {', '.join([*PLUGIN_CHECKS, *MODEL_CHECKS, *KINDS])}"
            )
        if not reason.strip():
            return Result("exceptions", "failed", f"'{key}' is declared without a reason")
        states = {result_of(subject, check).state for check in covered}
        if states <= {"ok"} and not subject.options:
            return Result("exceptions", "failed", f"'{key}' is declared and passes; remove it from the technique's exceptions")
    return Result("exceptions", "ok", ", ".join(technique.exceptions))
