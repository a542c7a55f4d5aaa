"""Engines over several devices: ``Replicas`` share the rows of a batch out, ``Lockstep`` does the same work on every device's part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from optkit import Engine, OptkitError, TransformersEngine
from optkit_plugins.kernels.parallel.workers import Worker, leave, random_state, settle


class Replicas(Engine):
    """Row i of a batch goes to device i modulo their number. Distributions are asked of the first device alone.

    :ivar served: devices that have answered rows.
    """

    name = "replicas"

    def __init__(self, inner: Engine, device: str, workers: list[Worker]):
        self.inner, self.workers = inner, workers
        self.devices = [device, *(worker.device for worker in workers)]
        self.served: set[int] = set()
        self.cannot_score = inner.cannot_score

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        return self._share("generate", (prompts,), {"new_tokens": new_tokens, "exact": exact})

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        return [torch.as_tensor(row) for row in self._share("score", (sequences, starts), {})]

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        yield from self.inner.log_probs(sequences, starts)

    def _share(self, call: str, columns: tuple[Sequence[Any], ...], named: dict[str, Any]) -> list[Any]:
        """``call`` on every device at once, each with its rows of the columns; the results in the order of the rows."""
        total, count = len(columns[0]), len(self.devices)
        parts = [range(first, total, count) for first in range(min(count, total))]
        rows: list[Any] = [None] * total
        busy = self.workers[: max(len(parts) - 1, 0)]
        try:
            for worker, part in zip(busy, parts[1:], strict=True):
                worker.ask(call, *([column[at] for at in part] for column in columns), named)
            if parts:
                own = getattr(self.inner, call)(*([column[at] for at in parts[0]] for column in columns), **named)
                own = [row.cpu() if isinstance(row, torch.Tensor) else row for row in own]
        finally:
            answers = settle(busy)
        for part, answer in zip(parts, [own, *answers] if parts else [], strict=True):
            for at, row in zip(part, answer, strict=True):
                rows[at] = row
        self.served.update(range(len(parts)))
        return rows

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.inner.close()


class Lockstep(Engine):
    """Every process makes the same calls, because each holds a part of every layer; the first one's answers count."""

    name = "lockstep"

    def __init__(self, inner: TransformersEngine, workers: list[Worker]):
        self.inner, self.workers = inner, workers
        self.cannot_score = inner.cannot_score

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        if self.inner.trial.settings["generate.do_sample"]:  # every process draws the same token
            state = random_state(self.inner.model.device)
            for worker in self.workers:
                worker.ask("random", state)
            settle(self.workers)
        texts, others = self._together("generate", (prompts,), {"new_tokens": new_tokens, "exact": exact})
        for worker, theirs in zip(self.workers, others, strict=True):
            if theirs != texts:
                raise OptkitError(f"the worker on {worker.device} took other tokens than the first device; report this with the plan")
        return texts

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        return self._together("score", (sequences, starts), {})[0]

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        yield from self._together("log_probs", (sequences, starts), {})[0]

    def _together(self, call: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        """This process's answer, and those of the others."""
        for worker in self.workers:
            worker.ask(call, *arguments, named)
        try:
            # All of a generator's work is done here: a process that stops early would leave the others waiting.
            own = list(getattr(self.inner, call)(*arguments, **named))
        finally:
            others = settle(self.workers)
        return own, others

    def close(self) -> None:
        for worker in self.workers:
            worker.dismiss()
        self.inner.close()
        leave()
        for worker in self.workers:
            worker.close()
