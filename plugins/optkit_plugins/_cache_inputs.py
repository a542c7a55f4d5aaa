"""A causal language model as a function without state: keys and values come in and go out as tensors, as exporters need it."""

from __future__ import annotations

from typing import Any

from optkit import OptkitError


def cache_shapes(model: Any) -> list[tuple[int, int, int]]:
    """(heads, width of a key, width of a value) of each layer, read from the cache of a real forward pass: configs name them differently.

    :raises OptkitError: for a model that keeps something else than keys and values between tokens.
    """
    import torch
    from transformers import DynamicCache

    ids = torch.tensor([[0, 0]], device=model.device)
    with torch.no_grad():
        output = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])
    if not layers or any(getattr(layer, "keys", None) is None or layer.keys.dim() != 4 for layer in layers):
        raise OptkitError(
            f"{type(model).__name__} keeps something else than keys and values between tokens, which this export has no inputs for; "
            "leave out the technique that exports it"
        )
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]


def with_cache_inputs(model: Any, *, same_length: bool = False) -> Any:
    """A module of (ids, mask, positions, key and value of each layer) that gives (logits, new key and value of each layer).

    :param same_length: the new keys and values lose as many of the oldest tokens as came in, so that shapes never change.

    The cache is built inside and without the config: every layer then keeps all tokens, and a sliding window is left to the mask.
    """
    from torch import nn
    from transformers import DynamicCache

    class WithCacheInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            output = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
            )
            present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
            if same_length:
                present = [tensor[:, :, input_ids.shape[1] :] for tensor in present]
            return (output.logits, *present)

    return WithCacheInputs().eval()
