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

MAX_NEW_TOKENS = 72
BITS = (8, 4, 3, 2)


def greedy_answers(model: Any, tokenizer: Any, prompts: list[str], batch: int = 64) -> list[str]:
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


def mean_nll(model: Any, tokenizer: Any, samples: list[dict[str, str]], batch: int = 64) -> dict[str, float]:
    """Mean negative log-likelihood, in nats a token, of the right ``answer`` (with eos) and of the ``prompt``.

    In float64: the right tokens' probabilities are within 1e-5 of one, where float32 has few digits left.
    """
    import torch

    total, count = {"answer": 0.0, "prompt": 0.0}, {"answer": 0, "prompt": 0}
    for start in range(0, len(samples), batch):
        rows, starts = [], []
        for sample in samples[start : start + batch]:
            prompt = tokenizer(sample["prompt"]).input_ids
            answer = tokenizer(sample["answer"], add_special_tokens=False).input_ids
            rows.append([*prompt, *answer, tokenizer.eos_token_id])
            starts.append(len(prompt))
        length = max(map(len, rows))
        table = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]).to(model.device)
        with torch.inference_mode():
            logp = model(input_ids=table).logits[:, :-1].double().log_softmax(-1)
        logp = logp.gather(-1, table[:, 1:, None]).squeeze(-1)
        for i, (row, first) in enumerate(zip(rows, starts, strict=True)):
            for part, low, high in (("prompt", 0, first - 1), ("answer", first - 1, len(row) - 1)):
                total[part] -= logp[i, low:high].sum().item()
                count[part] += high - low
    return {part: total[part] / count[part] for part in total}


def wilson_interval(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), min(1.0, (middle + half) / (1 + z * z / n))


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


def measure(model: Any, tokenizer: Any, samples: list[dict[str, str]]) -> tuple[dict[str, Any], list[str]]:
    """Exact match with its 95 % interval and the right answers' negative log-likelihood; the greedy answers."""
    answers = greedy_answers(model, tokenizer, [sample["prompt"] for sample in samples])
    hits = sum(answer == sample["answer"] for answer, sample in zip(answers, samples, strict=True))
    low, high = wilson_interval(hits, len(samples))
    figures = {"n": len(samples), "exact": hits, "rate": hits / len(samples), "low": low, "high": high}
    return figures | {"nll": mean_nll(model, tokenizer, samples)["answer"]}, answers


def measure_damage(folder: Path, samples: list[dict[str, str]]) -> list[dict[str, float]]:
    """For 32, 8, 4, 3 and 2 bits: exact match, agreement with the untouched model, negative log-likelihoods."""
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
        nll = mean_nll(model, tokenizer, samples)
        rows.append({
            "bits": bits,
            "exact": sum(a == s["answer"] for a, s in zip(answers, samples, strict=True)) / len(samples),
            "agreement": sum(a == b for a, b in zip(answers, untouched, strict=True)) / len(samples),
            "nll": nll["answer"],
            "prompt_nll": nll["prompt"],
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=BUNDLED)
    parser.add_argument("--limit", type=int, default=500, help="samples a test")
    parser.add_argument("--damage", type=int, default=200, help="samples for the damage by rounding; 0 for none")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print, a test")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder).eval()
    for split in TESTS:
        samples = read_test(split)[: arguments.limit]
        figures, answers = measure(model, tokenizer, samples)
        print(json.dumps({"test": split, **figures}), flush=True)
        wrong = [(s, a) for s, a in zip(samples, answers, strict=True) if s["answer"] != a]
        for sample, answer in wrong[: arguments.show]:
            print(f"{sample['prompt']}\n  got  {answer}\n  want {sample['answer']}", flush=True)
    if arguments.damage:
        for row in measure_damage(arguments.folder, read_test("seeds")[: arguments.damage]):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
