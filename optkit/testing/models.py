"""Tiny models of four architectures, built from configs with fixed seeds, and what plain transformers makes of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Embeddings. The tokenizer has 256 tokens, one a byte, and for some architectures transformers adds one when it loads the tokenizer.
VOCABULARY = 320
#: kind -> transformers' config class, and what is particular about it: grouped queries, biases, head norms, Conv1D layers.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 4, "head_dim": 16}),
    "gpt2": ("GPT2Config", {"n_inner": 256}),
}
KINDS = tuple(ARCHITECTURES)
SIZES = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "max_position_embeddings": 256,
    "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def tiny_model(kind: str = "llama", *, seed: int = 0, **overrides: Any) -> tuple[PreTrainedModel, Any]:
    """A float32 model in eval mode and its tokenizer (one token a byte): 3 layers, hidden size 64, vocabulary 320.

    8 query heads of 8 (qwen3: of 16), two to a key head (gpt2: each with its own); the MLP is 256 wide.

    :param kind: one of ``KINDS``.
    :param overrides: fields of the config, such as ``num_hidden_layers=1``.
    """
    import torch
    import transformers

    from optkit.loading import byte_tokenizer

    if kind not in ARCHITECTURES:
        raise ValueError(f"no tiny model of the kind '{kind}'; there are {', '.join(KINDS)}")
    name, particular = ARCHITECTURES[kind]
    sizes = {key: value for key, value in SIZES.items() if kind != "gpt2" or key != "intermediate_size"}
    config = getattr(transformers, name)(**(sizes | particular | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in model.parameters():
                # transformers' small start makes every distribution flat and every bias zero: a wrong mask or a lost bias would not show
                parameter.copy_(5 * parameter if parameter.dim() > 1 else parameter + 0.1 * torch.randn_like(parameter))
    return model.eval(), byte_tokenizer()


def save_tiny_model(folder: Path, kind: str = "llama", **overrides: Any) -> Path:
    """A tiny model as an ordinary Hugging Face folder, for ``optkit run --model``."""
    model, tokenizer = tiny_model(kind, **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts(lengths: Sequence[int] = (5, 12, 3, 9), seed: int = 0) -> list[list[int]]:
    """Random token ids of these lengths, without special ones."""
    import random

    draw = random.Random(seed)
    return [[draw.randrange(3, 256) for _ in range(length)] for length in lengths]


def plain_greedy(model: Any, rows: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations by the plainest loop: each prompt alone, no cache, the whole text anew for every token."""
    import torch

    texts = []
    with torch.inference_mode():
        for row in rows:
            ids = list(row)
            for _ in range(new_tokens):
                logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            texts.append(ids[len(row) :])
    return texts


def plain_scores(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Natural log probabilities of each row's tokens from the second on, each row alone; float32 tensors of shape (length - 1,)."""
    import torch

    scores = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([list(row)], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            scores.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    return scores
