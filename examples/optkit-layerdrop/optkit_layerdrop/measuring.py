"""What the removal of a layer costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from optkit_layerdrop.layers import Decoder

#: Random tokens that show how much a layer changes the hidden states, in rows.
RANDOM_ROWS, RANDOM_LENGTH = 8, 64


def least_harmful(
    decoder: Decoder, count: int, keep_last: int, texts: Sequence[Sequence[int]], tokens: int, seed: int
) -> tuple[list[int], list[float]]:
    """The layers that are kept when ``count`` go, one at a time, each the one that is then missed least.

    :param texts: token ids of calibration text; without any, hidden states on random tokens decide.
    :return: indices of the kept layers in their order, and for each that went the loss in nats a token without it (or its influence).
    """
    import torch

    limited = limit(texts, tokens)
    kept, steps = list(range(len(decoder))), []
    with torch.no_grad():
        influences = {} if limited else block_influence(decoder, seed)
        for _ in range(count):
            candidates = kept[: len(kept) - keep_last]
            harm = influences if influences else {index: loss_without(decoder, kept, index, limited) for index in candidates}
            worst = min(candidates, key=lambda index: (harm[index], index))
            kept.remove(worst)
            steps.append(round(harm[worst], 6))
    return kept, steps


def limit(texts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The first ``tokens`` tokens, in texts of two and more."""
    rows, left = [], tokens
    for text in texts:
        row = list(text[:left])
        if len(row) > 1:
            rows.append(row)
            left -= len(row)
    return rows


def loss_without(decoder: Decoder, kept: Sequence[int], index: int, texts: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood, nats a token, with one layer fewer."""
    with decoder.only([other for other in kept if other != index]):
        return mean_loss(decoder.model, texts)


def mean_loss(model: Any, texts: Sequence[Sequence[int]]) -> float:
    import torch

    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([list(text)], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(text) - 1
    return total / count


def block_influence(decoder: Decoder, seed: int) -> dict[int, float]:
    """1 - mean cosine similarity of what goes into a layer and what comes out (Men et al. 2024), on random tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(decoder.config.vocab_size, (RANDOM_ROWS, RANDOM_LENGTH), generator=generator)
    influence: dict[int, float] = {}

    def watch(index: int) -> Any:
        def seen(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            before: torch.Tensor = arguments[0] if arguments else keywords["hidden_states"]
            after: torch.Tensor = output[0] if isinstance(output, tuple) else output
            influence[index] = 1 - float(torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).mean())

        return seen

    hooks = [layer.register_forward_hook(watch(index), with_kwargs=True) for index, layer in enumerate(decoder.layers)]
    try:
        decoder.model(input_ids=ids.to(decoder.model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return influence
