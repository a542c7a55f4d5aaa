"""What an engine answered: whether it is whole, the same again, and of one mind."""

from __future__ import annotations

from typing import Any

from optkit.testing.models import prompts
from optkit.testing.subject import NEW_TOKENS, Outcome

#: Largest difference of a log probability, in nats, that rounding explains for a technique that changes no value, in float32.
ROUNDING_NATS = 1e-4


def incomplete(outcome: Outcome) -> str:
    """What is missing, or not finite; empty where nothing is."""
    import torch

    lengths = [len(row) for row in prompts()]
    if outcome.tokens is not None and [len(row) for row in outcome.tokens] != [NEW_TOKENS] * len(lengths):
        return f"{NEW_TOKENS} tokens for each of {len(lengths)} prompts were asked for, and it gave {[len(row) for row in outcome.tokens]}"
    if outcome.scores is None:
        return ""
    if [len(row) for row in outcome.scores] != [length - 1 for length in lengths]:
        return f"scores of {[length - 1 for length in lengths]} tokens were asked for, and it gave {[len(row) for row in outcome.scores]}"
    return "" if all(torch.isfinite(row).all() for row in outcome.scores) else "its scores are not finite"


def same_again(outcome: Outcome) -> bool:
    """Whether the engine gave the same when it was asked a second time."""
    if outcome.tokens is not None:
        return bool(outcome.again == outcome.tokens)
    return largest_difference(outcome.scores, outcome.again) <= ROUNDING_NATS / 100


def distributions_moved(outcome: Outcome) -> float:
    """Nats between ``score``, which perplexity is taken from, and ``log_probs``, which the divergence from the baseline is taken from."""
    import torch

    rows = prompts()
    with torch.no_grad():
        tables = list(outcome.session.engine.log_probs(rows, [1] * len(rows)))
    own = [table.gather(1, torch.tensor(row[1:], device=table.device)[:, None])[:, 0] for table, row in zip(tables, rows, strict=True)]
    return largest_difference(outcome.scores, own)


def largest_difference(first: Any, second: Any) -> float:
    """Between two lists of scores, in nats; 0 where one of them is ``None``."""
    if first is None or second is None:
        return 0.0
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(first, second, strict=True))
