"""Figures of a trained model: exact match of greedy answers, negative log-likelihood, damage by rounding weights.

``python -m model.evaluate`` prints them as JSON for the bundled model and its frozen tests.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.frozen import BUNDLED, TESTS, read_test

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MAX_NEW_TOKENS = 72
BITS = (8, 4, 3, 2)


def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], batch: int = 64
) -> list[str]:
    """The greedy continuation of each prompt, without special tokens; prompts of like length go together."""
    import torch

    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in places], return_tensors="pt", padding=True).to(model.device)
        with torch.inference_mode():
            outputs = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
            )  # fmt: skip
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            answers[place] = text
    return answers


def answer_nll(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, samples: list[dict[str, str]], batch: int = 64
) -> float:
    """Mean negative log-likelihood, in nats a token, of the right answers (with eos) after their prompts."""
    import torch

    total, count = 0.0, 0
    for start in range(0, len(samples), batch):
        rows, starts = [], []
        for sample in samples[start : start + batch]:
            prompt = tokenizer(sample["prompt"]).input_ids
            answer = tokenizer(sample["answer"], add_special_tokens=False).input_ids
            rows.append([*prompt, *answer, tokenizer.eos_token_id])
            starts.append(len(prompt))
        length = max(map(len, rows))
        table = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
        table = table.to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=table).logits.float()
        logp = logits[:, :-1].log_softmax(-1).gather(-1, table[:, 1:, None]).squeeze(-1)
        for i, (row, first) in enumerate(zip(rows, starts, strict=True)):
            total -= logp[i, first - 1 : len(row) - 1].double().sum().item()
            count += len(row) - first
    return total / count


def wilson_interval(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def round_weights(model: torch.nn.Module, bits: int, group: int = 64) -> None:
    """Round every linear weight but the tied head to ``bits`` bits, in place: symmetric, nearest, a scale a group."""
    import torch

    top = 2 ** (bits - 1) - 1
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            groups = weight.reshape(-1, group)
            scale = groups.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / top
            module.weight.data = ((groups / scale).round().clamp(-top, top) * scale).reshape(weight.shape)


def measure(model: Any, tokenizer: Any, samples: list[dict[str, str]]) -> dict[str, Any]:
    """Exact match with its interval, and the answers' negative log-likelihood."""
    answers = greedy_answers(model, tokenizer, [sample["prompt"] for sample in samples])
    hits = sum(answer == sample["answer"] for answer, sample in zip(answers, samples, strict=True))
    low, high = wilson_interval(hits, len(samples))
    nll = answer_nll(model, tokenizer, samples)
    return {"n": len(samples), "exact": hits, "rate": hits / len(samples), "low": low, "high": high, "nll": nll}


def measure_damage(folder: Path, samples: list[dict[str, str]]) -> list[dict[str, float]]:
    """For 32, 8, 4, 3 and 2 bits: exact match, agreement with the untouched model, negative log-likelihood."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [sample["prompt"] for sample in samples]
    rows: list[dict[str, float]] = []
    untouched: list[str] = []
    for bits in (32, *BITS):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if bits != 32:
            round_weights(model, bits)
        answers = greedy_answers(model, tokenizer, prompts)
        untouched = untouched or answers
        rows.append({
            "bits": bits,
            "exact": sum(a == s["answer"] for a, s in zip(answers, samples, strict=True)) / len(samples),
            "agreement": sum(a == b for a, b in zip(answers, untouched, strict=True)) / len(samples),
            "nll": answer_nll(model, tokenizer, samples),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=BUNDLED)
    parser.add_argument("--limit", type=int, default=500, help="samples a test")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print, a test")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder).eval()
    for split in TESTS:
        samples = read_test(split)[: arguments.limit]
        print(json.dumps({"test": split, **measure(model, tokenizer, samples)}), flush=True)
        if arguments.show:
            show_errors(model, tokenizer, samples, arguments.show)
    for row in measure_damage(arguments.folder, read_test("seeds")[: min(arguments.limit, 200)]):
        print(json.dumps(row), flush=True)


def show_errors(model: Any, tokenizer: Any, samples: list[dict[str, str]], limit: int) -> None:
    """Print prompts with a wrong answer, the right one below."""
    answers = greedy_answers(model, tokenizer, [sample["prompt"] for sample in samples])
    wrong = [(s, a) for s, a in zip(samples, answers, strict=True) if s["answer"] != a]
    for sample, answer in wrong[:limit]:
        print(f"{sample['prompt']}\n  got  {answer}\n  want {sample['answer']}")


if __name__ == "__main__":
    main()
