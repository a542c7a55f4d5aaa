"""Injected faults, and the figures that say what came of them: ``python -m benchmarks.faults [--quick] [--output FILE]``.

Exit code 1 where a figure misses its target. The faults are real ones: bits on a disk, signals, processes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One line of the summary.

    :ivar value: what was found, ``target`` what is wanted; ``met`` decides the exit code (None: shown, and no target here).
    :ivar n: how many cases it is taken over.
    """

    part: str
    name: str
    value: str
    target: str
    met: bool | None
    n: int

    @classmethod
    def none_of(cls, part: str, name: str, found: int, n: int) -> Figure:
        """Something that must never happen."""
        return cls(part, name, str(found), "0", found == 0, n)
