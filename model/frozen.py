"""The three frozen tests, 500 orders each: new seeds, new names, held-out recombinations.

``python -m model.frozen`` writes them. They are made once; the model is never trained on a text of theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from model import grammar
from model.data import encode_orders

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUNDLED = Path(__file__).parents[1] / "optkit" / "bundled"
TESTS = ("seeds", "names", "recombined")
SIZE = 500


def draw_test(split: str, tokenizer: Tokenizer, size: int = SIZE) -> list[grammar.Order]:
    """The orders of one frozen test, always the same ones; none longer than the model's training allowed."""
    rng, seen = Random(f"frozen-{split}"), set()
    orders: list[grammar.Order] = []
    while len(orders) < size:
        order = grammar.draw_order(rng, split)
        if order.prompt not in seen and encode_orders(tokenizer, [order]):
            seen.add(order.prompt)
            orders.append(order)
    return orders


def read_test(split: str, folder: Path = BUNDLED) -> list[dict[str, str]]:
    """The lines of one frozen test: id, prompt, answer, language."""
    lines = (folder / "samples" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_tests(folder: Path = BUNDLED) -> None:
    """Write the JSONL files; the tokenizer must be there already."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for split in TESTS:
        lines = [
            {"id": f"{split}-{i:03d}", "prompt": order.prompt, "answer": order.answer, "language": order.language}
            for i, order in enumerate(draw_test(split, tokenizer))
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "samples" / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_tests()
