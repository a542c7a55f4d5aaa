"""Checks of what a technique does to tiny models: it runs, is proven, counts its bytes, is saved, and goes together with others."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from optkit.errors import OptkitError, PlanConflict
from optkit.exporting import TOLERANCE_NATS
from optkit.plan import Plan
from optkit.plugin_loading import one_line
from optkit.proof import ACTIVE, verdict
from optkit.testing.answers import ROUNDING_NATS, distributions_moved, incomplete, largest_difference, same_again
from optkit.testing.checking import CheckFailed, NotChecked
from optkit.testing.models import KINDS, plain_greedy, plain_scores, prompts
from optkit.testing.subject import NEW_TOKENS, Outcome, Subject

#: Declared bits of a linear weight against its stored bits: scales and padding weigh more on a tiny model.
BITS_SLACK = 1.3


def check_runs(subject: Subject, kind: str) -> str:
    """Finite, complete, the same again, from the engine and from the seed; as plain transformers unless it is declared lossy."""
    _ready(subject)
    try:
        outcome = subject.outcome(kind)
    except OptkitError as error:
        raise CheckFailed(f"it refuses a {kind} model: {' '.join(str(error).split())}") from error
    if problem := incomplete(outcome):
        raise CheckFailed(problem)
    if not same_again(outcome) and "random-output" not in _properties(subject):
        what = "texts" if outcome.tokens is not None else "scores"
        raise CheckFailed(f"asked for the same {what} twice, its engine gives others the second time: the first time left something behind")
    again = subject.carry_out(subject.plan(), subject.source(kind), prove=False)
    apart = distributions_moved(again) if subject.task == "score" else 0.0
    again.session.close()
    moved = largest_difference(outcome.scores, again.scores)
    if again.tokens != outcome.tokens or moved > ROUNDING_NATS / 100:
        raise CheckFailed(
            f"two runs with one seed differ: by {moved:.2g} nats, texts {'equal' if again.tokens == outcome.tokens else 'unequal'}"
        )
    if not apart <= TOLERANCE_NATS.get(_dtype(outcome), 1e-2):
        raise CheckFailed(f"its engine's score and log_probs speak of different distributions: {apart:.2g} nats lie between them")
    found = "finite, repeatable" if subject.task == "generate" else f"task {subject.task}: finite, repeatable"
    if subject.plan().lossy or _dtype(outcome) != "float32" or {"random-output", "many-paths"} & _properties(subject):
        return found
    model = subject.untouched(kind).session.model
    moved = largest_difference(outcome.scores, plain_scores(model, prompts()))
    others = outcome.tokens is not None and outcome.tokens != plain_greedy(model, prompts(), NEW_TOKENS)
    if others or moved > ROUNDING_NATS:
        raise CheckFailed(f"it is not declared lossy, and texts or scores differ from plain transformers' (up to {moved:.2g} nats)")
    return f"{found}, as plain transformers ({moved:.1g} nats)"


def check_effect(subject: Subject, kind: str) -> str:
    """Proven at work, by JSON facts that hold no timings, and the untouched model can be asked for them too."""
    outcome, untouched = _outcome(subject, kind), subject.untouched(kind)
    facts, others = outcome.facts[subject.name], untouched.facts[subject.name]
    for whose, said in (("its own model", facts), ("the untouched model", others)):
        if "error" in said:
            raise CheckFailed(f"prove_effect fails on {whose}: {said['error']}")
        _json(said, whose)
    again = outcome.session.facts()[subject.name]
    if again != facts:
        raise CheckFailed(
            f"prove_effect gives other facts when it is asked again: {_changed(facts, again)}; leave out timings and counters"
        )
    found = _verdict(subject, outcome, untouched)
    if found["verdict"] != ACTIVE:
        raise CheckFailed(f"{found['verdict']}: the model did not change, and prove_effect says the same of the untouched one")
    if "\n" in found["summary"] or not found["summary"]:
        raise CheckFailed("the fact 'summary' is one short line for the table")
    return found["summary"]


def check_bytes(subject: Subject, kind: str) -> str:
    """``bytes_stored`` among the facts, and ``weight_bits`` among the claims, are what the model really stores."""
    from optkit.modules import stored_bytes

    outcome = _outcome(subject, kind)
    declared = outcome.facts[subject.name].get("bytes_stored")
    stored = stored_bytes(outcome.session.model) if outcome.session.model is not None else None
    said = []
    if declared is not None:
        if declared != stored:
            raise CheckFailed(f"its fact bytes_stored is {declared:,}, and optkit.modules.stored_bytes counts {stored:,}")
        said.append(f"{stored:,} bytes stored")
    claimed = next(step.claims.weight_bits for step in subject.plan().steps if step.name == subject.name)
    if claimed is not None:
        bits = _bits_a_weight(subject.untouched(kind).session.model, outcome.session.model)
        if bits > BITS_SLACK * claimed:
            raise CheckFailed(f"it claims {claimed:g} bits a linear weight, and {bits:.1f} are stored: memory estimates would be wrong")
        said.append(f"{bits:.1f} bits a linear weight")
    return ", ".join(said) or "declares none (a fact bytes_stored, or the claim weight_bits)"


def _bits_a_weight(before: Any, after: Any) -> float:
    """Stored bits of what stands where the plain linear layers stood, a weight of them."""
    from optkit.modules import linears, stored_bytes

    weights = stored = 0
    module: Any
    for name, module in linears(before):
        try:
            now = after.get_submodule(name)
        except AttributeError:
            continue  # taken out
        weights += module.weight.numel()
        stored += stored_bytes(now)
    return 8 * stored / weights if weights else 0.0


def check_saves(subject: Subject, kind: str) -> str:
    """Written and loaded again, the model scores the same."""
    outcome = _outcome(subject, kind)
    trial = outcome.session.contexts[subject.name]
    model: Any = outcome.session.model
    if model is None or not trial.changes:
        return "the model is unchanged"
    before = plain_scores(model, prompts())
    hook = subject.registry.hook(subject.name, "save_model")
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = hook(model=model, folder=Path(folder), trial=trial) if hook else None
        except OptkitError as error:
            raise CheckFailed(f"it refuses to save a {kind} model: {one_line(error)}") from error
        if not written:
            model.save_pretrained(folder, safe_serialization=True)
        if not any(Path(folder).glob("*.safetensors")):
            return "written in a format of its own"
        from optkit.sources import ModelSource

        again = subject.carry_out(subject.plan(alone=True), ModelSource("saved", "folder", folder), prove=False)
        moved = largest_difference(before, plain_scores(again.session.model, prompts()))
    limit = TOLERANCE_NATS.get(_dtype(outcome), 1e-2)
    if not moved <= limit:
        raise CheckFailed(
            f"loaded again, it scores differently: up to {moved:.2g} nats, {limit:g} allowed; answer save_model, or refuse there"
        )
    return f"loaded again: {moved:.1g} nats"


def check_combines(subject: Subject) -> str:
    """With every other technique: a plan, or a refusal with its reason; and what can be run in this process runs."""
    _ready(subject)
    kind = next((kind for kind in KINDS if _runs(subject, kind)), None)
    if kind is None:
        raise NotChecked("it runs on no tiny model")
    problems, refused, planned, ran, alone = [], 0, 0, 0, []
    for other in subject.registry:
        if other.name == subject.name or other.status != "ready":
            continue
        try:
            plan = subject.plan(other.name)
        except PlanConflict:
            refused += 1
            continue
        except Exception as error:
            if _plans_alone(subject, other.name):
                problems.append(f"with {other.name}: {one_line(error)}")
            else:
                alone.append(other.name)
            continue
        if not _is_partner(subject, other.name, plan):
            planned += 1
            continue
        try:
            problem = _together(subject, other.name, plan, kind)
        except NotChecked:
            alone.append(other.name)
            continue
        problems += [f"with {other.name}: {problem}"] if problem else []
        ran += 1
    if problems:
        raise CheckFailed("; ".join(problems))
    failing = f", {len(alone)} that fail alone as well ({', '.join(alone)})" if alone else ""
    return f"{ran} run together with it, {planned} planned, {refused} refused with a reason{failing}"


def _plans_alone(subject: Subject, other: str) -> bool:
    try:
        subject.plan(other, alone=True)
    except Exception:
        return False
    return True


def _is_partner(subject: Subject, other: str, plan: Plan) -> bool:
    """Whether a pair is run: those that were asked for, else all in which the other one builds no engine, which may take minutes."""
    if subject.partners is not None:
        return other in subject.partners
    return not any("engine" in step.roles for step in plan.steps if step.name == other)


def _together(subject: Subject, other: str, plan: Plan, kind: str) -> str:
    """What goes wrong with a pair that the plan allows. :raises NotChecked: where the other one fails alone as well."""
    try:
        outcome = subject.carry_out(plan, subject.source(kind))
    except Exception as error:
        try:
            subject.carry_out(subject.plan(other, alone=True), subject.source(kind), prove=False).session.close()
        except Exception:
            raise NotChecked(one_line(error)) from None
        return f"the plan allows it, and the run does not: {one_line(error)}"
    try:
        if problem := incomplete(outcome):
            return problem
        alone = _verdict(subject, _outcome(subject, kind), subject.untouched(kind))["verdict"]
        found = _verdict(subject, outcome, subject.untouched(kind))["verdict"]
        return "" if found in (ACTIVE, alone) else f"it is {found}, and alone it is {alone}"
    finally:
        outcome.session.close()


# ------------------------------------------------------------ what several checks ask


def _ready(subject: Subject) -> None:
    """:raises NotChecked: where the technique cannot run here."""
    row = subject.row
    if row.status == "unavailable":
        raise NotChecked(f"{row.cause}. {row.fix}")
    if row.status != "ready" or row.technique is None:
        raise CheckFailed(f"{row.status}: {row.cause}")
    if subject.machine.device not in row.technique.devices:
        raise NotChecked(f"it needs {' or '.join(sorted(row.technique.devices))}, and this machine computes on {subject.machine.device}")
    try:
        subject.plan()
    except PlanConflict as conflict:
        raise NotChecked("; ".join(conflict.conflicts)) from None


def _outcome(subject: Subject, kind: str) -> Outcome:
    """:raises NotChecked: where it does not run, which is the first check's business."""
    _ready(subject)
    if not _runs(subject, kind):
        raise NotChecked(f"it does not run on a {kind} model")
    return subject.outcome(kind)


def _runs(subject: Subject, kind: str) -> bool:
    try:
        subject.outcome(kind)
    except Exception:
        return False
    return True


def _verdict(subject: Subject, outcome: Outcome, untouched: Outcome) -> dict[str, Any]:
    changes = outcome.session.contexts[subject.name].changes
    return verdict(outcome.facts[subject.name], changes, untouched.facts[subject.name])


def _properties(subject: Subject) -> frozenset[str]:
    return frozenset(name for step in subject.plan().steps for name in step.adds)


def _dtype(outcome: Outcome) -> str:
    return str(outcome.session.model.dtype).removeprefix("torch.") if outcome.session.model is not None else "unknown"


def _json(facts: dict[str, Any], whose: str) -> None:
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckFailed(f"prove_effect's facts about {whose} are no JSON: {error}") from None


def _changed(first: dict[str, Any], second: dict[str, Any]) -> str:
    return ", ".join(sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name)))
