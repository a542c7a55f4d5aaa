"""The Python face: ``optimize`` a model that you hold, ``run`` what the command line runs."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.plan import Choice, Plan, make_plan
from optkit.registry import Registry, discover
from optkit.session import Session
from optkit.settings import KNOWN, Setting
from optkit.sources import ModelSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from optkit.engine import Engine


class Optimized:
    """A model with techniques applied.

    :ivar model: an ordinary transformers model. :ivar engine: what generates and scores with the techniques active.
    :ivar plan: the plan that was carried out.
    """

    def __init__(self, session: Session):
        self._session = session
        self.plan: Plan = session.plan

    @property
    def model(self) -> PreTrainedModel:
        return self._session.model  # type: ignore[return-value]

    @property
    def engine(self) -> Engine:
        return self._session.engine

    @property
    def tokenizer(self) -> Any:
        return self._session.tokenizer

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], *, new_tokens: int | None = None) -> list[Any]:
        """Continuations: texts for texts, token ids for token ids.

        :param new_tokens: upper bound a prompt; by default the setting ``generate.max_new_tokens``.
        """
        limit = new_tokens or int(self.plan.settings["generate.max_new_tokens"])
        if not prompts:
            return []
        if isinstance(prompts[0], str):
            rows = self.engine.generate([self.tokenizer(prompt).input_ids for prompt in prompts], new_tokens=limit)
            return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return self.engine.generate(prompts, new_tokens=limit)  # type: ignore[arg-type]

    def score(self, sequences: Sequence[str] | Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Natural log probabilities of each token from the second on, one float32 tensor a sequence."""
        ids = [self.tokenizer(text).input_ids if isinstance(text, str) else list(text) for text in sequences]
        return self.engine.score(ids, [1] * len(ids))

    def proof(self) -> dict[str, dict[str, Any]]:
        """Technique -> verdict, summary, facts, and what changed in the model."""
        return self._session.proof()

    def close(self) -> None:
        self._session.close()


def optimize(
    model: PreTrainedModel, tokenizer: Any, plugins: Sequence[str] = (), *, profile: str | None = None, set: Mapping[str, Any] | None = None,
    task: str = "generate", calibration: list[list[int]] | None = None, seed: int = 0, registry: Registry | None = None,
) -> Optimized:  # fmt: skip
    """Apply techniques to a model that you hold, in a planned order. The model may be changed in place.

    :param plugins: technique names; without any, those of ``profile``.
    :param set: options and settings, such as ``{"nf4.blocksize": 64, "generate.max_new_tokens": 32}``.
    :param calibration: token ids, one list a sample, for techniques that calibrate.
    :raises UsageError: for unknown names or options, and for techniques that do not go together (``PlanConflict``, with every reason).
    :raises UnavailableError: for a technique whose requirements are missing.
    """
    from optkit.machine import detect
    from optkit.profile import load_profile

    machine = detect()
    if machine.device != model.device.type == "cpu":
        machine = load_profile("cpu").as_machine(machine)  # a model on the CPU of a GPU machine is optimized for the CPU
    options, wishes = split_options(set or {}, origin="set=")
    choices = [Choice(name, options.pop(name, {})) for name in plugins]
    if profile and not plugins:
        defaults = load_profile(profile).defaults
        choices = [
            Choice(name, dict(default.options) | options.pop(name, {}), because=default.because) for name, default in defaults.items()
        ]
    if options:
        from optkit.errors import UsageError

        raise UsageError(f"set= names options of '{next(iter(options))}', which is not among the plugins")
    registry = registry or discover({choice.name for choice in choices})
    plan = make_plan(registry, machine, task, choices, wishes)
    source = ModelSource(name="given", kind="folder", location=getattr(model.config, "_name_or_path", "") or ".")
    folder = tempfile.mkdtemp(prefix="optkit-")
    session = Session(registry, plan, source, machine, Path(folder), seed=seed)
    weakref.finalize(session, shutil.rmtree, folder, ignore_errors=True)
    session.load(model, tokenizer)
    session.transform(calibration)
    session.build()
    return Optimized(session)


def split_options(pairs: Mapping[str, Any], *, origin: str) -> tuple[dict[str, dict[str, Any]], list[Setting]]:
    """``{"nf4.blocksize": 64, "generate.max_new_tokens": 8}`` -> options by technique, and settings."""
    from optkit.errors import UsageError
    from optkit.settings import check_name

    groups = {name.partition(".")[0] for name in KNOWN}
    options: dict[str, dict[str, Any]] = {}
    wishes = []
    for key, value in pairs.items():
        head, dot, tail = key.partition(".")
        if not dot or not tail:
            raise UsageError(f"option '{key}' is not TECHNIQUE.OPTION or GROUP.SETTING, such as nf4.blocksize or generate.max_new_tokens")
        if head in groups:
            wishes.append(Setting(name=check_name(key), value=value, because=f"asked for with {origin}", by=origin, strength="flag"))
        else:
            options.setdefault(head, {})[tail] = value
    return options, wishes


def run(**request: Any) -> dict[str, Any]:
    """What ``optkit run`` does, as a function: the record of baseline and techniques.

    Takes the fields of ``optkit.request.Request``: ``model``, ``profile``, ``plugins``, ``set``, ``task``, ``samples``, ``limit`` …
    """
    from optkit.experiment import execute
    from optkit.request import Request

    return execute(Request(**request))
