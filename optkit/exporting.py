"""``optkit export``: the optimized model as an ordinary folder, and the check that loading it again gives the same scores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from optkit.errors import OptkitError, UsageError
from optkit.folders import cache_folder, usable_folder
from optkit.trial_child import report_progress

#: Samples whose scores are compared before and after, and the difference in nats a token that rounding explains.
CHECKED_SAMPLES = 8
TOLERANCE_NATS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def export_model(request: Any, folder: Path) -> dict[str, Any]:
    """Write the model of a plan to ``folder``.

    :return: ``folder``, ``files``, ``bytes``, ``writer``, ``check`` in words, and ``largest_difference`` in nats a token.
    :raises UsageError: when the folder is not empty. :raises OptkitError: when a loaded copy scores differently.
    """
    from optkit.experiment import Experiment, new_run_folder
    from optkit.request import prepare
    from optkit.trial import TrialServer

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{folder}' is not an empty folder; export writes a new one")
    setup = prepare(request)
    setup.source = setup.source.resolved()
    plan = setup.plans[-1] if setup.plans else setup.baseline
    cache = usable_folder(cache_folder(request.cache_dir), request.warn)
    experiment = Experiment(setup)
    experiment.folder = new_run_folder(cache)
    spec = experiment.trial_spec(plan)
    folder.mkdir(parents=True, exist_ok=True)
    with TrialServer(env={"HF_HUB_OFFLINE": "1"}, log_folder=experiment.folder / "logs") as server:
        writer = server.spawn("optkit.exporting:Exporter", spec, name="export")
        request.progress(1, 3, "loading and transforming")
        facts = writer.call("export", folder=str(folder.resolve()), timeout=request.timeout)
        writer.end()
        request.progress(2, 3, "loading it again")
        if facts["reloadable"]:
            again = {**spec, "plan": {**spec["plan"], "steps": []}, "source": {"name": folder.name, "kind": "folder",
                     "location": str(folder.resolve()), "shrink": False}}  # fmt: skip
            reader = server.spawn("optkit.exporting:Exporter", again, name="reload")
            scores = reader.call("scores", timeout=request.timeout)
            reader.end()
            facts |= check(facts.pop("scores"), scores, facts["dtype"])
        else:
            facts |= {"check": f"written in {facts['writer']}'s own format, which its own library reads back", "largest_difference": None}
            facts.pop("scores")
    shutil.rmtree(experiment.folder, ignore_errors=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"folder": str(folder), "files": len(files), "bytes": sum(path.stat().st_size for path in files), **facts}


def check(before: list[float], after: list[float], dtype: str) -> dict[str, Any]:
    """Compare mean log probabilities a token. :raises OptkitError: beyond what rounding explains."""
    largest = max((abs(a - b) for a, b in zip(before, after, strict=True)), default=0.0)
    limit = TOLERANCE_NATS.get(dtype, 1e-2)
    if not largest <= limit:
        raise OptkitError(
            f"the exported model scores differently when it is loaded again: up to {largest:.3g} nats a token, {limit:g} allowed in {dtype}; "
            "the folder is left for inspection"
        )
    return {"check": f"loaded again: scores of {len(before)} samples agree to {largest:.2g} nats a token", "largest_difference": largest}


class Exporter:
    """In a trial's process: builds the plan, writes the model, scores samples."""

    calls = ("export", "scores")

    def __init__(self, spec: dict[str, Any]):
        from optkit.runner import Runner

        self.runner = Runner(spec)
        self.loaded = False

    def _load(self) -> None:
        if not self.loaded:
            self.runner.load()
            self.loaded = True

    def scores(self) -> list[float]:
        """Mean log probability a token of each checked sample."""
        self._load()
        session = self.runner.session
        samples = self.runner.samples[:CHECKED_SAMPLES]
        means = []
        for sample in samples:
            ids = sample.prompt_ids + sample.answer_ids
            means.append(float(session.engine.score([ids], [1])[0].double().mean()) if len(ids) > 1 else 0.0)
        return means

    def export(self, folder: str) -> dict[str, Any]:
        self._load()
        session = self.runner.session
        model = session.model
        if model is None:
            raise OptkitError("this plan computes elsewhere and has no model here to export")
        scores = self.scores() if session.engine.cannot_score is None else []
        report_progress(text="writing")
        writer = "transformers"
        for step in reversed(session.plan.steps):
            hook = session.registry.hook(step.name, "save_model")
            if hook and hook(model=model, folder=Path(folder), trial=session.contexts[step.name]):
                writer = step.name
                break
        else:
            model.save_pretrained(folder, safe_serialization=True)
        session.tokenizer.save_pretrained(folder)
        reloadable = any(Path(folder).glob("*.safetensors"))
        return {"writer": writer, "scores": scores, "reloadable": reloadable, "dtype": str(model.dtype).removeprefix("torch.")}
