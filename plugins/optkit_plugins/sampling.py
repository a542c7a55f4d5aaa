"""sampling: how the next token is chosen: drawn, penalized, or by beams.

A setting of the *task*, not a speed-up: drawing makes texts varied and unrepeatable, beams cost as many times the work,
``no_repeat_ngram_size`` forbids repeated keys and so ruins JSON and other structured answers. Leave it out to compare techniques:
greedy text is what shows a difference.

The Curious Case of Neural Text Degeneration (Holtzman et al. 2020).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from optkit import Claims, Machine, Options, Setting, Technique, TrialContext, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit.technique import Task

#: Options that do something only while tokens are drawn.
DRAWING = ("temperature", "top_k", "top_p")
#: Values that change nothing.
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "length_penalty": 1.0}


class SamplingOptions(Options):
    do_sample: bool | None = Field(None, description="draw tokens; by default unless only penalties or beams are asked for")
    temperature: float | None = Field(None, gt=0, le=10, description="divisor of the logits; below 1 sharpens")
    top_k: int | None = Field(None, ge=1, description="draw among the k most probable tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="draw among the tokens that hold this probability")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="divisor of the logits of tokens already used; 1 is none")
    num_beams: int | None = Field(None, ge=1, le=64, description="beams of beam search; 1 is none")
    no_repeat_ngram_size: int | None = Field(None, ge=1, description="n-grams of this size appear once (ruins structured answers)")
    length_penalty: float | None = Field(None, description="exponent on the length in beam search; above 0 favours longer texts")

    @property
    def draws(self) -> bool:
        if self.do_sample is not None:
            return self.do_sample
        others = (self.repetition_penalty, self.num_beams, self.no_repeat_ngram_size)
        return any(getattr(self, name) is not None for name in DRAWING) or all(value is None for value in others)


technique = Technique(
    name="sampling",
    stage="generation",
    summary="temperature, top-k, top-p, penalties or beams; drawing makes texts unrepeatable, beams multiply the work",
    tasks=frozenset({"generate"}),
    lossy=True,
    options=SamplingOptions,
    paper="https://arxiv.org/abs/1904.09751",
    tested_on=("cpu", "NVIDIA H200"),
)


@hookimpl
def configure(options: SamplingOptions, task: Task, machine: Machine) -> Claims:
    values = options.model_dump(exclude_none=True) | {"do_sample": options.draws}
    beams = (options.num_beams or 1) > 1
    unread = [name for name in DRAWING if getattr(options, name) is not None and not options.draws]
    problem = None
    if unread:
        problem = f"{', '.join(unread)} is read only while tokens are drawn; set sampling.do_sample=true, or leave it out"
    elif options.length_penalty is not None and not beams:
        problem = "length_penalty is read only in beam search; set sampling.num_beams to 2 or more, or leave it out"
    properties = {"random-output"} if options.draws else set()
    notes = (
        ("no_repeat_ngram_size forbids repeated keys: not for JSON and other structured answers",) if options.no_repeat_ngram_size else ()
    )
    return Claims(
        settings=tuple(
            Setting(name=f"generate.{name}", value=value, because="asked for", strength="must") for name, value in values.items()
        ),
        adds=frozenset(properties | ({"many-paths"} if beams else set())),
        notes=notes,
        problem=problem,
    )


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    """The values that generation really used: the engine's, filled in with the model's own ``generation_config``."""
    names = tuple(SamplingOptions.model_fields)
    describe = getattr(trial.engine, "generation_config", None)
    if describe is None or model is None:
        facts = {name: trial.settings[f"generate.{name}"] for name in names}
    else:
        config, _ = model._prepare_generation_config(describe(1, False))  # type: ignore[operator]
        facts = {name: getattr(config, name, None) for name in names if name not in DRAWING or config.do_sample}
    shown = [f"{name} {value}" for name, value in facts.items() if value not in (None, False) and value != NEUTRAL.get(name)]
    return facts | {"summary": ", ".join(shown) or "greedy"}
