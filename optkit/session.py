"""One model with one plan, in this process: load, transform, engine, batches, wrap. ``optkit.optimize`` and every trial use it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.context import TrialContext
from optkit.engine import Engine, TransformersEngine, end_of_text
from optkit.errors import OptkitError
from optkit.measure import model_work
from optkit.plan import Plan
from optkit.registry import Registry
from optkit.samples import Sample
from optkit.snapshot import Snapshot, difference
from optkit.sources import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit.machine import Machine
    from optkit.measure import Work

#: Samples of a prompt are cut here where a model names no limit of its own.
LONGEST = 4096


class Session:
    """The model, its engine and the contexts of a plan's techniques.

    :ivar model: an ordinary transformers model (``None`` where an engine needs none).
    :ivar engine: what generates and scores.
    :ivar whole_work: what the whole model costs, where a technique has left but a slice of it in this process.
    """

    def __init__(
        self, registry: Registry, plan: Plan, source: ModelSource, machine: Machine, folder: Path, *, seed: int = 0,
        watch: Sequence[Any] = (), report: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.registry, self.plan, self.source, self.machine, self.seed = registry, plan, source, machine, seed
        self.model: PreTrainedModel | None = None
        self.tokenizer: Any = None
        self.engine: Engine = Engine()
        self.seconds: dict[str, float] = {}
        self.whole_work: Work | None = None

        def context(name: str, options: Any) -> TrialContext:
            own = folder / name
            own.mkdir(parents=True, exist_ok=True)
            return TrialContext(name, options, plan.settings, plan.task, machine.device, seed, machine, source, own, report=report)

        self.contexts = {step.name: context(step.name, step.options) for step in plan.steps}
        #: techniques of *other* arms whose facts this session (the baseline) is asked for
        self.watched = {step.name: context(step.name, step.options) for step in watch if step.name not in self.contexts}
        self.core = context("core", None)

    def load(self, model: PreTrainedModel | None = None, tokenizer: Any = None) -> None:
        """Load the model, or take the one that is given."""
        from optkit import loading

        started = time.perf_counter()
        self.share(tokenizer=tokenizer if tokenizer is not None else loading.load_tokenizer(self.source))
        if model is None:
            owner = self.plan.owner("load")
            hook = self.registry.hook(owner.name, "load_model") if owner else None
            if owner and hook:
                model = hook(source=self.source, trial=self.contexts[owner.name])
            else:
                model = loading.load_model(self.source, self.core)
        self.model = model
        self.seconds["load"] = time.perf_counter() - started

    def transform(self, calibration: list[list[int]] | None = None) -> None:
        """Apply every technique's ``transform_model`` in plan order, with a snapshot round each."""
        started = time.perf_counter()
        for step in self.plan.steps:
            trial = self.contexts[step.name]
            trial.calibration = calibration if calibration and step.technique.calibrates else []
            hook = self.registry.hook(step.name, "transform_model")
            if not hook or self.model is None:
                continue
            if step.claims.devices and step.claims.devices.share == "slices":
                self.whole_work = model_work(self.model)
            before = Snapshot.of(self.model)
            trial.report(f"applying {step.name}")
            self.model = hook(model=self.model, trial=trial) or self.model
            trial.changes = difference(before, Snapshot.of(self.model))
        self.seconds["transform"] = time.perf_counter() - started

    def build(self) -> None:
        """Build the engine and wrap it."""
        started = time.perf_counter()
        owner = self.plan.owner("engine")
        hook = self.registry.hook(owner.name, "build_engine") if owner else None
        if owner and hook:
            engine = hook(model=self.model, trial=self.contexts[owner.name])
            if engine is None:
                raise OptkitError(f"{owner.name} owns the role 'engine' and built none; report this to its author")
        else:
            engine = TransformersEngine(self.model, self.core)  # type: ignore[arg-type]
        self.share(engine=engine)
        for step in self.plan.steps:
            wrap = self.registry.hook(step.name, "wrap_engine")
            if wrap:
                self.share(engine=wrap(engine=self.engine, trial=self.contexts[step.name]) or self.engine)
        self.seconds["build"] = time.perf_counter() - started

    def share(self, **values: Any) -> None:
        """Set what every technique's context sees: the tokenizer, the engine, the kernels of a profile."""
        for trial in (self.core, *self.contexts.values(), *self.watched.values()):
            for name, value in values.items():
                setattr(trial, name, value)
        for name, value in values.items():
            setattr(self, name, value)

    # ------------------------------------------------------------ samples

    def encode(self, samples: list[Sample]) -> None:
        from optkit import loading

        eos = min(end_of_text(self.model, self.tokenizer), default=None)  # type: ignore[arg-type]
        loading.encode(samples, self.tokenizer, eos=eos, max_length=self.longest, vocabulary=self.vocabulary, seed=self.seed)

    @property
    def longest(self) -> int:
        own = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None) if self.model is not None else None
        wanted = self.plan.settings["batch.max_length"]
        return min(value for value in (own or LONGEST, wanted or LONGEST, LONGEST) if value)

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).vocab_size) if self.model is not None else len(self.tokenizer)

    def batches(self, samples: list[Sample], *, by_length: bool = False) -> list[list[int]]:
        """Indices of each batch, by the plan's strategy or else in file order.

        :param by_length: without a strategy, the shortest first: less padding, for work that is not timed.
        :raises OptkitError: where a strategy loses or repeats a sample.
        """
        owner = self.plan.owner("batching")
        hook = self.registry.hook(owner.name, "batch_strategy") if owner else None
        if owner and hook:
            batches = [list(batch) for batch in hook(samples=samples, trial=self.contexts[owner.name])]
            if sorted(index for batch in batches for index in batch) != list(range(len(samples))):
                raise OptkitError(
                    f"{owner.name}: its batches do not hold each of the {len(samples)} samples exactly once; report this to its author"
                )
            return batches
        size = int(self.plan.settings["batch.size"])
        order = sorted(range(len(samples)), key=lambda index: len(samples[index])) if by_length else list(range(len(samples)))
        return [order[start : start + size] for start in range(0, len(order), size)]

    # ------------------------------------------------------------ proof

    def facts(self) -> dict[str, dict[str, Any]]:
        """What each technique's ``prove_effect`` says, this session's own and those that it watches."""
        facts = {}
        for name, trial in (self.contexts | self.watched).items():
            hook = self.registry.hook(name, "prove_effect")
            try:
                facts[name] = dict(hook(model=self.model, trial=trial) or {}) if hook else {}
            except Exception as error:  # a proof that fails proves nothing, and is shown
                facts[name] = {"error": f"{type(error).__name__}: {error}"}
        return facts

    def proof(self, baseline: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
        """Facts, changes and verdict of each technique of the plan.

        :param baseline: the facts of the untouched model, where there is one to compare with.
        """
        from optkit.proof import verdict

        facts = self.facts()
        return {
            name: verdict(facts[name], trial.changes, None if baseline is None else baseline.get(name, {}))
            for name, trial in self.contexts.items()
        }

    def close(self) -> None:
        self.engine.close()
