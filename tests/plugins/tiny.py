"""Tiny models of eight architectures, built from configs with fixed seeds, and a stand-in for their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 128

#: kind -> config class of transformers and what it needs beyond the common sizes. GPT-2 and OPT name their sizes differently.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": None}),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 64, "ffn_dim": 128}),
}
KINDS = tuple(ARCHITECTURES)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GPT2_SIZES = {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}


class TinyTokenizer:
    """What techniques read of a tokenizer: special ids, and characters as tokens."""

    vocab_size = VOCAB
    bos_token_id = 0
    eos_token_id = 1
    pad_token_id = 2
    padding_side = "left"

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, **_: Any) -> list[int]:
        return [3 + ord(character) % (VOCAB - 3) for character in text]

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": self.encode(texts)}
        return {"input_ids": [self.encode(text) for text in texts]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(max(int(token) - 3, 0)) for token in ids)

    def save_pretrained(self, folder: str | Path) -> None:
        """Nothing of it needs saving."""


def tiny_config(kind: str, **overrides: Any) -> Any:
    """The config of ``kind`` (one of ``KINDS``): 2 layers, hidden 64, 4 heads of 16, vocabulary 128, attention SDPA."""
    import transformers

    name, extra = ARCHITECTURES[kind]
    sizes = GPT2_SIZES if kind == "gpt2" else SIZES
    if kind == "opt":
        sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    merged = {"vocab_size": VOCAB, **sizes, **special, **extra, **overrides}
    return getattr(transformers, name)(**merged)


def tiny_model(kind: str = "llama", *, seed: int = 0, spread: float = 5.0, **overrides: Any) -> tuple[Any, TinyTokenizer]:
    """A float32 model in eval mode, and its tokenizer stub.

    :param spread: factor on the initial weights of matrices: with transformers' 0.02 every distribution is nearly flat and the greedy
        text repeats one token, so a wrong mask or position would go unnoticed.
    :param overrides: fields of the config, such as ``num_hidden_layers=1``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(spread)
                else:  # biases start at zero: give them values, so that a technique that loses one is caught
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), TinyTokenizer()


def ragged_prompts(lengths: tuple[int, ...] = (5, 12, 3, 9), seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths without special ids."""
    import random

    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def plain_greedy(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations, each prompt alone and without any cache: the plain loop that engines are compared with."""
    import torch

    texts = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(new_tokens):
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            texts.append(ids[len(prompt) :])
    return texts
