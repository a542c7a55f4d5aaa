"""Training batches: an endless stream of fresh orders, made and tokenized by worker processes."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from model import grammar

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

PAD, BOS, EOS = 0, 1, 2
MAX_PROMPT, MAX_ANSWER = 96, 64  # tokens, with bos and eos
CHUNK = 8192  # orders that are sorted by length together

Batch = tuple["np.ndarray", "np.ndarray"]  # tokens (rows, length) uint16, first answer position (rows,)


def encode_orders(tokenizer: Tokenizer, orders: list[grammar.Order]) -> list[tuple[list[int], int]]:
    """Each order as (bos prompt answer eos, length of bos and prompt); too long ones are left out."""
    prompts = tokenizer.encode_batch([order.prompt for order in orders])
    answers = tokenizer.encode_batch([order.answer for order in orders], add_special_tokens=False)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(prompt.ids) <= MAX_PROMPT and len(answer.ids) < MAX_ANSWER:
            rows.append(([*prompt.ids, *answer.ids, EOS], len(prompt.ids)))
    return rows


def make_batches(tokenizer: Tokenizer, rng: Random, tokens: int, chunk: int = CHUNK) -> list[Batch]:
    """``chunk`` fresh training orders as batches of about ``tokens`` padded tokens, rows of like length together."""
    import numpy as np

    rows = encode_orders(tokenizer, [grammar.draw_order(rng) for _ in range(chunk)])
    rows.sort(key=lambda row: len(row[0]))
    batches: list[Batch] = []
    while rows:
        length = -(-len(rows[-1][0]) // 16) * 16
        taken = rows[-max(1, tokens // length) :]
        del rows[-len(taken) :]
        table = np.full((len(taken), length), PAD, dtype=np.uint16)
        for place, (ids, _) in enumerate(taken):
            table[place, : len(ids)] = ids
        batches.append((table, np.array([start for _, start in taken], dtype=np.int64)))
    rng.shuffle(batches)
    return batches


def _work(folder: str, seed: int, worker: int, tokens: int, chunk: int, results: multiprocessing.Queue) -> None:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    round_ = 0
    while True:
        results.put(make_batches(tokenizer, Random(f"train-{seed}-{worker}-{round_}"), tokens, chunk))
        round_ += 1


class Stream:
    """Batches without end. When the workers are slower than the training, recent chunks are shown again (counted)."""

    def __init__(self, folder: Path, seed: int, workers: int, tokens: int, chunk: int = CHUNK) -> None:
        context = multiprocessing.get_context("spawn")
        self.results = context.Queue(maxsize=4 * workers)
        self.workers = [
            context.Process(target=_work, args=(str(folder), seed, i, tokens, chunk, self.results), daemon=True) for i in range(workers)
        ]
        for worker in self.workers:
            worker.start()
        self.recent: deque[list[Batch]] = deque(maxlen=128)
        self.rng = Random(seed)
        self.fresh = self.again = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self._next_chunk()

    def _next_chunk(self) -> list[Batch]:
        try:
            chunk = self.results.get(timeout=0.001 if len(self.recent) >= 32 else 600)
        except queue.Empty:
            if not self.recent:
                raise RuntimeError("no training data after 600 s: a worker process died at its start") from None
            self.again += 1
            return self.rng.choice(self.recent)
        self.fresh += 1
        self.recent.append(chunk)
        return chunk

    def close(self) -> None:
        """End the worker processes."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join()
