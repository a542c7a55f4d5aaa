"""Memory before a run, from the configuration and the sizes of files: no torch, no loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optkit.plan import Plan
from optkit.sources import ModelSource, check_config

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
#: Sizes of a configuration that an estimate needs, and others that it reads where they are stated.
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
COUNTS = ("num_key_value_heads", "head_dim", "intermediate_size", "ffn_dim", "n_inner", "num_local_experts")
#: What CUDA's context and libraries take beside the model.
CUDA_CONTEXT_BYTES = 600_000_000


def estimate(source: ModelSource, plan: Plan, device: str) -> dict[str, int] | None:
    """Bytes of weights, KV cache and activations, and their sum; ``None`` where the model is not here to be read.

    The KV cache is 2·layers·KV heads·head width·bytes·batch·tokens, with the longest context that the settings allow. With several devices
    they are one device's: its rows of a batch, or its share of the weights and of the cache.
    """
    config = read_config(source)
    if config is None:
        return None
    parameters = count_parameters(config)
    width = DTYPE_BYTES.get(str(plan.settings["load.dtype"] or config.get("dtype") or config.get("torch_dtype") or "float32"), 4)
    weights = parameters * width
    bits = min((step.claims.weight_bits for step in plan.steps if step.claims.weight_bits), default=None)
    table = config["vocab_size"] * config["hidden_size"] * (1 if config.get("tie_word_embeddings", False) else 2)
    if bits is not None:
        weights = int((parameters - table) * bits / 8) + table * width
    batch, parts = int(plan.settings["batch.size"]), 1
    if plan.devices is not None and plan.devices.share == "rows":
        batch = -(-batch // plan.devices.count)
    elif plan.devices is not None:
        parts = plan.devices.count
        whole = table * width if plan.devices.share == "slices" else 0  # every device keeps embedding and head
        weights = (weights - whole) // parts + whole
    tokens = (
        min(int(plan.settings["batch.max_length"] or 2048), 2048)
        if plan.task == "score"
        else 512 + int(plan.settings["generate.max_new_tokens"])
    )
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    cache = 2 * config["num_hidden_layers"] * heads * head_width * width * batch * tokens // parts if plan.task == "generate" else 0
    logits = batch * config["vocab_size"] * (4 if plan.task == "generate" else tokens * (width + 4))
    activations = logits + batch * tokens * config["hidden_size"] * width * 4
    total = weights + cache + activations + (CUDA_CONTEXT_BYTES if device == "cuda" else 0)
    return {"weights": weights, "kv_cache": cache, "activations": activations, "total": total}


def estimate_bytes(source: ModelSource, plan: Plan) -> int | None:
    found = estimate(source, plan, "cpu")
    return found["total"] if found else None


def read_config(source: ModelSource) -> dict[str, Any] | None:
    """The configuration with the field names that most architectures share (GPT-2 has its own)."""
    path = Path(source.location) / "config.json" if source.kind == "folder" else Path(source.location)
    if source.kind == "hub" or not path.is_file():
        return None
    config = check_config(path)
    inner = config.get("text_config")
    config = {**config, **(inner if isinstance(inner, dict) else {})}
    for name, other in (("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head")):
        if name not in config and other in config:
            config[name] = config[other]
    if any(not _is_count(config.get(name)) for name in NEEDED) or any(config.get(name) and not _is_count(config[name]) for name in COUNTS):
        return None
    if source.shrink:
        config["num_hidden_layers"] = min(2, config["num_hidden_layers"])
    return config


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**40


def count_parameters(config: dict[str, Any]) -> int:
    """Parameters of a decoder from its configuration: attention with grouped heads, a gated or plain MLP, embeddings and head."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * width
    attention = 2 * hidden * heads * width + 2 * hidden * kv
    inner = config.get("intermediate_size") or config.get("ffn_dim") or config.get("n_inner") or 4 * hidden
    gated = config.get("model_type") not in ("gpt2", "gpt_neox", "opt", "gptj", "bloom", "phi", "falcon")
    mlp = (3 if gated else 2) * hidden * inner * max(1, config.get("num_local_experts") or 1)
    tied = config.get("tie_word_embeddings", config.get("model_type") in ("gpt2", "opt", "gemma", "gemma2"))
    return layers * (attention + mlp + 2 * hidden) + config["vocab_size"] * hidden * (1 if tied else 2) + hidden
