"""Which sequence is decoded in which row, when rows are filled again, and which prompts share a prefix: the host's half, without torch."""

from __future__ import annotations

import os.path
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Rows are filled again once this part of them is free. Reading a few prompts costs about two steps of all rows, waiting costs idle rows:
#: for texts of about a hundred tokens the sum is least near a sixth.
FREE_PART = 8
#: A shared prefix of fewer tokens is cheaper to read again than to keep track of.
LEAST_PREFIX = 32


@dataclass(frozen=True)
class Admission:
    """The prompt ``index`` goes to ``row``; its first ``shared`` tokens need no reading, since ``source`` (a row) holds them."""

    row: int
    index: int
    shared: int = 0
    source: int = -1


class Schedule:
    """The rows of one slot, and the prompts that wait for one.

    :param lengths: tokens of each prompt. :param limits: new tokens of each prompt, at most.
    :param waiting: indices of the prompts, in the order in which they get a row.
    :param prefixes: see ``shared_prefixes``.
    :ivar owner: prompt of each row, or ``None``. :ivar left: steps until the row's limit, where it has an owner.
    """

    def __init__(
        self, lengths: Sequence[int], limits: Sequence[int], waiting: Sequence[int], rows: int, prefixes: dict[int, tuple[int, int]]
    ):
        self.lengths, self.limits, self.waiting, self.prefixes = lengths, limits, list(waiting), prefixes
        self.owner: list[int | None] = [None] * rows
        self.left = [0] * rows
        self.holds: list[int | None] = [None] * rows  # the group whose prefix stands at the row's beginning

    @property
    def active(self) -> list[int]:
        return [row for row, owner in enumerate(self.owner) if owner is not None]

    @property
    def wants_filling(self) -> bool:
        free = self.owner.count(None)
        return bool(self.waiting) and free >= min(len(self.owner), self._worth_filling())

    def _worth_filling(self) -> int:
        return max(1, len(self.owner) // FREE_PART)

    def next_wave(self, tokens: int) -> list[Admission]:
        """Prompts that are read together: as many as there are free rows and as ``tokens`` to read allow, but at least one.

        Of the prompts that share a prefix nobody holds yet, only the first is in the wave; the others copy from it in a later one.
        """
        free = [row for row, owner in enumerate(self.owner) if owner is None]
        held, leading = list(self.holds), set()
        wanted = {self.prefixes[index][0] for index in self.waiting if index in self.prefixes}
        wave: list[Admission] = []
        later: list[int] = []
        for place, index in enumerate(self.waiting):
            group, shared = self.prefixes.get(index, (None, 0))
            if group in leading:
                later.append(index)
                continue
            source = held.index(group) if group is not None and group in held else -1
            cost = self.lengths[index] - (shared if source >= 0 else 0)
            if not free or (wave and cost > tokens):
                later += self.waiting[place:]
                break
            # a row that holds the prefix already, else one that holds nothing that others wait for
            row = min(free, key=lambda row, group=group: (held[row] != group, held[row] in wanted))  # type: ignore[misc]
            free.remove(row)
            tokens -= cost
            if group is not None and source < 0:
                leading.add(group)
            wave.append(Admission(row, index, shared, row if held[row] == group else source) if source >= 0 else Admission(row, index))
            self.owner[row], self.left[row], self.holds[row] = index, self.limits[index] - 1, group
        self.waiting = later
        return wave

    def steps(self) -> int:
        """How many steps to run until rows are to be filled again, or until nothing is left, if no text ends before its limit."""
        left = sorted(self.left[row] for row in self.active)
        if not self.waiting:
            return left[-1]
        return left[min(len(left), max(1, self._worth_filling() - self.owner.count(None))) - 1]

    def ran(self, steps: int) -> None:
        for row in self.active:
            self.left[row] -= steps

    def finished(self, ended: Callable[[int], bool]) -> list[tuple[int, int]]:
        """(row, prompt) of the texts that are at their limit or ``ended``; their rows are free from now on."""
        found = [(row, self.owner[row]) for row in self.active if self.left[row] <= 0 or ended(row)]
        for row, _ in found:
            self.owner[row] = None
        return found  # type: ignore[return-value]


def shared_prefixes(prompts: Sequence[Sequence[int]], least: int = LEAST_PREFIX) -> dict[int, tuple[int, int]]:
    """Prompt -> (group, tokens) for prompts that begin with the same ``least`` tokens or more.

    At least one token of each prompt is left over: its logits give the first new token.
    """
    groups = defaultdict(list)
    for index, prompt in enumerate(prompts):
        if len(prompt) > least:
            groups[tuple(prompt[:least])].append(index)
    found: dict[int, tuple[int, int]] = {}
    for group, members in enumerate(groups.values()):
        if len(members) > 1:
            common = len(os.path.commonprefix([list(prompts[index]) for index in members]))
            tokens = min(common, min(len(prompts[index]) for index in members) - 1)
            found |= dict.fromkeys(members, (group, tokens))
    return found
