"""Decoder layers compiled one at a time: the first of a kind is compiled, and all others run its code with weights of their own.

A forward pass over many tokens keeps a GPU busy for milliseconds a layer, so nothing is lost between two layers, and compiling one of them
takes seconds where a whole model takes half a minute. Rows and columns are symbols: one graph serves all shapes, another single rows.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.experimental._config as symbols
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers.cache_utils import Cache

from optkit_plugins.kernels.decode.recorded import without_recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit_plugins.kernels.decode.loop import FixedLayer, Slot


#: Graphs of one kind of work, at most: models have a few kinds of layers, and where each layer needs a graph of its own nothing is gained.
MOST_GRAPHS = 4
#: The kind of graphs that a compiler's passes for products of one row are for.
ONE_ROW = "steps of one row"


class PromptCache:
    """What one layer sees of a cache while it reads prompts: it writes the first columns, and attends to its own keys only.

    A cache of all layers would make every layer a graph of its own, since each reads another element.
    """

    def __init__(self, layer: FixedLayer, rows: int):
        self.keys, self.values = layer.keys[:rows], layer.values[:rows]

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        columns = keys.shape[2]
        self.keys[:, :, :columns].copy_(keys)
        self.values[:, :, :columns].copy_(values)
        return keys, values


class StepCache:
    """The same for a step: it writes the newest column, and attends to all."""

    def __init__(self, layer: FixedLayer):
        self.keys, self.values, self.column = (part.view_as(part) for part in (layer.keys, layer.values, layer.column))

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.column, keys)
        self.values.index_copy_(2, self.column, values)
        return self.keys, self.values


class CompiledLayers:
    """The layers of a model's body, and the norm behind them.

    :ivar problem: why they run as they are, or "".
    :param arguments: of ``torch.compile``; CUDA graphs are left out.
    """

    def __init__(self, model: PreTrainedModel, arguments: dict[str, Any]):
        self.arguments, _ = without_recording(arguments)
        self.layers, self.norms = decoder_layers(model)
        self.problem = "" if self.layers else f"{type(model).__name__} has no list of layers of which each could be compiled alone"
        self.compiled: dict[str, Callable[..., Any]] = {}

    @contextmanager
    def use(self, kind: str, caches: Sequence[PromptCache | StepCache] = ()) -> Iterator[None]:
        """Inside, the model's layers are compiled ones.

        :param kind: what the graphs are for; each kind has graphs of its own. :param caches: where each layer writes keys and values.
        """
        for name in (kind, f"norm of {kind}"):
            if name not in self.compiled:
                self.compiled[name] = compiled_layer(self.arguments, name)
        seen: Sequence[PromptCache | StepCache | None] = caches or [None] * len(self.layers)
        for layer, cache in zip(self.layers, seen, strict=True):
            layer.forward = partial(self._run, kind, layer, cache)  # type: ignore[method-assign]
        for norm in self.norms:
            norm.forward = partial(self._run, f"norm of {kind}", norm, None)  # type: ignore[method-assign]
        # Sizes that happen to be equal once (rows and columns, say) must not be taken for the same; numbers of the model are no symbols.
        no_ducks = symbols.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        try:
            with no_ducks, torch._dynamo.config.patch(specialize_float=True, recompile_limit=MOST_GRAPHS):
                yield
        finally:
            for part in (*self.layers, *self.norms):
                del part.forward

    def _run(self, kind: str, layer: Any, cache: PromptCache | StepCache | None, *args: Any, **kwargs: Any) -> Any:
        def seen(value: Any) -> Any:
            return cache if cache is not None and isinstance(value, Cache) else value

        args, kwargs = tuple(seen(value) for value in args), {name: seen(value) for name, value in kwargs.items()}
        if not self.problem:
            try:
                return self.compiled[kind](layer, *args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                self.problem = f"layers are not compiled: {str(error).strip().splitlines()[0]}"
        return run_layer(layer, *args, **kwargs)


class LayeredStep:
    """A step of ``slot`` with compiled layers, whose graphs all buckets share; only what follows the logits is compiled for this one."""

    def __init__(self, slot: Slot, layers: CompiledLayers, append: Callable[..., None]):
        self.slot, self.layers, self.append = slot, layers, append

    def __call__(self) -> None:
        slot, kind = self.slot, "steps" if self.slot.rows > 1 else ONE_ROW
        slot._append = self.append  # type: ignore[method-assign]
        try:
            # with guards: layers of several kinds share the code
            with torch.compiler.set_stance("default"), self.layers.use(kind, [StepCache(layer) for layer in slot.layers]):
                slot.step()
        finally:
            del slot._append


def run_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, whatever stands in for it at the moment. This is what is compiled."""
    return type(layer).forward(layer, *args, **kwargs)


def decoder_layers(model: PreTrainedModel) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """The layers that the model's body runs one after another, none where they are not to be had one by one, and norms beside them."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for parent in model.get_decoder().modules():
        for part in parent.children():
            if isinstance(part, torch.nn.ModuleList) and len(part) == count:
                norms = [child for child in parent.children() if "Norm" in type(child).__name__]
                return ([], []) if any("forward" in vars(layer) for layer in (*part, *norms)) else (list(part), norms)
    return [], []


def allocate(model: PreTrainedModel, slot: Slot) -> None:
    """Give the slot's layers their keys and values before prompts are read, by a token whose place the prompts overwrite."""
    if all(layer.is_initialized for layer in slot.layers):
        return
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    for layer in slot.layers:
        layer.prefill_columns = 1
    try:
        model.get_decoder()(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids, past_key_values=slot.cache, use_cache=True
        )
    finally:
        for layer in slot.layers:
            layer.prefill_columns = None


def compiled_layer(arguments: dict[str, Any], name: str) -> Callable[..., Any]:
    """``run_layer`` under ``torch.compile``, with graphs of its own for every ``name``."""
    from torch._inductor import list_mode_options

    mode = arguments.get("mode")
    options = {**(list_mode_options(mode) if mode else {}), **arguments.get("options", {})}
    if name != ONE_ROW:
        options = {key: value for key, value in options.items() if not key.endswith("_pass")}  # passes are made for steps of one row
    options["guard_filter_fn"] = without_identity_of_partials
    rest = {key: value for key, value in arguments.items() if key not in ("mode", "options")}
    return torch.compile(own_copy(run_layer, name), dynamic=True, options=options, **rest)


def own_copy(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function with a code object of its own: torch.compile keeps its graphs, and counts them against its limit, by code object."""
    code = function.__code__.replace(co_name=name)  # type: ignore[attr-defined]
    return types.FunctionType(code, function.__globals__, name)  # type: ignore[attr-defined]


def without_identity_of_partials(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: all, but not the one for the very partial by which a joined layer answers. What it holds is guarded apart."""
    return [
        not (isinstance(guard.value, partial) and guard.guard_type in ("CLOSURE_MATCH", "ID_MATCH", "FUNCTION_MATCH")) for guard in guards
    ]
