"""Train the bundled model: ``python -m model.train`` (minutes on a GPU; ``--minutes 600`` or more on a CPU).

The model is made in ``build/model`` and copied to ``optkit/bundled`` when it meets the targets. The data is generated while training,
every order once (``Stream``). The loss is cross-entropy on the answer, plus a tenth of it on the prompt, which keeps the model's
perplexity on whole texts meaningful.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import data
from model.evaluate import measure
from model.frozen import BUNDLED, TESTS, read_test

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

PROMPT_WEIGHT = 0.1
TARGETS = {"seeds": 0.98, "names": 0.90}  # exact match
BUILD = Path(__file__).parents[1] / "build" / "model"


def build_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """2.5 million parameters: 4 layers, width 256, 8 heads of 32 with as many key-value heads, tied embeddings."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=data.PAD, bos_token_id=data.BOS, eos_token_id=data.EOS, initializer_range=0.04,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=72, pad_token_id=data.PAD, bos_token_id=data.BOS, eos_token_id=data.EOS
    )
    return model


def answer_loss(model: LlamaForCausalLM, tokens: torch.Tensor, starts: torch.Tensor) -> tuple[Any, Any]:
    """Weighted loss over the batch, and the mean over answer tokens alone. ``tokens`` (rows, length), right padded."""
    import torch

    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    targets = tokens[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    in_answer = ((place >= starts[:, None]) & (targets != data.PAD)).flatten().float()
    in_prompt = (place < starts[:, None]).flatten().float()
    answer = (losses * in_answer).sum() / in_answer.sum()
    return answer + PROMPT_WEIGHT * (losses * in_prompt).sum() / in_prompt.sum(), answer.detach()


def build_optimizer(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=torch.cuda.is_available())


def schedule(step: int, progress: float, warmup: int = 300) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to zero over ``progress`` (0 to 1)."""
    return min(1.0, (step + 1) / warmup) * max(0.01, 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def take_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: data.Batch) -> torch.Tensor:
    """One update (bfloat16 autocast on a GPU, gradient norm at most 1); the loss on the answers, still on the device."""
    import torch

    table, starts = batch
    tokens, first = torch.from_numpy(table.astype("int64")).to(model.device), torch.from_numpy(starts).to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        loss, answer = answer_loss(model, tokens, first)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return answer


def train(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """The trained model; also saved in ``arguments.output`` every minute."""
    import torch
    from transformers import AutoTokenizer

    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)
    model = build_model(len(tokenizer), arguments.seed)
    model.to(device)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, arguments.learning_rate)
    stream = data.Stream(arguments.output, arguments.seed, arguments.workers, arguments.tokens, arguments.chunk)
    begin = said = saved = time.monotonic()
    print(f"{model.num_parameters():,} parameters on {device}, {arguments.workers} data workers", flush=True)
    for step, (table, starts) in enumerate(stream):
        if step == 0:
            begin = said = saved = time.monotonic()  # the workers' start is not training time
        now = time.monotonic()
        progress = step / arguments.steps if arguments.steps else (now - begin) / (60 * arguments.minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * schedule(step, progress)
        answer = take_step(model, optimizer, (table, starts))
        if now - said > 15 or step in (10, 100):
            said = now
            print(f"{now - begin:6.0f} s  step {step}  answer loss {answer.item():.4f}  "
                  f"chunks {stream.fresh} fresh, {stream.again} again", flush=True)  # fmt: skip
        if now - saved > 60:
            saved = now
            model.save_pretrained(arguments.output)
            if device == "cuda":
                report(model, tokenizer, 256)
    stream.close()
    model.save_pretrained(arguments.output)
    return model


def report(model: LlamaForCausalLM, tokenizer: Any, limit: int) -> dict[str, float]:
    """Print the figures of the frozen tests; exact match of each. (The training never looks at the result.)"""
    model.eval()
    rates = {}
    for split in TESTS:
        figures, _ = measure(model, tokenizer, read_test(split)[:limit])
        print(json.dumps({"test": split, **figures}), flush=True)
        rates[split] = figures["rate"]
    model.train()
    return rates


def install(folder: Path) -> None:
    """Copy the files of a model into the package."""
    for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / file, BUNDLED / file)


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=BUILD)
    parser.add_argument("--minutes", type=float, default=5.5, help="training time")
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--tokens", type=int, default=65536, help="padded tokens a step")
    parser.add_argument("--chunk", type=int, default=data.CHUNK, help="orders that a data worker makes at once")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=max(1, cores - 2), help="processes that generate data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=500, help="samples a test in the final report")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    from model.tokenizer import build_tokenizer, save_tokenizer

    if not (arguments.output / "tokenizer.json").exists():
        save_tokenizer(build_tokenizer(), arguments.output)
    model = train(arguments)
    from transformers import AutoTokenizer

    rates = report(model, AutoTokenizer.from_pretrained(arguments.output), arguments.limit)
    missed = [f"{split} {rates[split]:.3f} of {target}" for split, target in TARGETS.items() if rates[split] < target]
    if missed:
        raise SystemExit(f"exact match below target: {', '.join(missed)}. The model stays in {arguments.output}; train longer (--minutes).")
    if arguments.output == BUILD and arguments.limit >= 500:
        install(BUILD)
        print(f"installed in {BUNDLED}; now measure: python -m model.evaluate")


if __name__ == "__main__":
    main()
