"""transformers' ``generate`` with a quantized cache of our own."""

from __future__ import annotations

from typing import Any

from optkit import TransformersEngine
from optkit_plugins.kernels.memory.quantized_cache import QuantizedBlockCache


class QuantizedCacheEngine(TransformersEngine):
    """The default engine, giving each call a fresh ``QuantizedBlockCache``."""

    def generate_arguments(self) -> dict[str, Any]:
        return {"past_key_values": QuantizedBlockCache(self.model, self.trial.settings["generate.cache_bits"] or 4)}
