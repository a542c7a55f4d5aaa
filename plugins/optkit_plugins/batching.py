"""batching: which samples share a batch, so that less is computed on padding.

``length`` puts samples of like length together (longest first, so that memory runs out at once or never), ``length-size`` lets short ones
share larger batches under a budget of tokens, ``largest`` looks for the largest batch that fits 85 % of the memory, ``packed`` puts
several samples in one row and pads nothing (scoring only), and ``continuous`` hands all prompts to an engine whose slots take the next
prompt as soon as a text has ended (generation only). Results keep the order of the samples. It helps where lengths differ: not on
samples of one length, and a large batch answers its first sample later.

Efficient Sequence Packing without Cross-contamination (Krell et al. 2021); Orca (Yu et al. 2022) for ``continuous``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optkit import Claims, Engine, Machine, Options, Sample, Setting, Technique, TrialContext, UnavailableError, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit.technique import Task

#: Part of a device's memory that ``largest`` may use.
MEMORY_SHARE = 0.85
#: Tokens of a packed row: attention over it costs their square.
ROW_TOKENS = {"cpu": 512, "cuda": 4096}
#: Sequences that ``continuous`` decodes at once, at most. More gain little: from about 200 rows on arithmetic bounds a GPU's step.
SLOTS = {"cpu": 16, "cuda": 256}


class BatchingOptions(Options):
    kind: Literal["fixed", "length", "packed", "length-size", "largest", "continuous"] = Field(
        "length", description="how samples are put together"
    )
    size: int | None = Field(None, ge=1, description="samples a batch; largest, continuous: the upper bound; default batch.size")
    tokens: int | None = Field(None, ge=1, description="budget of a batch (length-size) or row (packed), padding included")


technique = Technique(
    name="batching",
    stage="batching",
    summary="batches by length, packed, or as large as memory allows; same results, less padding",
    roles=frozenset({"batching"}),
    honours=frozenset({"batch.*"}),
    tasks=frozenset({"score", "generate"}),
    options=BatchingOptions,
    paper="https://arxiv.org/abs/2107.02027",
    tested_on=("cpu", "NVIDIA H200"),
)


@hookimpl
def configure(options: BatchingOptions, task: Task, machine: Machine) -> Claims:
    problem = None
    if options.kind == "packed" and task != "score":
        problem = "samples that share a row cannot be continued: packed works in the task 'score' only; set batching.kind=length"
    elif options.kind == "continuous" and task != "generate":
        problem = "slots are for texts that grow: continuous works in the task 'generate' only; set batching.kind=packed"
    elif options.tokens is not None and options.kind not in ("packed", "length-size"):
        problem = f"the option tokens is not read by kind '{options.kind}'; set batching.kind=length-size, or leave it out"
    elif options.size is not None and options.kind == "packed":
        problem = "the option size is not read by kind 'packed', whose rows have a budget of tokens; set batching.tokens"
    return Claims(
        settings=wished(options, machine),
        adds=frozenset({"positions-restart"}) if options.kind == "packed" else frozenset(),
        problem=problem,
    )


def wished(options: BatchingOptions, machine: Machine) -> tuple[Setting, ...]:
    if options.kind == "continuous":
        slots = options.size or SLOTS[machine.device]
        return (Setting(name="generate.slots", value=slots, because="asked for with batching.kind=continuous", strength="must"),)
    if options.size is None or options.kind == "largest":
        return ()
    return (Setting(name="batch.size", value=options.size, because="asked for with batching.size", strength="must"),)


@hookimpl
def wrap_engine(engine: Engine, trial: TrialContext) -> Engine | None:
    """Packed rows need positions and masks that the default engine does not make, slots an engine that has some."""
    from optkit import TransformersEngine

    options = trial.options
    assert isinstance(options, BatchingOptions)
    if options.kind == "continuous":
        if not hasattr(engine, "slot_facts"):
            raise UnavailableError(
                f"'{engine.name}' decodes batches as they come and has no slots; add a technique whose engine honours generate.slots "
                "(`optkit plugins info NAME` shows what it honours), or set batching.kind=length"
            )
        trial.notes["engine"] = engine
    if options.kind != "packed":
        return None
    if type(engine) is not TransformersEngine:
        raise UnavailableError(f"packed rows need the default engine, and this plan has '{engine.name}'; set batching.kind=length")

    from optkit_plugins.kernels.scoring.packed_rows import PackedEngine

    return PackedEngine(engine.model, engine.trial)


@hookimpl
def batch_strategy(samples: list[Sample], trial: TrialContext) -> list[list[int]]:
    options = trial.options
    assert isinstance(options, BatchingOptions)
    lengths = [len(sample.prompt_ids) if trial.task == "generate" else len(sample) for sample in samples]
    size = int(trial.settings["batch.size"])
    new_tokens = int(trial.settings["generate.max_new_tokens"]) if trial.task == "generate" else 0
    match options.kind:
        case "fixed":
            batches = chunks(range(len(samples)), size)
        case "length":
            batches = chunks(longest_first(lengths), size)
        case "length-size":
            budget = options.tokens or size * (max(lengths, default=0) + new_tokens)
            batches = within_budget(lengths, budget, new_tokens)
        case "packed":
            batches = first_fit(lengths, options.tokens or ROW_TOKENS[trial.device])
        case "largest":
            order = longest_first(lengths)
            batches = chunks(order, largest([samples[index] for index in order], trial, options.size))
        case "continuous":
            return chunks(range(len(samples)), max(1, len(samples)))
    trial.notes["facts"] = describe(batches, lengths, size, packed=options.kind == "packed")
    return batches


# ---------------------------------------------------------------- strategies


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length; equal lengths keep their order."""
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def chunks(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def within_budget(lengths: Sequence[int], budget: int, new_tokens: int = 0) -> list[list[int]]:
    """Batches, longest first, whose rows x (longest + new tokens) stay within ``budget``; a longer sample is alone."""
    batches: list[list[int]] = []
    room = 0
    for index in longest_first(lengths):
        if room < 1:
            batches.append([])
            room = max(1, budget // max(1, lengths[index] + new_tokens))
        batches[-1].append(index)
        room -= 1
    return batches


def first_fit(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows of at most ``tokens``: each sample, longest first, goes to the first row that has room; a longer one is alone."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    for index in longest_first(lengths):
        place = next((row for row, room in enumerate(rooms) if room >= lengths[index]), None)
        if place is None:
            rows.append([])
            rooms.append(tokens)
            place = len(rows) - 1
        rows[place].append(index)
        rooms[place] -= lengths[index]
    return rows


def largest(samples: list[Sample], trial: TrialContext, bound: int | None) -> int:
    """Samples a batch that fit the memory, by trying the longest: doubled while the next is predicted to fit, halved when one does not.

    :param samples: longest first.
    """
    bound = min(bound or len(samples), len(samples)) or 1
    if trial.notes.get("largest_for", (0, 0)) >= (len(samples[0]) if samples else 0, bound):
        return min(trial.notes["largest"], bound)
    size, tried = 1, 0
    while True:
        needed = bytes_of_batch(lambda size=size: run_batch(samples[:size], trial), trial.device)  # type: ignore[misc]
        if needed is None:  # out of memory
            size = max(1, size // 2)
            break
        tried = size
        if size == bound or 2 * needed > MEMORY_SHARE * free_memory(trial):
            break
        size = min(2 * size, bound)
    size = min(size, tried or size)
    trial.notes["largest"], trial.notes["largest_for"] = size, (len(samples[0]) if samples else 0, bound)
    return size


def run_batch(samples: list[Sample], trial: TrialContext) -> None:
    assert trial.engine is not None
    if trial.task == "generate":
        new_tokens = int(trial.settings["generate.max_new_tokens"])
        trial.engine.generate([sample.prompt_ids for sample in samples], new_tokens=new_tokens, exact=True)
    else:
        trial.engine.score([sample.prompt_ids + sample.answer_ids for sample in samples], [1] * len(samples))


def bytes_of_batch(work: Callable[[], None], device: str) -> int | None:
    """Bytes that ``work`` takes beyond what rests, at its peak; ``None`` when memory ran out."""
    import resource

    import psutil
    import torch

    try:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return torch.cuda.max_memory_allocated() - before
        before = psutil.Process().memory_info().rss
        work()
        return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        return None


def free_memory(trial: TrialContext) -> int:
    """Bytes that a batch may take beside what rests."""
    if trial.device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    import psutil

    rest = psutil.Process().memory_info().rss
    return min(psutil.virtual_memory().available, trial.machine.host_memory_bytes - rest)


# ---------------------------------------------------------------- proof


def describe(batches: list[list[int]], lengths: Sequence[int], size: int, *, packed: bool) -> dict[str, Any]:
    """What the batches look like, beside file order in batches of ``size``."""
    in_file_order = chunks(range(len(lengths)), max(map(len, batches), default=size))
    if batches == in_file_order:
        return {"order": "file", "size": max(map(len, batches), default=size)}
    return {
        "order": "packed" if packed else "length",
        "size": max(map(len, batches), default=0),
        "batches": len(batches),
        "padding": 0.0 if packed else padding(batches, lengths),
        "padding_in_file_order": padding(chunks(range(len(lengths)), size), lengths),
    }


def describe_slots(facts: dict[str, Any]) -> str:
    shared, halved = facts["shared_prefix_tokens"], facts["out_of_memory"]
    return (
        f"{facts['slots']} slots, filled again {facts['refills']} times, {facts['busy']:.0%} of their steps gave a token"
        + (f", {shared} prompt tokens copied" if shared else "")
        + (f", memory ran out {halved} times" if halved else "")
    )


def padding(batches: list[list[int]], lengths: Sequence[int]) -> float:
    """Part of the computed positions that is padding."""
    computed = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return round(1 - sum(lengths) / computed, 4) if computed else 0.0


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    if "engine" in trial.notes:
        facts = trial.notes["engine"].slot_facts
        return facts | {"order": "slots", "summary": describe_slots(facts)}
    facts = trial.notes.get("facts") or {"order": "file", "size": int(trial.settings["batch.size"])}
    if facts["order"] == "file":
        return facts | {"summary": f"file order, batches of {facts['size']}"}
    return facts | {
        "summary": f"{facts['batches']} batches by {facts['order']} (up to {facts['size']} samples), "
        f"{facts['padding']:.1%} padding instead of {facts['padding_in_file_order']:.1%}"
    }
