"""kv-cache: which KV cache generation uses: static, quantized, sliding or offloaded.

``static`` allocates the whole length once and changes no token: what a compiled step needs, and no gain without one. ``quantized``
(8, 4 or 2 bits, older tokens only) and ``sliding`` (the last tokens only) make long contexts fit and change the text; quantizing costs
time every step. ``offloaded`` keeps all layers but one in host memory. For short texts the default cache is best: leave it alone.

KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (Liu et al. 2024); Mistral 7B (Jiang et al. 2023) for the window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optkit import Claims, Engine, Limit, Machine, Options, Setting, Technique, TrialContext, UnavailableError, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit.technique import Task

REASONS = {
    "static": "a cache of fixed shape and address",
    "quantized": "older keys and values take a part of the bytes",
    "sliding": "memory does not grow with the text",
    "offloaded": "keys and values wait in host memory",
}
#: Tokens of the prompt that the proof generates from: enough that older ones are quantized or dropped.
PROOF_TOKENS = 96


class KvCacheOptions(Options):
    kind: Literal["static", "quantized", "sliding", "offloaded"] = Field("static", description="the cache; static changes no token")
    bits: Literal[2, 4, 8] = Field(4, description="bits of a quantized cache")
    window: int = Field(1024, ge=1, description="tokens that a sliding cache keeps")


technique = Technique(
    name="kv-cache",
    stage="generation",
    summary="static, quantized, sliding or offloaded KV cache; quantized and sliding change the text",
    tasks=frozenset({"generate"}),
    lossy=True,
    options=KvCacheOptions,
    paper="https://arxiv.org/abs/2402.02750",
    tested_on=("cpu", "NVIDIA H200"),
)


@hookimpl
def configure(options: KvCacheOptions, task: Task, machine: Machine) -> Claims:
    values: dict[str, Any] = {"generate.cache": options.kind}
    if options.kind == "quantized":
        values["generate.cache_bits"] = options.bits
    if options.kind == "sliding":
        values["generate.cache_window"] = options.window
    problem = None
    if options.kind == "offloaded" and machine.device == "cpu":
        problem = "an offloaded cache moves keys and values from a GPU to host memory, and this run computes on the CPU; leave out kv-cache"
    return Claims(
        settings=tuple(Setting(name=name, value=value, because=REASONS[options.kind], strength="must") for name, value in values.items()),
        limits=(Limit(name="generate.prompt_lookup_tokens", allowed=(None,), because=f"a {options.kind} cache cannot take tokens back"),),
        # on CUDA ``generate`` compiles the step over a static cache, and a hook in the forward pass breaks its graph
        refuses=frozenset(
            {"draft-tokens", "python-in-forward"} if options.kind == "static" and machine.device == "cuda" else {"draft-tokens"}
        ),
        lossy=options.kind in ("quantized", "sliding"),
        problem=problem,
    )


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    """Refuse what the cache cannot hold, before anything is timed."""
    options = trial.options
    assert isinstance(options, KvCacheOptions)
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if getattr(config, "sliding_window", None) else []))
    if options.kind == "quantized" and kinds - {"full_attention"}:
        raise UnavailableError(
            f"a quantized cache holds layers of full attention only, and {type(model).__name__} has {', '.join(sorted(kinds))}; "
            "set kv-cache.kind=static or leave out kv-cache"
        )


@hookimpl
def wrap_engine(engine: Engine, trial: TrialContext) -> Engine | None:
    """A quantized cache is an object of each call: transformers' own needs another library."""
    from optkit import TransformersEngine

    if trial.settings["generate.cache"] != "quantized":
        return None
    if type(engine) is not TransformersEngine:
        raise UnavailableError(f"a quantized cache needs the default engine, and this plan has '{engine.name}'; leave out one of them")

    from optkit_plugins.kernels.memory.quantized_engine import QuantizedCacheEngine

    return QuantizedCacheEngine(engine.model, engine.trial)


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    """Which classes held the keys and values of a short text, and their bytes."""
    if trial.engine is None or model is None:
        return {}
    cache = used_cache(model, trial.engine)
    if cache is None:
        return {"cache": None, "summary": "the engine passes no cache to the model"}
    layers = sorted({type(layer).__name__ for layer in cache.layers})
    tensors = [tensor for layer in cache.layers for tensor in stored(layer)]
    count = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    facts = {"cache": type(cache).__name__, "layers": layers, "bytes": count, "offloading": bool(getattr(cache, "offloading", False))}
    windows = sorted({layer.sliding_window for layer in cache.layers if getattr(layer, "sliding_window", None)})
    if windows:
        facts["windows"] = windows
    return facts | {"summary": f"{', '.join(layers)}; {count / 1e3:.0f} kB for a text of {prompt_tokens(model)} tokens"}


def stored(layer: Any) -> list[Any]:
    """The tensors in which a cache layer keeps keys and values."""
    if hasattr(layer, "tensors"):
        return list(layer.tensors())
    return [tensor for name in ("keys", "values") if (tensor := getattr(layer, name, None)) is not None]


def prompt_tokens(model: PreTrainedModel) -> int:
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or PROOF_TOKENS
    return max(1, min(PROOF_TOKENS, longest // 2))


def used_cache(model: PreTrainedModel, engine: Engine) -> Any:
    """The cache that ``engine`` gives to the model while it generates one token."""
    seen: list[Any] = []

    def look(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        seen.append(keywords.get("past_key_values"))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        engine.generate([[3] * prompt_tokens(model)], new_tokens=1, exact=True)
    finally:
        handle.remove()
    return seen[-1] if seen else None
