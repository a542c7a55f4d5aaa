"""The bundled model's byte-level BPE tokenizer.

Whole words of the grammar are tokens of their own (``ignore_merges``, as in Llama 3); everything else is built from
bytes by merges that are learned on product names only. A name's pieces are therefore the same in the prompt (after a
space) and in the JSON (after a quote), which is what copying needs. Digits stand alone. A JSON key is one token
with its punctuation.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from model import grammar

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

VOCAB_SIZE = 1152
MERGES = 192
SPECIAL = ["<pad>", "<s>", "</s>"]
KEYS = "items|product|quantity|unit|price|currency|due"
PATTERN = "|".join([rf'[\]}}{{",]+(?:{KEYS})":[\[]?"?', r" ?=>", r"\"?\}", r" ?\p{L}+", r"\d", r" ?[^\s\p{L}\d]", r"\s"])


def _splitter() -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _words(seed: int, count: int) -> Counter[str]:
    """How often each piece of the pre-tokenizer occurs in ``count`` training orders."""
    splitter, rng = _splitter(), Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(count):
        order = grammar.draw_order(rng)
        seen.update(piece for piece, _ in splitter.pre_tokenize_str(order.prompt + order.answer))
    return seen


def _learn_merges(seed: int, count: int) -> list[tuple[str, str]]:
    """The merges of a BPE trained on names alone."""
    from tokenizers import Tokenizer, models, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _splitter()
    rng = Random(seed)
    words = (word for _ in range(count) for name in grammar.draw_order(rng).names for word in name.split())
    trainer = trainers.BpeTrainer(vocab_size=256 + MERGES, initial_alphabet=_bytes(), show_progress=False)
    learner.train_from_iterator(words, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(merge) for merge in merges][:MERGES]


def _is_initial(word: str) -> bool:
    """A space and one capital: mostly the start of a name, whose pieces must not depend on the space."""
    return len(word) == 2 and word[0] == "Ġ" and word[1].isupper() and word[1] != "I"


def _bytes() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def build_tokenizer(seed: int = 0, samples: int = 60_000) -> Tokenizer:
    """Learn the tokenizer from ``samples`` training orders; the same arguments give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, processors

    merges = _learn_merges(seed, samples)
    pieces = list(dict.fromkeys(SPECIAL + _bytes() + [a + b for a, b in merges]))
    counts = _words(seed + 1, samples)
    known = set(pieces)
    words = [word for word in sorted(counts, key=lambda word: (-counts[word], word)) if word not in known]
    words = [word for word in words if not _is_initial(word)]
    pieces += words[: VOCAB_SIZE - len(pieces)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for transformers."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # the class name that transformers 4 knows too
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
