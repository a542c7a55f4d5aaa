"""GQA: fewer key and value heads, each shared by a group of query heads (Ainslie et al. 2023, arXiv:2305.13245).

The KV cache and the two projections shrink by the ratio, which is what long contexts and large batches wait for. The paper takes the mean
of each group's heads and trains on. Here heads are aligned first: a key head is only defined up to maps that commute with the rotary
embedding, a value head up to any invertible one, so similar heads are grouped and each group gets the shared head that loses least under
what reads it (``_head_alignment``). Where the heads of a group are equal up to such maps nothing changes at all.

Price: quality, a lot of it at a ratio of 4 without training afterwards. Not for a model that you cannot train on, unless its heads are
nearly alike (the residuals in the proof say so), and not where the KV cache is small beside the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from optkit import Options, Technique, UsageError, hookimpl
from optkit_plugins import _attention_heads as modules
from optkit_plugins import _head_alignment as alignment

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from optkit import TrialContext


#: What a distance of keys counts beside one of values in choosing groups. Keys of any two heads share their large common part, so
#: their relative distances are small and say little about the output.
KEY_SHARE = 0.1


class GqaOptions(Options):
    ratio: int = Field(4, ge=2, description="key and value heads that become one (query heads a KV head when every query had its own)")
    align: bool = Field(True, description="align the heads of a group before they are merged; false takes the paper's plain mean")
    regroup: bool = Field(True, description="choose similar heads as groups; false groups neighbours (always without align)")
    calibration_tokens: int = Field(4096, ge=0, description="tokens of calibration text that weigh the inputs; 0 weighs all alike")


technique = Technique(
    name="gqa",
    stage="architecture",
    summary="share key and value heads among query heads: a smaller KV cache, costs quality until it is trained again",
    adds=frozenset({"architecture-changed", "weights-changed"}),
    forbids=frozenset({"weights-quantized"}),
    calibrates=True,
    lossy=True,
    options=GqaOptions,
    paper="https://arxiv.org/abs/2305.13245",
    tested_on=("cpu", "NVIDIA H200"),
    exceptions={"gpt2": "its config has no number of key heads, so a converted model could not be loaded again"},
)


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    options = trial.options
    assert isinstance(options, GqaOptions)
    found = modules.attentions(model)
    config = model.config.get_text_config(decoder=True)
    before = config.num_key_value_heads
    check_ratio(before, options.ratio)
    # Everything that may refuse comes before the first change: a half-converted model helps nobody.
    width = modules.rotary_dim(model) if options.align else 0
    blocks = [modules.key_blocks(attention, width) if options.align else [] for attention in found]
    metrics, tokens = input_metrics(model, found, trial) if options.align else ([None for _ in found], 0)
    residuals = [convert(*each, options) for each in zip(found, blocks, metrics, strict=True)]
    config.num_key_value_heads = before // options.ratio
    trial.notes["conversion"] = {
        "kv_heads_before": before,
        "kv_heads": config.num_key_value_heads,
        "calibration_tokens": tokens,
        "residual_keys": [round(keys, 6) for keys, _ in residuals],
        "residual_values": [round(values, 6) for _, values in residuals],
    }


def check_ratio(kv_heads: int, ratio: int) -> None:
    if kv_heads % ratio:
        possible = [str(divisor) for divisor in range(2, kv_heads + 1) if kv_heads % divisor == 0]
        way_out = f"set gqa.ratio to {' or '.join(possible)}" if possible else "there is nothing left to share: leave gqa out"
        raise UsageError(f"gqa: {kv_heads} key heads cannot be shared by {ratio}; {way_out}")


def convert(
    attention: modules.Attention, keys: list[alignment.Block], metric: torch.Tensor | None, options: GqaOptions
) -> tuple[float, float]:
    """Merge the key and value heads of one module.

    :param metric: lower triangle ``L`` with ``L Lᵀ`` the second moment of the module's inputs (and 1, for the bias).
    :return: relative residuals of keys and values.
    """
    import torch

    query, key, value, output = modules.read(attention)
    if not options.align:
        residuals = _spread(key, options.ratio), _spread(value, options.ratio)
        key, value = (heads.unflatten(0, (-1, options.ratio)).mean(1) for heads in (key, value))
        modules.write(attention, query, key, value, output)
        return residuals
    # Weighed columns: lengths in these coordinates are root mean squares over the inputs.
    weighed = [heads if metric is None else heads @ metric for heads in (query, key, value)]
    scales = weighed[1].square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-30)
    if attention.norms:
        weighed[1] = weighed[1] / scales  # a head norm undoes the head's scale, so heads are compared at one scale
    values = modules.value_blocks(attention)
    heads = attention.kv_heads
    key_weights = [alignment.reader_weights(block, weighed[0], heads) for block in keys]
    value_weights = [alignment.reader_weights(block, output, heads) for block in values]
    groups = choose_groups(weighed, keys, values, key_weights, value_weights, options)
    key, query, lost_keys = alignment.merge(weighed[1], query, keys, key_weights, groups)
    value, output, lost_values = alignment.merge(weighed[2], output, values, value_weights, groups)
    if attention.norms:
        key = key * torch.stack([scales[members].mean(0) for members in groups])  # the norm's epsilon sees the usual size
    if metric is not None:
        key, value = (torch.linalg.solve_triangular(metric, heads, upper=False, left=False) for heads in (key, value))
    modules.write(attention, query, key, value, output)
    return lost_keys, lost_values


def choose_groups(
    weighed: list[torch.Tensor],
    keys: list[alignment.Block],
    values: list[alignment.Block],
    key_weights: list[torch.Tensor],
    value_weights: list[torch.Tensor],
    options: GqaOptions,
) -> list[list[int]]:
    """Which heads become one: close in their values first, then in their keys."""
    heads = len(weighed[1])
    if not options.regroup:
        return [list(range(start, start + options.ratio)) for start in range(0, heads, options.ratio)]
    near = [
        alignment.distances([alignment.captured(block.gather(part), weight) for block, weight in zip(blocks, weights, strict=True)])
        for part, blocks, weights in ((weighed[1], keys, key_weights), (weighed[2], values, value_weights))
    ]
    return alignment.group(KEY_SHARE * near[0] + near[1], options.ratio)


def input_metrics(model: PreTrainedModel, found: list[modules.Attention], trial: TrialContext) -> tuple[list[torch.Tensor | None], int]:
    """For each module the Cholesky factor of its inputs' second moment on calibration text, and the tokens that were used."""
    import torch

    texts, tokens = [], 0
    for text in trial.calibration:
        text = text[: trial.options.calibration_tokens - tokens]  # type: ignore[attr-defined]
        texts += [text] if text else []
        tokens += len(text)
    if not tokens:
        return [None for _ in found], 0
    moments: dict[str, torch.Tensor] = {}
    hooks = [attention.inputs[0].register_forward_pre_hook(_adder(moments, attention.name)) for attention in found]
    try:
        with torch.inference_mode():
            for text in texts:
                model(input_ids=torch.tensor([text], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [_factor(moments[attention.name] / tokens) for attention in found], tokens


def _adder(moments: dict[str, torch.Tensor], name: str) -> Any:
    def add(_: Any, arguments: tuple[Any, ...]) -> None:
        import torch

        inputs = arguments[0].flatten(0, -2)
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1).double()
        moments[name] = moments.get(name, 0) + inputs.T @ inputs

    return add


def _factor(moment: torch.Tensor) -> torch.Tensor:
    """The Cholesky factor, with a hundredth of the mean variance added: directions that the text never took still count a little."""
    import torch

    moment = moment.clone()
    moment.diagonal().add_(0.01 * moment.diagonal().mean())
    return torch.linalg.cholesky(moment)


def _spread(heads: torch.Tensor, ratio: int) -> float:
    """Relative distance of the heads from the plain mean of their group."""
    groups = heads.unflatten(0, (-1, ratio))
    return float((groups - groups.mean(1, keepdim=True)).norm() / groups.norm().clamp_min(1e-30))


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    query = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or query
    facts = {"query_heads": query, "kv_heads": heads, "kv_bytes_a_token": kv_bytes(model), **trial.notes.get("conversion", {})}
    if "kv_heads_before" not in facts:
        return facts | {"summary": f"{heads} KV heads for {query} query heads"}
    facts["kv_bytes_a_token_before"] = facts["kv_bytes_a_token"] * facts["kv_heads_before"] // heads
    lost = [sum(facts[name]) / len(facts[name]) for name in ("residual_keys", "residual_values")]
    facts["summary"] = (
        f"{facts['kv_heads_before']} → {heads} KV heads, {facts['kv_bytes_a_token_before']:,} → {facts['kv_bytes_a_token']:,} bytes "
        f"a token, residual {lost[0]:.2f} of keys, {lost[1]:.2f} of values"
    )
    return facts


def kv_bytes(model: PreTrainedModel) -> int:
    """Bytes that a token takes in a cache of the model's dtype."""
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
