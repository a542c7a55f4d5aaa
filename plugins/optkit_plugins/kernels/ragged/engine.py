"""Continuous batching: a fixed number of rows is decoded at once, and a row whose text has ended takes the next prompt."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from optkit import UnavailableError
from optkit.engine import trim
from optkit_plugins.kernels.decode.engine import FEWEST_COLUMNS, STEPS_PER_LOOK, CompiledEngine, power_of_two
from optkit_plugins.kernels.decode.recorded import Recorded
from optkit_plugins.kernels.ragged.attention import register_packed
from optkit_plugins.kernels.ragged.cache import on
from optkit_plugins.kernels.ragged.schedule import Schedule, shared_prefixes
from optkit_plugins.kernels.ragged.step import RaggedSlot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext
    from optkit_plugins.kernels.decode.loop import Sampler

#: Part of the free memory that keys and values may take; the rest is for reading prompts.
MEMORY_SHARE = 0.85
#: Tokens that are read at once: enough to fill the device, few enough for its memory.
WAVE_TOKENS = {"cpu": 1024, "cuda": 8192}
#: A slot that exists serves calls that need down to this part of its columns, and between these parts of its rows.
SPARE_COLUMNS, SPARE_ROWS, MISSING_ROWS = 2, 4, 2


@dataclass
class Job:
    """The prompts of one call: what was asked for, and what is finished.

    :ivar texts: (prompts, longest limit) new tokens. :ivar waiting: prompts without a finished text.
    """

    prompts: Sequence[Sequence[int]]
    limits: Sequence[int]
    texts: torch.Tensor
    waiting: list[int]
    look: bool

    @property
    def columns(self) -> int:
        return max(len(prompt) + limit for prompt, limit in zip(self.prompts, self.limits, strict=True))


@dataclass
class RaggedBucket:
    """One compiled step with its slot; ``warm`` once it has run."""

    name: str
    slot: RaggedSlot
    step: Callable[[], None]
    warm: bool = False


@dataclass
class SlotCounts:
    """What the calls so far came to. ``row_steps`` are computed, ``token_steps`` of them gave a token that was kept."""

    slots: int = 0
    refills: int = 0
    shared_prefix_tokens: int = 0
    out_of_memory: int = 0
    row_steps: int = 0
    token_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "slots": self.slots,
            "refills": self.refills,
            "busy": round(self.token_steps / self.row_steps, 4) if self.row_steps else 1.0,
            "shared_prefix_tokens": self.shared_prefix_tokens,
            "out_of_memory": self.out_of_memory,
        }


class RaggedEngine(CompiledEngine):
    """A compiled engine whose ``generate`` takes any number of prompts at once and decodes up to ``slots`` of them together."""

    name = "compiled, continuous"

    def __init__(self, model: PreTrainedModel, trial: TrialContext, arguments: dict[str, Any], *, score: bool, slots: int):
        super().__init__(model, trial, arguments, score=score)
        check_packable(model, self.attention.names["decode"] != self.attention.own)
        self.most, self.wave_tokens = slots, WAVE_TOKENS[model.device.type]
        self.ragged: list[RaggedBucket] = []
        self.slot_counts = SlotCounts()
        self.attention.names["packed"] = register_packed(self.attention.own)

    @property
    def slot_facts(self) -> dict[str, Any]:
        return self.slot_counts.to_json()

    def facts(self) -> dict[str, Any]:
        steps = [bucket.step for bucket in self.ragged if isinstance(bucket.step, Recorded)]
        recorded = sum(step.graph is not None for step in steps)
        return super().facts() | {"recorded_steps": recorded, "not_recorded": sorted({step.problem for step in steps if step.problem})}

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        """In batches of ``batch.size``: whoever hands over all prompts at once hands over all sequences at once, too."""
        size = int(self.trial.settings["batch.size"])
        scores: list[torch.Tensor] = []
        for begin in range(0, len(sequences), size):
            scores += super().score(sequences[begin : begin + size], starts[begin : begin + size])
        return scores

    # ------------------------------------------------------------ generation

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        if not prompts or new_tokens < 1:
            return [[] for _ in prompts]
        return self.generate_up_to(prompts, [new_tokens] * len(prompts), exact=exact)

    def generate_up_to(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], *, exact: bool = False) -> list[list[int]]:
        """Continuations of the prompts. :param limits: new tokens of each prompt, at least 1 each."""
        texts = torch.zeros(len(prompts), max(limits), dtype=torch.int64, device=self.model.device)
        job = Job(prompts, limits, texts, list(range(len(prompts))), look=not exact and bool(self.eos))
        with torch.inference_mode():
            sampler = self._sampler(max(map(len, prompts)))
            while job.waiting:
                if not self._goes_on(lambda: self._run(job, sampler, exact)):
                    self._halve()
        rows = [trim(row[:limit], self.eos, exact) for row, limit in zip(job.texts.tolist(), limits, strict=True)]
        self.slot_counts.token_steps += sum(min(len(row), limit - 1) for row, limit in zip(rows, limits, strict=True))
        return rows

    def _goes_on(self, run: Callable[[], None]) -> bool:
        """Whether ``run`` came to its end; ``False`` when memory ran out on the way and fewer rows may do."""
        try:
            run()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error) or self.most == 1:
                raise
            return False
        return True

    def _halve(self) -> None:
        """Half the rows, and half the tokens that are read at once. Nothing of the failed attempt stays in memory."""
        self.most = max(1, min(self.most, self.slot_counts.slots or self.most) // 2)
        self.wave_tokens = max(1, self.wave_tokens // 2)
        self.slot_counts.out_of_memory += 1
        self.trial.report(f"out of memory: going on with {self.most} rows")
        self._forget()

    def _forget(self) -> None:
        self.ragged.clear()
        self.pool = torch.cuda.graph_pool_handle() if self.records else None  # a pool does not outlive its recordings
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, job: Job, sampler: Sampler, exact: bool) -> None:
        """Generate what ``job`` still waits for. What is finished when memory runs out stays finished."""
        bucket = self._bucket_for(len(job.waiting), job.columns, sampler)
        slot = bucket.slot
        slot.begin(exact=exact)
        schedule = Schedule(list(map(len, job.prompts)), job.limits, job.waiting, slot.rows, shared_prefixes(job.prompts))
        self.slot_counts.slots = slot.rows
        looks = Looks(slot.done) if job.look else None
        guarded = True
        self._fill(schedule, slot, job)
        while schedule.active:
            steps = schedule.steps() if looks is None else min(schedule.steps(), STEPS_PER_LOOK)
            self._steps(bucket, steps, guarded=guarded)
            guarded = False
            schedule.ran(steps)
            self.slot_counts.row_steps += steps * slot.rows
            self._collect(schedule.finished(looks.ended(schedule.owner) if looks else lambda row: False), slot, job)
            if schedule.wants_filling:
                self.slot_counts.refills += 1
                self._fill(schedule, slot, job)

    def _fill(self, schedule: Schedule, slot: RaggedSlot, job: Job) -> None:
        """Give every free row a prompt, as long as there are any."""
        with self.attention.use("packed"):
            while schedule.waiting and None in schedule.owner:
                wave = schedule.next_wave(self.wave_tokens)
                compiled = self.compile_prompts and not self.layers.problem
                slot.read(wave, job.prompts, job.limits, self._by_layers if compiled else None)
                self.slot_counts.shared_prefix_tokens += sum(one.shared for one in wave)
                self._collect(schedule.finished(lambda row: False), slot, job)  # texts of one token

    def _collect(self, finished: list[tuple[int, int]], slot: RaggedSlot, job: Job) -> None:
        if not finished:
            return
        rows, indices = [row for row, _ in finished], [index for _, index in finished]
        texts = slot.collect(rows, [len(job.prompts[index]) for index in indices], job.texts.shape[1])
        job.texts[on(texts.device, indices)] = texts
        ready = set(indices)
        job.waiting = [index for index in job.waiting if index not in ready]

    def _steps(self, bucket: RaggedBucket, steps: int, *, guarded: bool) -> None:
        """Run ``steps`` steps. :param guarded: this is the first stretch of a call; nothing that guards look at changes until its end."""
        with self.attention.use("decode"):
            if guarded:
                self.tally.count(bucket.step, bucket.name, first=not bucket.warm)
                bucket.warm, steps = True, steps - 1
            with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
                for _ in range(steps):
                    bucket.step()

    # ------------------------------------------------------------ slots

    def _bucket_for(self, prompts: int, columns: int, sampler: Sampler) -> RaggedBucket:
        """Slot and step for this many prompts: one that exists if it does, else a new one, as large as memory allows."""
        columns = -(-columns // FEWEST_COLUMNS) * FEWEST_COLUMNS
        wanted = min(self.most, power_of_two(prompts))
        for bucket in self.ragged:
            rows, has = bucket.slot.rows, bucket.slot.columns
            if columns <= has <= SPARE_COLUMNS * columns and wanted <= MISSING_ROWS * rows and rows <= SPARE_ROWS * wanted:
                return bucket
        rows = self._rows_that_fit(wanted, columns)
        slot = RaggedSlot(self.model, rows, columns, sampler, self.eos, spans=self.attention.spans)
        name = f"{rows} rows x {columns}"
        self.ragged.append(RaggedBucket(name, slot, self.compiled_step(slot.step, f"step of {name}")))
        return self.ragged[-1]

    def _rows_that_fit(self, wanted: int, columns: int) -> int:
        """``wanted`` rows, or as many as the free memory holds; older slots are given up for them."""
        bytes_per_row = columns * self._bytes_per_token()
        if wanted * bytes_per_row > MEMORY_SHARE * free_memory(self.model.device):
            self._forget()
        return max(1, min(wanted, int(MEMORY_SHARE * free_memory(self.model.device) / bytes_per_row)))

    def _bytes_per_token(self) -> int:
        """Bytes of keys and values that the model keeps for a token, as it does keep them."""
        ids = torch.full((1, 1), self.pad, device=self.model.device)
        layers = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values.layers
        return sum(states.nbytes for layer in layers for states in (layer.keys, layer.values))

    def close(self) -> None:
        super().close()
        self.ragged.clear()


class Looks:
    """Tells which texts have ended, one look late on a GPU, so that it never waits for the host."""

    def __init__(self, done: torch.Tensor):
        self.done = done
        self.pending: tuple[torch.Tensor, torch.cuda.Event, list[int | None]] | None = None

    def ended(self, owner: Sequence[int | None]) -> Callable[[int], bool]:
        """Whether the text of a row has ended, as far as is known. :param owner: the prompt of each row, now."""
        if self.done.device.type != "cuda":
            now = self.done.tolist()
            return lambda row: now[row]
        earlier, answer = self.pending, torch.empty(len(owner), dtype=torch.bool, pin_memory=True)
        answer.copy_(self.done, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending = (answer, event, list(owner))
        if earlier is None:
            return lambda row: False
        earlier[1].synchronize()
        then, owner_then = earlier[0].tolist(), earlier[2]
        return lambda row: then[row] and owner_then[row] == owner[row]  # a row that was filled since has another text


def check_packable(model: PreTrainedModel, built_on_sdpa: bool) -> None:
    """:raises UnavailableError: for a model whose attention cannot be given prompts packed in one row."""
    if not built_on_sdpa or not getattr(model, "_supports_attention_backend", False):
        raise UnavailableError(
            f"slots need attention that is built on SDPA and can be exchanged; {type(model).__name__} computes "
            f"'{model.config._attn_implementation}': set load.attention=sdpa, or leave out generate.slots (batching.kind=length)"
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in ("allocate memory", "out of memory"))


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on ``device`` beside what rests."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.virtual_memory().available)
