"""The engine of compiled graphs: one decode step a bucket of (rows × columns), and one forward pass for scoring."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.utils import counters

from optkit import TransformersEngine, UnavailableError
from optkit.engine import pad_left, pad_right, trim
from optkit_plugins.kernels.attention import EngineAttention
from optkit_plugins.kernels.decode import EndWatch, Sampler, Slot, mask_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext

#: Steps between two looks at whether all texts have ended.
STEPS_PER_LOOK = 4
#: Columns of the smallest cache; larger ones double.
FEWEST_COLUMNS = 64
#: A bucket that is already compiled serves smaller batches down to this part of its rows and columns: computing a few rows for
#: nothing is cheaper than another graph.
SPARE_ROWS, SPARE_COLUMNS = 4, 2
#: Scored rows are padded to a multiple of this, which keeps kernels aligned.
SCORE_MULTIPLE = 16
#: transformers' processors without memory: a function of the scores alone, so that they may run inside the graph.
STATELESS = ("Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta", "TopH")


@dataclass
class Tally:
    """What was compiled. A recompile is a graph that an already warm call needed again."""

    graphs: int = 0
    graph_breaks: int = 0
    recompiles: int = 0
    buckets: list[str] = field(default_factory=list)

    def count(self, call: Callable[[], Any], name: str, *, first: bool) -> Any:
        """Run ``call`` and note the graphs that it compiled. ``first``: they are expected, under ``name``."""
        if first:
            self.buckets.append(name)
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        try:
            with warnings.catch_warnings():
                # torch's own compiler imports modules that still use torch.jit; nothing that a user could change
                warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
                return call()
        finally:
            new = counters["stats"]["unique_graphs"] - graphs
            self.graphs += new
            self.graph_breaks += sum(counters["graph_break"].values()) - breaks
            self.recompiles += 0 if first else new


@dataclass
class Bucket:
    """One compiled step with its buffers; ``warm`` once it has run."""

    name: str
    slot: Slot
    step: Callable[[], None]
    warm: bool = False


class CompiledEngine(TransformersEngine):
    """Generates with a compiled step over a static cache, and scores with a compiled forward pass.

    :param arguments: of ``torch.compile``.
    :param score: compile the scoring pass too; else it runs as transformers does it.
    """

    name = "compiled"

    def __init__(self, model: PreTrainedModel, trial: TrialContext, arguments: dict[str, Any], *, score: bool):
        super().__init__(model, trial)
        self.attention = EngineAttention(model)
        check_supported(model, self.attention)
        self.arguments, self.compile_score = arguments, score
        self.tally = Tally()
        self.slots: dict[tuple[int, int], Bucket] = {}
        self.samplers: dict[bool, tuple[Sampler, bool]] = {}
        self.forwards: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    # ------------------------------------------------------------ generation

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        if not prompts or new_tokens < 1:
            return [[] for _ in prompts]
        with torch.inference_mode(), self.attention.use("decode"):
            ids, mask = pad_left(prompts, self.pad, self.model.device)
            rows, width = ids.shape
            sampler, forbid_eos = self._sampler(exact, width)
            bucket = self._bucket(rows, width + new_tokens, sampler)
            bucket.slot.prefill(ids, mask, forbid_eos=forbid_eos)
            made = 1 + self._decode(bucket, new_tokens - 1, look=not exact)
            texts = bucket.slot.texts[:rows, width : width + made].tolist()
        return [trim(row, self.eos, exact) for row in texts]

    def _decode(self, bucket: Bucket, steps: int, *, look: bool) -> int:
        """Run up to ``steps`` steps. :return: how many ran."""
        if steps < 1:
            return 0
        self.tally.count(bucket.step, bucket.name, first=not bucket.warm)
        bucket.warm = True
        watch, step = EndWatch(bucket.slot.done), bucket.step
        # The first step checked every guard; nothing that they guard changes until the loop ends.
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            for done in range(1, steps):
                if look and done % STEPS_PER_LOOK == 0 and watch.ended():
                    return done
                step()
        return steps

    def _bucket(self, rows: int, columns: int, sampler: Sampler) -> Bucket:
        """Buffers and step for a batch of ``rows`` that need ``columns``: the smallest that fits without much waste, or new ones."""
        fitting = [
            key
            for key in self.slots
            if rows <= key[0] <= SPARE_ROWS * rows and columns <= key[1] <= SPARE_COLUMNS * max(columns, FEWEST_COLUMNS)
        ]
        if fitting:
            return self.slots[min(fitting)]
        key = (power_of_two(rows), power_of_two(max(columns, FEWEST_COLUMNS)))
        slot = Slot(self.model, *key, sampler, self.eos, additive_mask=self.attention.additive_mask)
        name = f"{key[0]} x {key[1]}"
        step = torch.compile(with_own_code(slot.step, f"step of {name}"), dynamic=False, **self.arguments)
        bucket = self.slots[key] = Bucket(name, slot, step)
        return bucket

    def _sampler(self, exact: bool, width: int) -> tuple[Sampler, bool]:
        """How tokens are picked, and whether end-of-text is forbidden: what ``generate`` would do, its model's own defaults included."""
        if exact not in self.samplers:
            wanted = self.generation_config(2, exact)
            config, _ = self.model._prepare_generation_config(wanted)
            self.model._prepare_special_tokens(config, True, device=self.model.device)
            processors = self.model._get_logits_processor(config, input_ids_seq_length=width, device=self.model.device)
            self.samplers[exact] = sampler_of(processors, config, exact)
        return self.samplers[exact]

    # ------------------------------------------------------------ scoring

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        if not self.compile_score:
            yield from super().log_probs(sequences, starts)
            return
        logits = self._forward("logits", sequences)
        for row, sequence, start in zip(logits, sequences, starts, strict=True):
            yield row[start - 1 : len(sequence) - 1].float().log_softmax(-1)

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        if not self.compile_score:
            return super().score(sequences, starts)
        scores = self._forward("scores", sequences)
        return [row[start - 1 : len(ids) - 1].clone() for row, ids, start in zip(scores, sequences, starts, strict=True)]

    def _forward(self, kind: str, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """One compiled pass over right-padded rows, with lengths and rows as symbols: one graph, and another for single rows."""
        longest = max(len(sequence) for sequence in sequences)
        width = -(-max(longest, 2) // SCORE_MULTIPLE) * SCORE_MULTIPLE
        with torch.inference_mode(), self.attention.use("score"):
            ids, _ = pad_right(sequences, self.pad, self.model.device)
            ids = torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=self.pad)
            key = f"{kind} of one row" if len(sequences) == 1 else kind
            first = key not in self.forwards
            if first:
                plain = self._logits if kind == "logits" else self._scores
                arguments = {**self.arguments, "mode": None} if self.arguments.get("mode") == "reduce-overhead" else self.arguments
                self.forwards[key] = torch.compile(with_own_code(plain, key), **arguments)
            torch._dynamo.maybe_mark_dynamic(ids, 1)
            if len(sequences) > 1:
                torch._dynamo.maybe_mark_dynamic(ids, 0)
            return self.tally.count(lambda: self.forwards[key](ids), key, first=first)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, columns, vocabulary). A mask of ones: padding is on the right, where no token looks."""
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    def _scores(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, columns - 1): the log probability of each token from the second on, without distributions in memory."""
        logits = self._logits(ids)[:, :-1].float()
        return logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)

    def close(self) -> None:
        self.slots.clear()
        self.forwards.clear()


def check_supported(model: PreTrainedModel, attention: EngineAttention) -> None:
    """:raises UnavailableError: for a model whose step cannot be a graph over a static cache."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    missing = {"position_ids", "past_key_values", "attention_mask"} - inspect.signature(model.forward).parameters.keys()
    if model.config.is_encoder_decoder or missing:
        what = "an encoder and a decoder" if model.config.is_encoder_decoder else f"no {', '.join(sorted(missing))} in its forward"
        raise UnavailableError(f"compile cannot run {name}: it has {what}; leave out compile for this model")
    strange = set(mask_windows(model)) - {"", "full_attention", "sliding_attention"}
    if strange or getattr(config, "attention_chunk_size", None):
        kinds = ", ".join(sorted(strange)) or "chunked attention"
        raise UnavailableError(
            f"compile cannot run {name}: its static cache does not hold layers of {kinds}; leave out compile for this model"
        )
    if not attention.usable:
        raise UnavailableError(
            f"compile cannot run with the attention implementation '{attention.own}', which takes no mask of fixed shape; "
            "set load.attention=sdpa, or leave out compile"
        )


def sampler_of(processors: Sequence[Any], config: Any, exact: bool) -> tuple[Sampler, bool]:
    """transformers' processors as a sampler for the graph, and whether end-of-text is forbidden throughout.

    :raises UnavailableError: for one that needs the whole text or the host.
    """
    penalty, warpers, forbid_eos = 1.0, [], False
    for processor in processors:
        name = type(processor).__name__
        if name == "RepetitionPenaltyLogitsProcessor":
            penalty = float(processor.penalty)
        elif name in ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor") and exact:
            forbid_eos = True
        elif name.endswith("LogitsWarper") and name.removesuffix("LogitsWarper") in STATELESS:
            warpers.append(processor)
        else:
            raise UnavailableError(
                f"compile does not do {name}, which the model's generation_config or a setting asks for; "
                "leave out compile, or change that value in generation_config.json"
            )
    return Sampler(penalty, tuple(warpers), bool(config.do_sample)), forbid_eos


def with_own_code(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The bound method under another name, with a code object of its own: torch.compile keeps its graphs, and counts them against its
    limit of recompiles, by code object."""
    function = method.__func__  # type: ignore[attr-defined]
    code = function.__code__.replace(co_name=name)
    return types.MethodType(types.FunctionType(code, function.__globals__, name), method.__self__)  # type: ignore[attr-defined]


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
