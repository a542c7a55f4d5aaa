"""Every error that a user can meet, drawn as one tree.

OptkitError                 exit 1: printed as one line, no traceback
├── UsageError              exit 2: what was asked for is wrong or unknown
│   └── PlanConflict        exit 2: a plan that cannot run, with every reason and what would make it run
└── UnavailableError        exit 3: something that is needed is missing here

Anything else that escapes is a fault of optkit's own and keeps its traceback. Messages say what is wrong, where, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OptkitError(Exception):
    """An expected failure. ``str(error)`` is the whole message."""

    exit_code = 1


class UsageError(OptkitError):
    exit_code = 2


class PlanConflict(UsageError):
    """Every reason why a plan cannot run.

    :param conflicts: one sentence a conflict, each naming the role, setting or property and the way out.
    """

    def __init__(self, conflicts: Iterable[str]):
        self.conflicts = list(conflicts)
        super().__init__("this plan cannot run:\n" + "\n".join(f"  - {conflict}" for conflict in self.conflicts))


class UnavailableError(OptkitError):
    exit_code = 3


def quoted(text: str, longest: int = 80) -> str:
    """What somebody typed, printable, in quotes, and cut where it is long."""
    shown = repr(text)
    return shown if len(shown) <= longest else f"{shown[: longest - 2]}…'"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
