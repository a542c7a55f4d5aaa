"""Engines: what generates and scores batches. The default one is transformers itself, as users run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from optkit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel

    from optkit.context import TrialContext


class Engine:
    """Generates and scores one batch at a time. Subclass it for another runtime and answer ``build_engine`` with it.

    An engine without distributions (a remote server, say) leaves ``log_probs`` alone: metrics that need it are then shown as
    unavailable with the engine's reason.
    """

    name = "engine"
    #: why ``score``/``log_probs`` cannot be answered; ``None`` when they can.
    cannot_score: str | None = None

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        """Continuations of a batch.

        :param prompts: token ids, one list a prompt.
        :param new_tokens: upper bound of new tokens a prompt; with ``exact`` the end-of-text token does not end a text (equal work for timing).
        :return: the new token ids of each prompt, without end-of-text and padding.
        """
        raise NotImplementedError

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        """For each sequence, natural log probabilities, float32, of shape (len(sequence) - start, vocabulary): row i is the distribution of token start + i."""
        raise NotImplementedError(self.cannot_score or f"{self.name} gives no distributions")

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        """For each sequence, the natural log probability, float32, of each of its tokens from ``start`` (at least 1) on."""
        import torch

        scores = []
        for sequence, start, rows in zip(sequences, starts, self.log_probs(sequences, starts), strict=True):
            targets = torch.tensor(list(sequence[start:]), device=rows.device)
            scores.append(rows.gather(1, targets[:, None])[:, 0])
        return scores

    def close(self) -> None:
        """Free what the engine holds (a server process, a session)."""


class TransformersEngine(Engine):
    """``model.generate`` and ``model.forward``, with every setting of the group ``generate`` honoured."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel, trial: TrialContext):
        self.model: Any = model
        self.trial = trial
        self.eos = end_of_text(model, trial.tokenizer)
        self.pad = pad_token(trial.tokenizer, self.eos)

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        import torch

        ids, mask = pad_left(prompts, self.pad, self.model.device)
        config = self.generation_config(new_tokens, exact)
        with torch.inference_mode():
            rows = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **self.generate_arguments())
        return [trim(row, self.eos, exact) for row in rows[:, ids.shape[1] :].tolist()]

    def generate_arguments(self) -> dict[str, Any]:
        """Arguments of ``generate`` that are objects of one call: a cache that transformers has no name for."""
        if self.trial.settings["generate.cache"] == "quantized":
            raise UsageError("generate.cache = quantized needs a technique that keeps such a cache; `optkit list-plugins` shows them")
        if self.trial.settings["generate.cache"] == "sliding":
            return {"past_key_values": sliding_cache(self.model, self.trial.settings["generate.cache_window"])}
        return {}

    def generation_config(self, new_tokens: int, exact: bool) -> GenerationConfig:
        from transformers import GenerationConfig

        settings = self.trial.settings
        wanted = {
            name.removeprefix("generate."): settings[name]
            for name in SAMPLING
            if settings[name] is not None and (settings["generate.do_sample"] or name not in NEEDS_SAMPLING)
        }
        cache = settings["generate.cache"]
        if cache in ("static", "offloaded"):
            wanted["cache_implementation"] = cache
        lookup = settings["generate.prompt_lookup_tokens"]
        if lookup:
            wanted["prompt_lookup_num_tokens"] = lookup
            wanted["max_matching_ngram_size"] = settings["generate.prompt_lookup_ngram"]
        return GenerationConfig(
            max_new_tokens=new_tokens,
            use_cache=cache != "off",
            eos_token_id=NEVER if exact and self.eos else sorted(self.eos) or None,
            pad_token_id=self.pad,
            **wanted,
        )

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        import torch

        ids, mask = pad_right(sequences, self.pad, self.model.device)
        with torch.inference_mode():
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, sequence, start in zip(logits, sequences, starts, strict=True):
            yield row[start - 1 : len(sequence) - 1].float().log_softmax(-1)


#: An end of text that no model makes. ``min_new_tokens`` would do too, at the cost of a logits processor that no user's call has, and
#: ``None`` would be filled in from the model's own generation config.
NEVER = 2**31 - 1
#: Settings that ``generate`` takes by the same name.
SAMPLING = tuple(
    f"generate.{name}"
    for name in (
        "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty",
    )
)  # fmt: skip
NEEDS_SAMPLING = frozenset({"generate.temperature", "generate.top_k", "generate.top_p"})


def sliding_cache(model: PreTrainedModel, window: int | None) -> Any:
    """A cache that keeps the last ``window`` tokens of each layer, whatever the model's own attention span."""
    import copy

    from transformers import DynamicCache

    config = copy.deepcopy(model.config.get_text_config(decoder=True))
    config.sliding_window = window or 1024
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    return DynamicCache(config=config)


def end_of_text(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: the generation config's, else the tokenizer's."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = getattr(tokenizer, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(ids) if isinstance(ids, list | tuple) else frozenset({int(ids)})


def pad_token(tokenizer: Any, eos: frozenset[int]) -> int:
    """The id that fills a row. Any id will do, because the mask hides it."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return int(pad) if pad is not None else min(eos, default=0)


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of shape (rows, longest), padded on the left as generation needs it."""
    return _pad(rows, pad, device, left=True)


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of shape (rows, longest), padded on the right."""
    return _pad(rows, pad, device, left=False)


def _pad(rows: Sequence[Sequence[int]], pad: int, device: Any, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    longest = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        fill = longest - len(row)
        ids.append([pad] * fill + list(row) if left else list(row) + [pad] * fill)
        mask.append([0] * fill + [1] * len(row) if left else [1] * len(row) + [0] * fill)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def trim(row: list[int], eos: frozenset[int], exact: bool) -> list[int]:
    """The row up to its first end-of-text id."""
    if exact:
        return row
    return next((row[:end] for end, token in enumerate(row) if token in eos), row)
