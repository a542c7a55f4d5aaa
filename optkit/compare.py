"""Baseline and optimized taking turns, over several process pairs.

A *round* starts one process an arm, the untouched baseline twice (A and A′), in an order that changes from round to round. In a round
every arm does the same unit of work in turn, in random order, several times. One figure an arm and round is kept, and the interval is
taken over rounds: within one process a comparison of equal arms claimed a difference in most cases. Where the arms do not fit the
device together, whole processes alternate instead (A B B A), and the table says "not interleaved".
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from optkit.trial import TrialFailed, TrialProcess, TrialServer

TARGET = "optkit.runner:main"
SAME = "A′"


@dataclass
class Arm:
    """One plan in the comparison, and what was measured of it.

    :ivar rounds: seconds of one unit in each round, the mean over the round's turns.
    :ivar colds: seconds of the first unit of each round's process, compilation included.
    :ivar hosts: seconds that the processor took for a fixed piece of Python behind each timed unit, on a GPU.
    :ivar state: ``ok``, or what happened to it (``failed``, ``oom``, ``crashed``, ``timeout`` …), with ``reason``.
    """

    name: str
    spec: dict[str, Any]
    state: str = "ok"
    reason: str = ""
    log: str = ""
    rounds: list[float] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)
    warm: dict[str, Any] = field(default_factory=dict)
    colds: list[float] = field(default_factory=list)
    tokens: int = 0
    peak_bytes: int = 0
    joules: list[float] = field(default_factory=list)
    hosts: list[float] = field(default_factory=list)
    process: TrialProcess | None = None

    @property
    def ok(self) -> bool:
        return self.state == "ok"


@dataclass(frozen=True)
class Protocol:
    """How long to measure. ``unit_seconds`` of synchronized work a turn, ``turns`` a round, ``rounds`` process pairs.

    :ivar seconds: no further round begins after this long.
    :ivar at_once: arms get ready at the same time. Not on a CPU, whose cores they would fight for: it took ten times as long.
    """

    rounds: int = 6
    turns: int = 2
    unit_seconds: float = 0.25
    interleaved: bool = True
    at_once: bool = False
    timeout: float = 600.0
    seconds: float | None = None


class Comparison:
    """Runs the arms in turns. The first arm is the baseline; its twin A′ is added here.

    :param pick_server: gives the server of a round. :param progress: called with (done, total, text).
    """

    def __init__(
        self, pick_server: Callable[[], TrialServer], arms: list[Arm], protocol: Protocol, seed: int = 0,
        progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    ):  # fmt: skip
        self.pick_server, self.protocol, self.progress = pick_server, protocol, progress
        self.arms = arms
        self.twin = Arm(SAME, arms[0].spec)
        self.repeat = self.rounds = 0
        self._random = random.Random(seed)
        self._done = 0
        self._total = max(1, protocol.rounds) * (2 + protocol.turns) + len(arms)

    def everyone(self) -> list[Arm]:
        return [self.arms[0], self.twin, *self.arms[1:]]

    def run(self, inspect: Callable[[Arm], None]) -> None:
        """All rounds. ``inspect(arm)`` is called once for each arm, baseline first, while its process lives: evaluate, profile, prove."""
        if not self.protocol.rounds:
            self.server = self.pick_server()
            for arm in self.arms:
                self._open(arm)
                self._inspect(arm, inspect)
                self._close(arm)
            return
        begun = time.monotonic()
        for number in range(self.protocol.rounds):
            if number and self.protocol.seconds is not None and time.monotonic() - begun > self.protocol.seconds:
                break
            self.rounds = number + 1
            self.server = self.pick_server()
            order = self.everyone()
            if number % 2:
                order.reverse()
            (self._round_in_turns if self.protocol.interleaved else self._round_apart)(number, order, inspect)

    # ------------------------------------------------------------ rounds

    def _round_in_turns(self, number: int, order: list[Arm], inspect: Callable[[Arm], None]) -> None:
        alive = [arm for arm in order if arm.ok]
        self._step(f"round {number + 1}: loading {len(alive)} processes")
        for arm in alive:
            self._spawn(arm)
        if number == 0:  # one after the other: cold times are reported, and must not disturb each other
            for arm in alive:
                self._start(arm, "load")
                arm.loaded = self._wait(arm) or arm.loaded
                self._warm(arm)
        else:
            self._all(alive, "load")
            self._all(alive, "warm")
        self._step(f"round {number + 1}: timing")
        self._turns([arm for arm in alive if arm.ok])
        if number == 0:
            for arm in self.arms:
                self._inspect(arm, inspect)
        for arm in order:
            if arm.process is not None:
                arm.process.ask_to_end()
        for arm in order:
            self._close(arm)

    def _all(self, arms: list[Arm], method: str) -> None:
        """The same step in every arm: at once where the protocol says so, else one after the other."""
        if self.protocol.at_once:
            for arm in arms:
                self._start(arm, method)
        for arm in arms:
            if not self.protocol.at_once:
                self._start(arm, method)
            answer = self._wait(arm)
            if method == "warm":
                self._note_warm(arm, answer)

    def _round_apart(self, number: int, order: list[Arm], inspect: Callable[[Arm], None]) -> None:
        if number == 0:
            order = self.everyone()  # the baseline's predictions are the others' reference
        for arm in order:
            if not arm.ok:
                continue
            self._open(arm)
            self._warm(arm)
            self._step(f"round {number + 1}: {arm.name}")
            self._turns([arm])
            if number == 0 and arm is not self.twin:
                self._inspect(arm, inspect)
            self._close(arm)

    def _turns(self, arms: list[Arm]) -> None:
        """Every arm in random order, ``turns`` times, the same work each."""
        if not self.repeat and arms:
            unit = min((arm.warm["unit_seconds"] for arm in arms[:1] if arm.warm), default=self.protocol.unit_seconds)
            self.repeat = max(1, math.ceil(self.protocol.unit_seconds / max(unit, 1e-9)))
        seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for turn in range(self.protocol.turns):
            for arm in self._random.sample(arms, len(arms)):
                self._start(arm, "once", repeat=self.repeat)
                measured = self._wait(arm)
                if measured is None:
                    continue
                seconds[arm.name].append(measured["seconds"] / self.repeat)
                arm.tokens = measured["tokens"] // self.repeat
                arm.peak_bytes = max(arm.peak_bytes, measured["peak_bytes"])
                if measured["joules"] is not None:
                    arm.joules.append(measured["joules"] / max(measured["tokens"], 1))
                if measured.get("host_seconds") is not None:
                    arm.hosts.append(measured["host_seconds"])
            self._step(f"turn {turn + 1} of {self.protocol.turns}")
        for arm in arms:
            if arm.ok and seconds[arm.name]:
                arm.rounds.append(mean(seconds[arm.name]))

    # ------------------------------------------------------------ one arm

    def _open(self, arm: Arm) -> None:
        self._spawn(arm)
        self._start(arm, "load")
        arm.loaded = self._wait(arm) or arm.loaded

    def _spawn(self, arm: Arm) -> None:
        arm.process = self.server.spawn(TARGET, arm.spec, name=arm.name)

    def _warm(self, arm: Arm) -> None:
        if arm.ok:
            self._start(arm, "warm")
            self._note_warm(arm, self._wait(arm))

    def _note_warm(self, arm: Arm, answer: Any) -> None:
        if answer:
            arm.colds.append(answer["cold_seconds"])
            arm.warm = arm.warm or answer

    def _inspect(self, arm: Arm, inspect: Callable[[Arm], None]) -> None:
        self._step(f"evaluating {arm.name}")
        if arm.ok:
            try:
                inspect(arm)
            except TrialFailed as failure:
                self._fail(arm, failure)

    def ask(self, arm: Arm, method: str, **arguments: Any) -> Any:
        """Call a step of an arm's live process. :raises TrialFailed:"""
        assert arm.process is not None
        return arm.process.call(method, timeout=self.protocol.timeout, on_progress=self._forward, **arguments)

    def _start(self, arm: Arm, method: str, **arguments: Any) -> None:
        if arm.ok and arm.process is not None:
            try:
                arm.process.start(method, timeout=self.protocol.timeout, on_progress=self._forward, **arguments)
            except TrialFailed as failure:
                self._fail(arm, failure)

    def _wait(self, arm: Arm) -> Any:
        if not arm.ok or arm.process is None:
            return None
        try:
            return arm.process.wait()
        except TrialFailed as failure:
            self._fail(arm, failure)
            return None

    def _fail(self, arm: Arm, failure: TrialFailed) -> None:
        arm.state, arm.reason = failure.state, failure.reason
        arm.log = failure.traceback or failure.log_tail
        self._close(arm)

    def _close(self, arm: Arm) -> None:
        if arm.process is not None:
            arm.process.end()
            arm.process = None

    def _forward(self, fields: dict[str, Any]) -> None:
        self.progress(self._done, self._total, str(fields.get("text", "")))

    def _step(self, text: str) -> None:
        self._done = min(self._done + 1, self._total)
        self.progress(self._done, self._total, text)


def noise(comparison_rounds: list[float], twin_rounds: list[float]) -> float:
    """|median log A′/A|: what two untouched baselines of this run differ by."""
    pairs = list(zip(comparison_rounds, twin_rounds, strict=False))
    if not pairs:
        return 0.0
    logs = sorted(math.log(second / first) for first, second in pairs)
    middle = len(logs) // 2
    return abs(logs[middle] if len(logs) % 2 else (logs[middle - 1] + logs[middle]) / 2)


def host_seconds(comparison: Comparison) -> dict[str, float] | None:
    """What a fixed piece of Python took behind the timed units, on a GPU: the fastest and the slowest moment of the host."""
    seen = [seconds for arm in comparison.everyone() for seconds in arm.hosts]
    return {"fastest": min(seen), "slowest": max(seen)} if seen else None
