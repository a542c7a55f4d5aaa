"""One experiment from request to record: what the memo and the records know already, the measuring, the result."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from optkit import compare, foreign_code, identity, metrics, quality
from optkit.canonical import digest
from optkit.errors import OptkitError, UnavailableError
from optkit.folders import cache_folder, make_private_folder, records_folder, usable_folder
from optkit.machine import detect, silent_cpu_fallback
from optkit.memo import Memo
from optkit.plan import Plan
from optkit.predictions_memo import known_predictions, remember_predictions
from optkit.profile import missing_for
from optkit.record import arm_row, finite, limit_seconds
from optkit.request import Request, Setup, prepare
from optkit.samples import Sample
from optkit.stats import speed_up
from optkit.store import RecordStore

#: Samples that are timed at least, and new tokens of each at most. A whole batch is timed in any case.
TIMED = {"cpu": (8, 16), "cuda": (1, 128)}
SHOWN_OUTPUTS = 50
#: Rounds of ``--thorough``: a slow-down of 5 % is found in 9 of 10 runs on a noisy machine (20 rounds find it in 7, tests/test_aa.py).
THOROUGH_ROUNDS = 40
#: Share of the device's memory that all arms together may take to be measured in turns.
FITTING_SHARE = 0.85


def execute(request: Request) -> dict[str, Any]:
    """Measure, or answer from memo and records. Gives the record, with ``origin`` of timings and predictions."""
    setup = prepare(request)
    here = detect()
    lacking = missing_for(setup.profile, here, [Path(folder) for folder in request.profiles_dir])
    if lacking:
        raise UnavailableError(lacking)
    fallback = silent_cpu_fallback(here)
    if fallback and (request.profile == "auto" or setup.profile.device == "cuda"):
        raise UnavailableError(fallback)
    setup.source = setup.source.resolved()
    return Experiment(setup).run()


class Experiment:
    """The arms of one request, what is known of them, and what is measured now."""

    def __init__(self, setup: Setup):
        self.setup, self.request = setup, setup.request
        request = setup.request
        self.metric = metrics.load_metric(request.metric) if request.metric else None
        self.memo = Memo(cache_folder(request.cache_dir) / "memo", max_age_seconds=request.cache_max_age, warn=request.warn)
        self.store = RecordStore(records_folder(), warn=request.warn)
        if line := foreign_code_of(setup):
            request.warn(line)
        self.protocol = protocol_of(request, setup)
        self.identity = identity.base(setup)
        self.specs = {plan.name: identity.of_plan(self.identity, plan, setup) for plan in setup.all_plans}
        baseline = digest(self.specs["baseline"])
        for name, spec in self.specs.items():
            if name != "baseline":
                spec["reference"] = baseline  # its divergence is taken from that baseline's distributions
        self.key = digest(
            {
                "specs": self.specs,
                "protocol": [self.protocol.rounds, self.protocol.turns, self.protocol.seconds],
                "timing": self.timing_spec(),
            }
        )
        self.predictions: dict[str, list[dict[str, Any]]] = {}
        self.from_memo: dict[str, bool] = {}
        self.saved_seconds = 0.0

    def run(self) -> dict[str, Any]:
        self.undescribed = {
            plan.name: f"{step.name}: {step.claims.undescribed}"
            for plan in self.setup.plans
            for step in plan.steps
            if step.claims.undescribed
        }
        for name, why in self.undescribed.items():
            self.request.warn(f"{name}: predictions and timings are not taken from memory, because {why}")
        record = (
            None
            if self.request.fresh or self.undescribed
            else self.store.latest(lambda row: row.get("key") == self.key and row.get("kind") == "run")
        )
        if not self.request.force:
            for plan in self.setup.all_plans:
                if plan.name not in self.undescribed:
                    self._look_up(plan)
        complete = all(plan.name in self.predictions for plan in self.setup.all_plans if not _failed_in(record, plan.name))
        result = dict(record) if record is not None and complete else self._measure(record)
        if not result.get("measured_now"):
            self._add_quality(result)
        result["saved_seconds"] = self.saved_seconds
        result["outputs"] = {name: [row.get("text") for row in rows[:SHOWN_OUTPUTS]] for name, rows in self.predictions.items()}
        return result

    def timing_spec(self) -> dict[str, Any]:
        return {"samples": [sample.digest for sample in self.timed_samples()], "tokens": self.timed_tokens()}

    def timed_samples(self) -> list[Sample]:
        least = TIMED[self.setup.machine.device][0]
        return self.setup.samples.samples[: max(least, int(self.setup.baseline.settings["batch.size"]))]

    def timed_tokens(self) -> int:
        return min(TIMED[self.setup.machine.device][1], int(self.setup.baseline.settings["generate.max_new_tokens"]))

    # ------------------------------------------------------------ memo

    def _look_up(self, plan: Plan) -> None:
        hit = known_predictions(self.memo, self.specs[plan.name], self.setup.samples.samples)
        if hit is not None:
            self.predictions[plan.name], seconds = hit
            self.from_memo[plan.name] = True
            self.saved_seconds += seconds

    # ------------------------------------------------------------ measuring

    def _measure(self, record: dict[str, Any] | None) -> dict[str, Any]:
        from optkit.servers import Servers

        setup = self.setup
        cache = usable_folder(cache_folder(self.request.cache_dir), self.request.warn)
        make_private_folder(cache / "inductor")
        self.folder = new_run_folder(cache)
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "inductor" / "triton"),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(setup.machine.cpu_cores),
        }
        if setup.source.kind != "hub":
            environment |= {"HF_HUB_OFFLINE": "1"}
        arms = [compare.Arm(plan.name, self.trial_spec(plan)) for plan in setup.all_plans]
        self.proofs: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self.reference: dict[str, Any] = {}
        self.peaks: dict[str, Any] = {}
        timed = record is None
        protocol = self.protocol if timed else compare.Protocol(rounds=0, timeout=self.request.timeout)
        started = time.time()
        with Servers(preloaded(setup), environment, self.folder / "logs", cpu=setup.machine.device == "cpu") as servers:
            comparison = compare.Comparison(servers.pick, arms, protocol, self.request.seed, self.request.progress)
            comparison.run(lambda arm: self._inspect(comparison, arm, timed))
        if all(arm.ok for arm in arms):  # logs of a failed trial stay, for whoever looks into it
            shutil.rmtree(self.folder, ignore_errors=True)
        if not timed:
            assert record is not None
            return dict(record)
        row = self._record(comparison, started) | {"busy_cores": servers.busy, "host_seconds": compare.host_seconds(comparison)}
        fault: OptkitError | None = None
        try:
            self._add_quality(row)
        except OptkitError as error:  # of a plugin's or the user's metric: it must not cost what was measured
            fault = error
        row = finite(row)
        row["time"] = started
        try:
            row["id"] = self.store.append({name: value for name, value in row.items() if name != "time"})
        except OptkitError as error:  # a full disk must not cost what was measured
            row["id"] = None
            self.request.warn(str(error))
        if fault is not None:
            raise fault
        row["measured_now"] = True
        return row

    def trial_spec(self, plan: Plan) -> dict[str, Any]:
        """What the process of one plan is told."""
        setup = self.setup
        watch = {"task": setup.task, "steps": _all_steps(setup.plans), "settings": []} if plan is setup.baseline else None
        return {
            "plan": plan.to_json(),
            "watch": watch,
            "source": setup.source.to_json(),
            "machine": setup.machine.model_dump(),
            "timing_samples": [_plain(sample) for sample in self.timed_samples()],
            "calibration": [_plain(sample) for sample in setup.samples.calibration],
            "new_tokens": self.timed_tokens(),
            "threads": setup.machine.cpu_cores,
            "seed": self.request.seed,
            "folder": str(self.folder),
        }

    def _inspect(self, comparison: compare.Comparison, arm: compare.Arm, timed: bool) -> None:
        """While the arm's process lives: kernels, predictions, proof."""
        first = arm is comparison.arms[0]
        if timed:
            if first and arm.loaded.get("work"):
                self.peaks = comparison.ask(arm, "peaks", working_set=arm.loaded["work"]["weight_bytes"], dtype=arm.loaded["dtype"])
            comparison.ask(arm, "profile")
            answer = comparison.ask(arm, "prove", baseline=None if first else self.facts)
            if first:
                self.facts = answer["facts"]
            self.proofs[arm.name] = answer["proof"]
        if arm.name not in self.predictions:
            samples = self.setup.samples.samples

            def compute(missing: list[Sample]) -> list[dict[str, Any]]:
                reference = None if first else self.reference
                return comparison.ask(arm, "evaluate", samples=[_plain(sample) for sample in missing], reference=reference)

            self.predictions[arm.name] = remember_predictions(
                self.memo,
                self.specs[arm.name],
                samples,
                compute,
                force=self.request.force,
                keep=self.request.store_text and arm.name not in self.undescribed,
            )
        if first:
            self.reference = {row["digest"]: {"path": row["path"], "top": row["top"]} for row in self.predictions[arm.name] if "top" in row}

    def _record(self, comparison: compare.Comparison, started: float) -> dict[str, Any]:
        setup, first = self.setup, comparison.arms[0]
        noise = compare.noise(first.rounds, comparison.twin.rounds)
        reference = first
        if self.request.reference:
            named = {frozenset(plan.name.split("+")): plan.name for plan in setup.plans}
            wanted = named[frozenset(self.request.reference.replace(",", "+").split("+"))]
            reference = next(arm for arm in comparison.arms if arm.name == wanted)
        rows = []
        for arm, plan in zip(comparison.arms, setup.all_plans, strict=True):
            row = arm_row(arm, plan, self.proofs.get(arm.name, {}))
            row["limit_seconds"] = limit_seconds(arm, plan, self.peaks, self.timed_tokens())
            if arm is not reference and arm.ok and reference.ok and len(arm.rounds) == len(reference.rounds):
                row["speed_up"] = vars(speed_up(reference.rounds, arm.rounds, noise))
            rows.append(row)
        same = None
        if comparison.twin.ok and first.ok and len(first.rounds) == len(comparison.twin.rounds):
            same = vars(speed_up(first.rounds, comparison.twin.rounds))
        return {
            "kind": "run",
            "key": self.key,
            "task": setup.task,
            "model": setup.source.to_json(),
            "samples": {"name": setup.samples.name, "n": len(setup.samples.samples), "digest": setup.samples.digest},
            "timed": {"samples": len(self.timed_samples()), "tokens": self.timed_tokens() if setup.task == "generate" else None},
            "profile": setup.profile.name,
            "machine": setup.machine.model_dump(),
            "identity": self.identity,
            "protocol": {"rounds": comparison.rounds, "turns": self.protocol.turns, "repeat": comparison.repeat,
                         "interleaved": self.protocol.interleaved},
            "reference": reference.name,
            "baseline_again": same,
            "noise": noise,
            "peaks": self.peaks,
            "arms": rows,
            "seconds": time.time() - started,
            "seed": self.request.seed,
        }  # fmt: skip

    def _add_quality(self, result: dict[str, Any]) -> None:
        quality.add(result, self.setup, self.memo, self.predictions, self.identity["optkit"], self.metric)
        for row in result["arms"]:
            if row["name"] in self.predictions:
                row["predictions_from"] = "memo" if self.from_memo.get(row["name"]) else "measured"


def foreign_code_of(setup: Setup) -> str:
    """What the model's folder names and this run leaves out, in one line; nothing where the user allowed it."""
    source = setup.source
    if source.kind == "hub" or setup.baseline.settings["load.trust_remote_code"]:
        return ""
    return foreign_code.refused(Path(source.location) if source.kind == "folder" else Path(source.location).parent)


def new_run_folder(cache: Path) -> Path:
    """A folder for one run's logs and for its trials' files; those of runs older than a week are removed."""
    runs = cache / "runs"
    make_private_folder(runs)
    for old in runs.iterdir():
        if time.time() - old.stat().st_mtime > 7 * 86400:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=runs))


def preloaded(setup: Setup) -> list[str]:
    """Modules that the trials need and that only define things: imported once, by the server, instead of in each process."""
    from optkit.estimate import read_config

    modules = ["torch", "transformers", "optkit.predictions", "optkit.runner", "optkit.loading", "torch.profiler"]
    modules += [f"transformers.{name}" for name in ("generation.utils", "models.auto.modeling_auto", "models.auto.tokenization_auto")]
    kind = str((read_config(setup.source) or {}).get("model_type", ""))
    if kind.isidentifier():
        modules.append(f"transformers.models.{kind}.modeling_{kind}")
    return modules + list(dict.fromkeys(name for plan in setup.plans for step in plan.steps for name in step.technique.preload))


def protocol_of(request: Request, setup: Setup) -> compare.Protocol:
    """Rounds and turns, and whether all arms fit the device at once."""
    rounds = request.repeats or (THOROUGH_ROUNDS if request.thorough else 6)
    from optkit.estimate import estimate_bytes

    wanted = sum(estimate_bytes(setup.source, plan) or 0 for plan in [setup.baseline, *setup.all_plans])
    free = setup.machine.memory_bytes if setup.machine.device == "cuda" else setup.machine.host_memory_bytes
    return compare.Protocol(
        rounds=rounds, turns=2, unit_seconds=0.1 if setup.machine.device == "cuda" else 0.25,
        interleaved=wanted <= FITTING_SHARE * free, at_once=setup.machine.device == "cuda", timeout=request.timeout,
        seconds=request.time_limit,
    )  # fmt: skip


def _plain(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.id, "prompt": sample.prompt, "answer": sample.answer, "text": sample.text,
        "messages": sample.messages, "extra": sample.extra,
    }  # fmt: skip


def _all_steps(plans: list[Plan]) -> list[dict[str, Any]]:
    steps = {step.name: {"name": step.name, "options": step.options.model_dump(mode="json")} for plan in plans for step in plan.steps}
    return list(steps.values())


def _failed_in(record: dict[str, Any] | None, name: str) -> bool:
    return record is not None and any(arm["name"] == name and arm["state"] != "ok" for arm in record["arms"])
