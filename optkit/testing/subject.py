"""A technique at work on a tiny model in this process: what the checks look at."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import PlanConflict
from optkit.machine import Machine, detect
from optkit.plan import Choice, Plan, make_plan
from optkit.registry import Found, Registry, discover
from optkit.samples import Sample
from optkit.sources import ModelSource
from optkit.technique import Technique

if TYPE_CHECKING:
    import torch

    from optkit.engine import Engine
    from optkit.session import Session
    from optkit.technique import Task

NEW_TOKENS = 6
#: What the kit can drive a model through; it trains nothing.
TASKS: tuple[Task, ...] = ("generate", "score")


@dataclass
class Outcome:
    """What came of one plan on one tiny model.

    :ivar tokens: greedy continuations of four prompts, ``NEW_TOKENS`` each; ``None`` in the task ``score``. :ivar scores: log probabilities
        of the prompts' tokens; ``None`` where the engine of the task ``generate`` gives none. :ivar again: what the task is about, tokens or
        scores, asked for a second time; ``None`` where nobody asked. :ivar facts: technique -> what ``prove_effect`` says.
    """

    session: Session
    tokens: list[list[int]] | None
    scores: list[torch.Tensor] | None
    again: Any = None
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Subject:
    """The technique under test, with options that make it do something on a tiny model.

    :ivar partners: techniques with options that are run together with it; by default every one that is ready and builds no engine.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    partners: dict[str, dict[str, Any]] | None = None
    seed: int = 0
    registry: Registry = field(default_factory=discover)

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="optkit-check-")
        self._known: dict[str, Any] = {}

    @property
    def row(self) -> Found:
        return self.registry.get(self.name)

    @property
    def technique(self) -> Technique:
        return self.row.ready

    @cached_property
    def machine(self) -> Machine:
        """This machine's CPU, for a technique that works there."""
        machine = detect()
        if machine.device != "cpu" and "cpu" in self.technique.devices:
            from optkit.profile import load_profile

            return load_profile("cpu").as_machine(machine)
        return machine

    @cached_property
    def task(self) -> Task:
        """What the technique is driven through: ``generate``, or ``score`` where it has a plan only there."""
        for task in TASKS:
            try:
                make_plan(self.registry, self.machine, task, [Choice(self.name, self.options)])
            except PlanConflict:
                continue
            return task
        return TASKS[0]

    def plan(self, *partners: str, alone: bool = False) -> Plan:
        """The plan of this technique and its partners, or of the partners alone. :raises OptkitError: where there is none."""
        chosen = [] if alone else [Choice(self.name, self.options)]
        chosen += [Choice(name, (self.partners or {}).get(name, {})) for name in partners]
        return make_plan(self.registry, self.machine, self.task, chosen)

    def source(self, kind: str) -> ModelSource:
        """A tiny model's folder: loading goes the way of a run."""
        from optkit.testing.models import save_tiny_model

        folder = Path(self._folder.name) / kind
        if not folder.exists():
            save_tiny_model(folder, kind)
        return ModelSource(f"tiny {kind}", "folder", str(folder))

    def outcome(self, kind: str) -> Outcome:
        """The technique alone, carried out once for each kind."""
        key = f"outcome {kind}"
        if key not in self._known:
            self._known[key] = self.carry_out(self.plan(), self.source(kind))
        return self._known[key]

    def untouched(self, kind: str) -> Outcome:
        """The baseline, which is also asked for the technique's facts."""
        key = f"untouched {kind}"
        if key not in self._known:
            self._known[key] = self.carry_out(self.plan(alone=True), self.source(kind), watch=self.plan().steps)
        return self._known[key]

    def carry_out(self, plan: Plan, source: ModelSource, watch: Any = (), *, prove: bool = True) -> Outcome:
        """Load, transform, build, batch, generate (in that task) and score; to ``prove``, do it again, profile and ask for facts.

        The technique's errors come through.
        """
        import torch

        from optkit.session import Session
        from optkit.testing.models import prompts

        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        session = Session(self.registry, plan, source, self.machine, folder, seed=self.seed, watch=watch)
        rows = prompts()
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # also puts back that loading switches gradients off
            torch.manual_seed(self.seed)
            session.load()
            session.transform(prompts([32] * 8, seed=1))
            session.build()
            samples = [Sample(id=str(number), prompt="word " * (number + 1), answer="end") for number in range(6)]
            session.encode(samples)
            session.batches(samples)
            engine = session.engine
            tokens = _generated(engine, rows) if plan.task == "generate" else None
            scores = None if tokens is not None and engine.cannot_score else _scored(engine, rows)
            if not prove:
                return Outcome(session, tokens, scores)
            again = _scored(engine, rows) if tokens is None else _generated(engine, rows)
            with torch.profiler.profile() as seen:
                _scored(engine, rows[:1]) if tokens is None else _generated(engine, rows[:1], 2)
            session.share(kernels={event.key: event.count for event in seen.key_averages()})
            return Outcome(session, tokens, scores, again, session.facts())

    def close(self) -> None:
        for known in self._known.values():
            if isinstance(known, Outcome):
                known.session.close()
        self._known.clear()
        self._folder.cleanup()


def _generated(engine: Engine, rows: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    return engine.generate(rows, new_tokens=new_tokens, exact=True)


def _scored(engine: Engine, rows: list[list[int]]) -> list[torch.Tensor]:
    return engine.score(rows, [1] * len(rows))
