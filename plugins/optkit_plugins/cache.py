"""Cache: a prompt that was answered once is answered at once the next time, and so is a sequence that was scored.

Real request streams repeat themselves; greedy texts and scores of equal requests are equal, so the second costs a dictionary look-up.
Repeats within one batch are computed once, too. Price: memory for the answers, and nothing gained where no request comes twice. Not
together with sampling, where equal prompts are meant to get different texts. What is left of a batch is a smaller batch: in float32 that
changes no greedy token, in bfloat16 it may, as any other batch composition may.

Timing is honest: every timed unit starts with an empty cache (``begin_unit``), so only repeats among the samples themselves count.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from optkit import Claims, Engine, Limit, Options, Technique, hookimpl

if TYPE_CHECKING:
    import torch

    from optkit import TrialContext


class CacheOptions(Options):
    entries: int = Field(10_000, ge=1, description="answers kept; beyond it the one that was not used for longest goes")


technique = Technique(
    name="cache",
    stage="cache",
    summary="answer repeated prompts and score requests from memory: free where requests repeat, nothing where they do not",
    refuses=frozenset({"random-output"}),
    tasks=frozenset({"score", "generate"}),
    options=CacheOptions,
    tested_on=("cpu", "NVIDIA H200"),
)


class CachedEngine(Engine):
    """An engine that remembers its answers.

    A request is its token ids with every argument of the call; the settings need not be part of it, because an engine has one set for
    life. Whole distributions (``log_probs``) are passed through: one sequence's can take more memory than the model.

    :ivar lookups: requests since the last ``begin_unit``.
    :ivar hits: those of them that were not computed.
    """

    def __init__(self, inner: Engine, entries: int):
        self.inner = inner
        self.entries = entries
        self.name = inner.name
        self.cannot_score = inner.cannot_score
        self.lookups = self.hits = 0
        self._answers: OrderedDict[Any, Any] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        """What is not cached is the inner engine's own (its model, a server's address)."""
        if name == "inner":
            raise AttributeError(name)  # asked for before __init__, by copy or pickle
        return getattr(self.inner, name)

    def begin_unit(self) -> None:
        """Forget everything: called before each timed unit, so that no repeat of the measurement is served from memory."""
        self._answers.clear()
        self.lookups = self.hits = 0
        begin = getattr(self.inner, "begin_unit", None)
        if begin:
            begin()

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        requests = [("generate", tuple(prompt), new_tokens, exact) for prompt in prompts]

        def compute(missing: list[Any]) -> list[Any]:
            return self.inner.generate([list(request[1]) for request in missing], new_tokens=new_tokens, exact=exact)

        return [list(row) for row in self._answer(requests, compute)]

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        requests = [("score", tuple(sequence), start) for sequence, start in zip(sequences, starts, strict=True)]

        def compute(missing: list[Any]) -> list[Any]:
            return self.inner.score([list(request[1]) for request in missing], [request[2] for request in missing])

        return [scores.clone() for scores in self._answer(requests, compute)]

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        return self.inner.log_probs(sequences, starts)

    def close(self) -> None:
        self._answers.clear()
        self.inner.close()

    def _answer(self, requests: list[Any], compute: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """The answers in the order of the requests; ``compute`` gets each unknown one once."""
        missing = [request for request in dict.fromkeys(requests) if request not in self._answers]
        self.lookups += len(requests)
        self.hits += len(requests) - len(missing)
        # Known answers are taken out before new ones may push them out.
        answers = {request: self._answers[request] for request in requests if request in self._answers}
        if missing:
            answers |= zip(missing, compute(missing), strict=True)
        for request in requests:
            self._answers[request] = answers[request]
            self._answers.move_to_end(request)
        while len(self._answers) > self.entries:
            self._answers.popitem(last=False)
        return [answers[request] for request in requests]


@hookimpl
def configure() -> Claims:
    why = "equal prompts are meant to get different texts when tokens are drawn, and a cache would give one of them again"
    return Claims(limits=(Limit(name="generate.do_sample", allowed=(False,), because=why),))


@hookimpl
def wrap_engine(engine: Engine, trial: TrialContext) -> Engine:
    options = trial.options
    assert isinstance(options, CacheOptions)
    trial.notes["cache"] = wrapped = CachedEngine(engine, options.entries)
    return wrapped


@hookimpl
def prove_effect(trial: TrialContext) -> dict[str, Any]:
    """Hits since the last timed unit began; without any, the facts are those of a run without a cache."""
    cache = trial.notes.get("cache")
    if cache is None or not cache.hits:
        looked = f"none of {cache.lookups} requests came twice" if cache else "no cache"
        return {"hits": 0, "summary": looked}
    return {"hits": cache.hits, "lookups": cache.lookups, "summary": f"{cache.hits} of {cache.lookups} requests answered from memory"}
