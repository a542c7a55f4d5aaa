"""speculate: prompt lookup decoding, several tokens a forward pass where a text repeats what stood before it.

What followed the last place of the newest tokens is proposed as a draft, and one forward pass verifies all of it: decoding reads every
weight a pass anyway, so a few tokens more cost little on a GPU. The greedy text stays the same, and no second model is needed. It gains
where texts copy (summaries, extraction, edits of code) and nothing where they do not: drafts are switched off where they do not pay.

Prompt Lookup Decoding (Saxena 2023); Fast Inference from Transformers via Speculative Decoding (Leviathan et al. 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from optkit import Claims, Engine, Limit, Machine, Options, Setting, Technique, TrialContext, UnavailableError, hookimpl

if TYPE_CHECKING:
    from optkit.technique import Task

#: Settings that a loop with drafts does not read, with the values that ask for nothing.
UNREAD = {"generate.no_repeat_ngram_size": (None, 0), "generate.cache": ("dynamic", "static"), "generate.slots": (None,)}


class SpeculateOptions(Options):
    tokens: int = Field(5, ge=1, le=64, description="tokens a draft")
    ngram: int = Field(
        2, ge=1, le=16, description="newest tokens, at most, that the draft's place must share; longer matches are preferred"
    )
    adaptive: bool = Field(True, description="measure while generating, and switch drafts off where they do not pay")


technique = Technique(
    name="speculate",
    stage="generation",
    summary="drafts looked up in the text itself and verified together; same greedy text, gains only where texts repeat themselves",
    adds=frozenset({"draft-tokens"}),
    refuses=frozenset({"many-paths"}),
    tasks=frozenset({"generate"}),
    options=SpeculateOptions,
    paper="https://arxiv.org/abs/2211.17192",
    tested_on=("cpu", "NVIDIA H200"),
    exceptions={"effect": "a tiny model with random weights hardly repeats its text, so that few drafts are ever accepted"},
)


@hookimpl
def configure(options: SpeculateOptions, task: Task, machine: Machine) -> Claims:
    asked = {"tokens": options.tokens, "ngram": options.ngram}
    return Claims(
        settings=tuple(
            Setting(name=f"generate.prompt_lookup_{name}", value=value, because=f"speculate.{name}", strength="must")
            for name, value in asked.items()
        ),
        limits=(
            Limit(name="generate.num_beams", maximum=1, because="a draft is verified along one path"),
            *(Limit(name=name, allowed=values, because="the loop that verifies drafts does not do it") for name, values in UNREAD.items()),
        ),
    )


@hookimpl
def wrap_engine(engine: Engine, trial: TrialContext) -> Engine | None:
    """A loop that takes batches and counts, instead of ``generate``, which drafts for one prompt at a time."""
    from optkit import TransformersEngine

    options = trial.options
    assert isinstance(options, SpeculateOptions)
    if getattr(engine, "payoff", None) is not None:  # it reads the settings itself
        engine.payoff.adaptive = options.adaptive  # type: ignore[attr-defined]
        return None
    if type(engine) is not TransformersEngine:
        raise UnavailableError(f"drafts need an engine that verifies them, and this plan has '{engine.name}'; leave out one of them")

    from optkit_plugins.kernels.speculative.engine import SpeculativeEngine

    return SpeculativeEngine(engine.model, engine.trial, adaptive=options.adaptive)


@hookimpl
def prove_effect(trial: TrialContext) -> dict[str, Any]:
    """Tokens accepted and passes saved since the engine was built; without any, the facts are those of a run without drafts."""
    payoff = getattr(trial.engine, "payoff", None)
    if payoff is None:
        return {"accepted_tokens": 0, "passes_saved": 0, "summary": "no drafts"}
    off = f"; {payoff.switched_off} × switched off, last after {payoff.reason}" if payoff.switched_off else ""
    if not payoff.accepted:
        return {"accepted_tokens": 0, "passes_saved": 0, "summary": f"none of {payoff.drafted} drafted tokens accepted{off}"}
    saved = payoff.plain_passes - payoff.passes
    return {
        "drafted_tokens": payoff.drafted,
        "accepted_tokens": payoff.accepted,
        "passes": payoff.passes,
        "passes_saved": saved,
        "switched_off": payoff.switched_off,
        "summary": f"{payoff.accepted} of {payoff.drafted} drafted tokens accepted, {saved} of {payoff.plain_passes} forward passes saved{off}",
    }
