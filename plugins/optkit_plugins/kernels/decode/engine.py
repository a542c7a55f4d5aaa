"""The engine of compiled graphs: one decode step a bucket of (rows × columns), and one forward pass for scoring."""

from __future__ import annotations

import inspect
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from optkit import TransformersEngine, UnavailableError
from optkit.engine import pad_left, trim
from optkit_plugins.kernels.attention.interface import EngineAttention
from optkit_plugins.kernels.decode.layers import CompiledLayers, LayeredStep, PromptCache, allocate, own_copy
from optkit_plugins.kernels.decode.loop import EndWatch, Sampler, Slot, mask_windows
from optkit_plugins.kernels.decode.opaque_ops import make_known
from optkit_plugins.kernels.decode.recorded import Recorded, without_recording
from optkit_plugins.kernels.decode.tally import Tally
from optkit_plugins.kernels.fused.product import CALLS
from optkit_plugins.kernels.scoring.compiled import CompiledScorer

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
#: Prompts of up to this many tokens are read by a recorded CUDA graph: larger ones keep a GPU busy for longer than their launches take.
RECORDED_TOKENS = 2048
#: Columns of recorded prompts are rounded up to a multiple of this, so that few recordings serve all lengths.
PROMPT_MULTIPLE = 32
#: And those of prompts whose layers are compiled, which keeps kernels aligned.
ALIGNED = 16
#: transformers' processors without memory: a function of the scores alone, so that they may run inside the graph.
STATELESS = ("Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta", "TopH")


@dataclass
class Bucket:
    """One compiled step with its buffers; ``warm`` once it has run. ``reads``: recorded prompts by rows, columns and raggedness. ``fused``: what
    the kernels of a step do beside their own work, by kind."""

    name: str
    slot: Slot
    step: Callable[[], None]
    warm: bool = False
    reads: dict[tuple[int, int, bool], Recorded] = field(default_factory=dict)
    fused: Counter[str] = field(default_factory=Counter)


class CompiledEngine(TransformersEngine):
    """Generates with a compiled step over a static cache, and scores with a compiled forward pass.

    :param arguments: of ``torch.compile``.
    :param score: compile the scoring pass too; else it runs as transformers does it.
    :ivar compile_prompts: read prompts with compiled layers; by default on a GPU. :ivar steps: "whole" compiles a step as one graph a
        bucket, "layers" a layer at a time and once for all buckets, "auto" the latter for several rows on a GPU.
    """

    name = "compiled"

    def __init__(self, model: PreTrainedModel, trial: TrialContext, arguments: dict[str, Any], *, score: bool):
        super().__init__(model, trial)
        self.attention = EngineAttention(model)
        check_supported(model, self.attention)
        self.arguments, self.compile_score = arguments, score
        if arguments.get("backend") == "inductor":
            make_known()
        self.tally = Tally()
        self.slots: dict[tuple[int, int], Bucket] = {}
        self.sampler: Sampler | None = None
        self.forwards: dict[str, Callable[..., torch.Tensor]] = {}
        self.scorer: CompiledScorer | None = None
        self.layers = CompiledLayers(model, arguments)
        self.compile_prompts, self.steps = model.device.type == "cuda", "auto"
        self.step_arguments, self.records = without_recording(arguments) if model.device.type == "cuda" else (arguments, False)
        self.pool = torch.cuda.graph_pool_handle() if self.records else None

    # ------------------------------------------------------------ generation

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        if not prompts or new_tokens < 1:
            return [[] for _ in prompts]
        with torch.inference_mode(), self.attention.use("decode"):
            ids, mask = pad_left(prompts, self.pad, self.model.device)
            rows, width = ids.shape
            bucket = self._bucket(rows, width + new_tokens, self._sampler(width))
            bucket.slot.put(ids, mask, exact=exact)
            self._read(bucket, rows, width, ragged=any(len(prompt) < width for prompt in prompts))
            made = 1 + self._decode(bucket, new_tokens - 1, look=not exact)
            texts = bucket.slot.texts[:rows, width : width + made].tolist()
        return [trim(row, self.eos, exact) for row in texts]

    def _read(self, bucket: Bucket, rows: int, width: int, *, ragged: bool) -> None:
        """The prompts' forward pass: with compiled layers, and recorded where the device would wait for the host."""
        compiled, slot = self.compile_prompts and not self.layers.problem, bucket.slot
        wide = rounded(width, PROMPT_MULTIPLE, slot.columns)
        recorded = self.records and rows * wide <= RECORDED_TOKENS
        if not recorded:
            wide = rounded(width, ALIGNED, slot.columns) if compiled else width
        read: Callable[[], None] = partial(slot.read, rows, wide, ragged=ragged)
        with self.attention.use("decode" if ragged else "score"):
            if compiled:
                allocate(self.model, slot)
                kind = "one prompt" if rows == 1 else f"{'ragged ' if ragged else ''}prompts"
                read = partial(self._by_layers, read, kind, [PromptCache(layer, rows) for layer in slot.layers])
            if recorded:
                read = bucket.reads.setdefault((rows, wide, ragged), Recorded(read, self.pool))
            read()

    def _by_layers(self, work: Callable[[], Any], kind: str, caches: Sequence[PromptCache] = ()) -> Any:
        """``work`` with the model's layers compiled for this kind of it."""
        first = kind not in self.layers.compiled
        with self.layers.use(kind, caches):
            return self.tally.count(work, kind, first=first)

    def _decode(self, bucket: Bucket, steps: int, *, look: bool) -> int:
        """Run up to ``steps`` steps. :return: how many ran."""
        if steps < 1:
            return 0
        before = CALLS.copy()
        self.tally.count(bucket.step, bucket.name, first=not bucket.warm)
        if not bucket.warm:  # a recorded step calls nothing any more
            bucket.warm, bucket.fused = True, CALLS - before
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
        bucket = self.slots[key] = self._new_bucket(*key, sampler)
        return bucket

    def _new_bucket(self, rows: int, columns: int, sampler: Sampler) -> Bucket:
        slot = Slot(self.model, rows, columns, sampler, self.eos, additive_mask=self.attention.additive_mask, spans=self.attention.spans)
        name = f"{rows} x {columns}"
        if self.steps == "whole" or self.layers.problem or (self.steps == "auto" and (rows == 1 or self.model.device.type != "cuda")):
            return Bucket(name, slot, self.compiled_step(slot.step, f"step of {name}"))
        append = torch.compile(with_own_code(slot._append, f"tokens of {name}"), dynamic=False, **self.step_arguments)
        step = LayeredStep(slot, self.layers, append)
        return Bucket(name, slot, Recorded(step, self.pool) if self.records else step)

    def compiled_step(self, method: Callable[[], None], name: str) -> Callable[[], None]:
        """The bound method, which has neither inputs nor outputs, as one graph; recorded where the arguments ask for CUDA graphs."""
        step = torch.compile(with_own_code(method, name), dynamic=False, **self.step_arguments)
        return Recorded(step, self.pool) if self.records else step

    def _sampler(self, width: int) -> Sampler:
        """How tokens are picked: what ``generate`` would do, its model's own defaults included."""
        if self.sampler is None:
            self.sampler = sampler_of(self, width, "compile")
        return self.sampler

    def facts(self) -> dict[str, Any]:
        """How steps and prompts run: the attention over the cache, recordings of our own, and why something is not recorded."""
        steps = [bucket.step for bucket in self.slots.values() if isinstance(bucket.step, Recorded)]
        reads = [read for bucket in self.slots.values() for read in bucket.reads.values()]
        theirs = self.arguments.get("backend") == "cudagraphs"
        by_layers = self.compile_prompts or self.compile_score or self.steps == "layers"
        return {
            "attention": "kernel over each row's own columns" if self.attention.spans else self.attention.own,
            "fused": dict(max((bucket.fused for bucket in self.slots.values()), key=lambda fused: fused.total(), default={})),
            "cuda_graphs": self.records or theirs,
            "replay": "CUDA graphs of our own" if self.records else "torch.compile's CUDA graphs" if theirs else "no CUDA graphs",
            "recorded_steps": sum(step.graph is not None for step in steps),
            "recorded_prompts": sum(read.graph is not None for read in reads),
            "not_compiled": [self.layers.problem] if self.layers.problem and by_layers else [],
            "not_recorded": sorted({recorded.problem for recorded in (*steps, *reads) if recorded.problem}),
        }

    # ------------------------------------------------------------ scoring

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        return self._scorer().log_probs(sequences, starts) if self.compile_score else super().log_probs(sequences, starts)

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        return self._scorer().score(sequences, starts) if self.compile_score else super().score(sequences, starts)

    def _scorer(self) -> CompiledScorer:
        if self.scorer is None:
            try:
                self.scorer = CompiledScorer(
                    self.model, self.attention, self.pad, self.arguments, self._forward, self.layers, self._by_layers
                )
            except ValueError as error:
                raise UnavailableError(f"compile cannot score: {error}; set compile.score=false, or leave out compile") from None
        return self.scorer

    def _forward(self, method: Callable[..., torch.Tensor], name: str, arguments: dict[str, Any], *tensors: torch.Tensor) -> torch.Tensor:
        """The bound method as one graph, compiled the first time that ``name`` is met."""
        first = name not in self.forwards
        if first:
            self.forwards[name] = torch.compile(with_own_code(method, name), **arguments)
        return self.tally.count(lambda: self.forwards[name](*tensors), name, first=first)

    def close(self) -> None:
        self.slots.clear()
        self.pool = torch.cuda.graph_pool_handle() if self.records else None  # a pool does not outlive its recordings
        self.forwards.clear()
        self.scorer = None


def check_supported(model: PreTrainedModel, attention: EngineAttention, technique: str = "compile") -> None:
    """:raises UnavailableError: for a model whose step cannot be a graph over a static cache."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    missing = {"position_ids", "past_key_values", "attention_mask"} - inspect.signature(model.forward).parameters.keys()
    if model.config.is_encoder_decoder or missing:
        what = "an encoder and a decoder" if model.config.is_encoder_decoder else f"no {', '.join(sorted(missing))} in its forward"
        raise UnavailableError(f"{technique} cannot run {name}: it has {what}; leave out {technique} for this model")
    strange = set(mask_windows(model)) - {"", "full_attention", "sliding_attention"}
    if strange or getattr(config, "attention_chunk_size", None):
        kinds = ", ".join(sorted(strange)) or "chunked attention"
        raise UnavailableError(
            f"{technique} cannot run {name}: its static cache does not hold layers of {kinds}; leave out {technique} for this model"
        )
    if not attention.usable:
        raise UnavailableError(
            f"{technique} cannot run with the attention implementation '{attention.own}', which takes no mask of fixed shape; "
            f"set load.attention=sdpa, or leave out {technique}"
        )


def sampler_of(engine: TransformersEngine, width: int, technique: str) -> Sampler:
    """What ``generate`` would do with prompts of ``width`` tokens, as a sampler for the graph.

    :raises UnavailableError: for a processor that needs the whole text or the host.
    """
    model = engine.model
    config, _ = model._prepare_generation_config(engine.generation_config(2, exact=False))
    model._prepare_special_tokens(config, True, device=model.device)
    penalty, warpers = 1.0, []
    for processor in model._get_logits_processor(config, input_ids_seq_length=width, device=model.device):
        name = type(processor).__name__
        if name == "RepetitionPenaltyLogitsProcessor":
            penalty = float(processor.penalty)
        elif name.endswith("LogitsWarper") and name.removesuffix("LogitsWarper") in STATELESS:
            warpers.append(processor)
        else:
            raise UnavailableError(
                f"{technique} does not do {name}, which the model's generation_config or a setting asks for; "
                f"leave out {technique}, or change that value in generation_config.json"
            )
    return Sampler(penalty, tuple(warpers), bool(config.do_sample))


def with_own_code(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The bound method under another name, with a code object of its own: torch.compile keeps its graphs, and counts them against its
    limit of recompiles, by code object."""
    return types.MethodType(own_copy(method.__func__, name), method.__self__)  # type: ignore[attr-defined]


def rounded(width: int, multiple: int, columns: int) -> int:
    """``width`` rounded up, but less than ``columns``: the prompts' first new token needs a place, so it never has to be all of them."""
    return min(-(-width // multiple) * multiple, columns - 1)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
