"""Attention as a compiled engine needs it: the same values as the model's own implementation, without copies and needless masks.

Registered with transformers beside the implementation that the model has, and switched on only while the engine computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from optkit_plugins.kernels.attention.decode import LARGEST_SIZE, decode_attention, runs_on, spans_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attention = Callable[..., tuple[torch.Tensor, Any]]
#: Rows × key heads for which ``decode_attention`` finds counters.
MOST_PAIRS = 65536


def grouped_decode(attend: Attention) -> Attention:
    """``attend``, but where one query meets grouped heads the query heads of a group become the rows of one attention.

    With a mask, SDPA cannot group heads itself, and repeating K and V copies the whole *allocated* cache for every layer and step.
    """

    def attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        rows, heads, length, size = query.shape
        groups = getattr(module, "num_key_value_groups", 1)
        if length != 1 or groups == 1 or attention_mask is None:
            return attend(module, query, key, value, attention_mask, **kwargs)
        grouped = query.view(rows, heads // groups, groups, size)
        out, weights = attend(UNGROUPED, grouped, key, value, attention_mask, **kwargs)  # (rows, groups, kv heads, size)
        return out.transpose(1, 2).reshape(rows, 1, heads, -1), weights

    return attention


def by_spans(attend: Attention, counters: torch.Tensor) -> Attention:
    """``attend``, but ``decode_attention`` where the mask is one of spans: (2, rows, queries, 1) integers, first and last column of each query."""

    def attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        if attention_mask is None or attention_mask.dtype != torch.int64:
            return attend(module, query, key, value, attention_mask, **kwargs)
        first, last = attention_mask[0].flatten(), attention_mask[1].flatten()
        if kwargs.get("position_bias") is not None:
            mask = spans_mask(first, last, key.shape[2]).view(query.shape[0], 1, query.shape[2], -1)
            return attend(module, query, key, value, mask, **kwargs)
        scale = kwargs.get("scaling") or query.shape[3] ** -0.5
        rows, heads, length, size = query.shape
        # queries of one row (a draft) share its keys
        flat = query if length == 1 else query.transpose(1, 2).reshape(rows * length, heads, 1, size)
        return decode_attention(flat, key, value, first, last, scale=scale, counters=counters).view(rows, length, heads, -1), None

    return attention


class _Ungrouped(torch.nn.Module):
    """Stands for an attention module with as many key heads as query heads."""

    num_key_value_groups = 1
    is_causal = False


UNGROUPED = _Ungrouped()


def causal_without_padding(
    *, q_length: Any, kv_length: Any, attention_mask: Any = None, local_size: int | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """transformers' SDPA mask for rows padded on the *right*: no token looks to its right, so padding needs no mask.

    Without a mask SDPA takes its causal kernel; under ``torch.compile`` transformers itself would always build one.
    """
    if local_size is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=None, local_size=local_size, **kwargs)


def head_size(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class EngineAttention:
    """The implementations of one model's engine: ``decode`` for one query a row, ``score`` for whole right-padded rows.

    :ivar spans: whether ``decode`` takes masks of spans (``by_spans``), which the kernel for true lengths does.
    """

    def __init__(self, model: PreTrainedModel):
        self.configs: list[Any] = list({id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values())
        self.own = str(model.config._attn_implementation)
        self.names = {"decode": self.own, "score": self.own}
        #: bool masks work for everything built on SDPA, eager attention adds its mask to the scores
        self.additive_mask = self.own == "eager"
        self.spans = False
        if self.own in ALL_ATTENTION_FUNCTIONS and ALL_MASK_ATTENTION_FUNCTIONS.get(self.own) is sdpa_mask:
            attend: Attention = ALL_ATTENTION_FUNCTIONS[self.own]  # type: ignore[assignment]
            self.names = {"decode": f"optkit_decode_{self.own}", "score": f"optkit_score_{self.own}"}
            decode = grouped_decode(attend)
            self.spans = runs_on(model.device) and head_size(model) <= LARGEST_SIZE
            if self.spans:
                # kept here too: another engine registers its own under this name, and recorded graphs know only the address
                self.counters = torch.zeros(MOST_PAIRS, dtype=torch.int32, device=model.device)
                decode = by_spans(decode, self.counters)
            AttentionInterface.register(self.names["decode"], decode)
            AttentionMaskInterface.register(self.names["decode"], sdpa_mask)  # type: ignore[arg-type]
            AttentionInterface.register(self.names["score"], attend)  # type: ignore[arg-type]
            AttentionMaskInterface.register(self.names["score"], causal_without_padding)

    @property
    def usable(self) -> bool:
        """Whether a mask of fixed shape can be given: not with flash-attn and FlexAttention, which take their own forms."""
        return self.additive_mask or self.names["decode"] != self.own

    @contextmanager
    def use(self, purpose: str) -> Iterator[None]:
        before = [config._attn_implementation for config in self.configs]
        for config in self.configs:
            config._attn_implementation = self.names[purpose]
        try:
            yield
        finally:
            for config, implementation in zip(self.configs, before, strict=True):
                config._attn_implementation = implementation
