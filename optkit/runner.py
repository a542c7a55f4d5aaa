"""The run, step by step, in the trial's process. The parent asks for one step after another and gets JSON values back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from optkit import measure
from optkit.machine import Machine
from optkit.plan import Choice, Plan, make_plan
from optkit.registry import discover
from optkit.samples import Sample
from optkit.session import Session
from optkit.settings import Settings
from optkit.sources import ModelSource
from optkit.trial_child import report_progress

WARM_UPS = 3
#: Two units behind the cold one that take at least so many seconds, and differ by no more than this part, are warm: a third would only cost time.
LONG_UNIT, AGREEING = 1.0, 0.05
#: Tokens generated while the profiler looks on.
PROFILED_TOKENS = 4


class Runner:
    """One plan on one model. Methods named in ``calls`` answer the parent."""

    calls = ("load", "warm", "once", "peaks", "evaluate", "profile", "prove")

    def __init__(self, spec: dict[str, Any]):
        self.task: str = spec["plan"]["task"]
        self.machine = Machine(**(spec["machine"] | {"compute_capability": _pair(spec["machine"]["compute_capability"])}))
        self.device = self.machine.device
        self.new_tokens: int = spec["new_tokens"]
        self.threads: int = spec["threads"]
        self.samples = [Sample(**row) for row in spec["timing_samples"]]
        self.calibration = [Sample(**row) for row in spec["calibration"]]
        folder = tempfile.mkdtemp(prefix="trial-", dir=spec["folder"])  # the parent removes it, whatever happens to this process
        names = {step["name"] for part in ("plan", "watch") for step in (spec.get(part) or {"steps": ()})["steps"]}
        registry = discover(names, files=False)
        plan = rebuild_plan(registry, self.machine, spec["plan"])
        watch = rebuild_plan(registry, self.machine, spec["watch"]).steps if spec.get("watch") else ()
        self.session = Session(
            registry, plan, ModelSource(**spec["source"]), self.machine, Path(folder), seed=spec["seed"], watch=watch,
            report=lambda text: report_progress(text=text),
        )  # fmt: skip

    # ------------------------------------------------------------ steps

    def load(self) -> dict[str, Any]:
        """Load, transform, build. Gives what the model weighs and what the techniques changed."""
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(self.threads)
        torch.manual_seed(self.session.seed)
        torch.set_grad_enabled(self.task == "train")
        self.resting = measure.reset_peak_memory(self.device)
        self.session.load()
        calibration = []
        if self.calibration and self.session.model is not None:
            self.session.encode(self.calibration)
            calibration = [sample.prompt_ids + sample.answer_ids for sample in self.calibration]
        self.session.transform(calibration)
        self.session.build()
        self.session.encode(self.samples)
        self.batches = self.session.batches(self.samples)
        model = self.session.model
        answer: dict[str, Any] = {"seconds": self.session.seconds, "batches": len(self.batches)}
        if self.session.plan.devices:  # their rows decide the limit
            answer["lengths"] = self._lengths()
        if model is not None:
            from optkit.modules import stored_bytes

            work = self.session.whole_work or measure.model_work(model)
            answer |= {"bytes": stored_bytes(model), "work": work.to_json(), "dtype": str(model.dtype).removeprefix("torch.")}
        return answer

    def warm(self) -> dict[str, Any]:
        """Run every batch shape until it is warm: first (cold) and last (warm) seconds of one unit."""
        times = []
        for _ in range(1 + WARM_UPS):
            times.append(self.once(1)["seconds"])
            if is_warm(times):
                break
        return {"cold_seconds": times[0], "unit_seconds": times[-1]}

    def once(self, repeat: int) -> dict[str, Any]:
        """The timed unit: every batch, ``repeat`` times, synchronized. Tokens are those generated, or scored."""
        begin = getattr(self.session.engine, "begin_unit", None)
        tokens = 0
        before = measure.energy_joules(self.device)
        with measure.Clock(self.device) as clock:
            for _ in range(repeat):
                if begin:
                    begin()
                for batch in self.batches:
                    tokens += self._work([self.samples[index] for index in batch])
        after = measure.energy_joules(self.device)
        return {
            "seconds": clock.seconds,
            "tokens": tokens,
            "joules": after - before if before is not None and after is not None else None,
            "peak_bytes": measure.peak_memory(self.device) - (self.resting if self.device == "cpu" else 0),
            "host_seconds": measure.host_seconds() if self.device == "cuda" else None,
        }

    def _work(self, samples: list[Sample]) -> int:
        engine = self.session.engine
        if self.task == "generate":
            rows = engine.generate([sample.prompt_ids for sample in samples], new_tokens=self.new_tokens, exact=True)
            return sum(len(row) for row in rows)
        scores = engine.score([sample.prompt_ids + sample.answer_ids for sample in samples], [sample.start for sample in samples])
        return sum(len(row) for row in scores)

    def peaks(self, working_set: int, dtype: str) -> dict[str, Any]:
        """What this device reaches now, and the lengths of each batch of the timed unit: with them the parent knows every arm's limit."""
        import torch

        measured = measure.measure_peaks(self.device, getattr(torch, dtype), working_set)
        return vars(measured) | {"lengths": self._lengths()}

    def _lengths(self) -> list[list[int]]:
        """Tokens of each sample of each batch: of its prompt, where the rest is generated."""
        sizes = [len(sample.prompt_ids) if self.task == "generate" else len(sample) for sample in self.samples]
        return [[sizes[index] for index in batch] for batch in self.batches]

    def evaluate(self, samples: list[dict[str, Any]], reference: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Predictions of every sample, in their order: text, negative log-likelihood, and divergence from the baseline.

        :param reference: sample digest -> the baseline's prediction, or ``None`` in the baseline itself.
        """
        from optkit.predictions import predict

        begin = getattr(self.session.engine, "begin_unit", None)
        if begin:
            begin()
        todo = [Sample(**row) for row in samples]
        self.session.encode(todo)
        return predict(self.session, todo, reference, self.task)

    def profile(self) -> dict[str, int]:
        """Operators and kernels of one batch, in a pass apart from the timed ones."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device == "cuda" else [])
        batch = [self.samples[index] for index in self.batches[0]]
        begin = getattr(self.session.engine, "begin_unit", None)
        if begin:
            begin()
        with profile(activities=activities) as seen:
            if self.task == "generate":
                self.session.engine.generate([sample.prompt_ids for sample in batch], new_tokens=PROFILED_TOKENS, exact=True)
            else:
                self._work(batch)
        kernels = {event.key[:200]: event.count for event in seen.key_averages()}
        self.session.share(kernels=kernels)
        return kernels

    def prove(self, baseline: dict[str, Any] | None) -> dict[str, Any]:
        """Facts for the techniques of other arms (asked of the baseline), and the verdicts on this plan's own."""
        return {"facts": self.session.facts(), "proof": self.session.proof(baseline)}


def is_warm(times: list[float]) -> bool:
    """Whether the units that took ``times``, the cold one first, were enough before ``WARM_UPS`` of them: long ones that agree, or a minute."""
    agree = len(times) > 2 and times[-1] >= LONG_UNIT and abs(times[-1] - times[-2]) <= AGREEING * times[-1]
    return agree or (len(times) > 1 and sum(times) > 60)


def rebuild_plan(registry: Any, machine: Machine, row: dict[str, Any]) -> Plan:
    """The plan as the parent resolved it, without resolving anything anew."""
    from dataclasses import replace

    choices = [Choice(step["name"], step["options"]) for step in row["steps"]]
    plan = make_plan(registry, machine, row["task"], choices, check=False)
    return replace(plan, settings=Settings.from_json(row["settings"]))


def _pair(value: Any) -> tuple[int, int] | None:
    return tuple(value) if value else None


def main(spec: dict[str, Any]) -> Runner:
    """The trial's target."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return Runner(spec)
