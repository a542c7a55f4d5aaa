"""The decoder layers of a transformers model: finding them, and going on with some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from optkit import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Lists of a config with one value a layer.
A_VALUE_A_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


class Decoder:
    """A model's stack of decoder layers, all of which stay the same objects.

    :raises UsageError: for a model in which the layers are not one list, or count on their own number.
    """

    def __init__(self, model: PreTrainedModel):
        from torch import nn

        self.model: Any = model
        self.config: Any = model.config.get_text_config(decoder=True)
        count = self.config.num_hidden_layers
        found = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == count and any(hasattr(part, "layer_idx") for part in child[0].modules())
        ]
        kind = type(model).__name__
        if len(found) != 1:
            raise UsageError(
                f"layerdrop finds {len(found)} lists of {count} decoder layers in {kind} and needs one; leave it out for this model"
            )
        if getattr(self.config, "scale_attn_by_inverse_layer_idx", False):
            raise UsageError(f"layerdrop: {kind} scales attention by a layer's number, which would change; leave it out for this model")
        self.parent, self.name, self.layers = found[0]
        self.lists = {
            name: list(values) for name in A_VALUE_A_LAYER if (values := getattr(self.config, name, None)) and len(values) == count
        }

    def __len__(self) -> int:
        return len(self.layers)

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these layers alone. Their numbers are what a KV cache finds their keys and values by, so they are counted anew."""
        from torch import nn

        layers = [self.layers[index] for index in kept]
        for name, values in self.lists.items():
            setattr(self.config, name, [values[index] for index in kept])
        self.config.num_hidden_layers = len(layers)
        setattr(self.parent, self.name, nn.ModuleList(layers))
        for number, layer in enumerate(layers):
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = number

    @contextmanager
    def only(self, kept: Sequence[int]) -> Iterator[None]:
        """These layers alone, for as long as the block takes."""
        self.keep(kept)
        try:
            yield
        finally:
            self.keep(range(len(self.layers)))
