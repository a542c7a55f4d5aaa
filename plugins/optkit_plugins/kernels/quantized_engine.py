"""transformers' ``generate`` with a quantized cache of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optkit import TransformersEngine
from optkit_plugins.kernels.quantized_cache import QuantizedBlockCache

if TYPE_CHECKING:
    from transformers import GenerationConfig


class QuantizedCacheEngine(TransformersEngine):
    """The default engine, giving each call a fresh ``QuantizedBlockCache``."""

    def generate_arguments(self) -> dict[str, Any]:
        return {"past_key_values": QuantizedBlockCache(self.model, self.trial.settings["generate.cache_bits"] or 4)}

    def generation_config(self, new_tokens: int, exact: bool) -> GenerationConfig:
        config = super().generation_config(new_tokens, exact)
        config.cache_implementation = config.cache_config = None  # else transformers would make its own
        return config
