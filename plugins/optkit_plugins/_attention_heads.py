"""The heads of an attention module of transformers: which module can be converted, what its rotary embedding does, reading, writing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optkit import UsageError
from optkit_plugins._head_alignment import Block

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

#: Children that an attention module may have; anything else may hold something a head that would be left behind.
INPUTS = ("q_proj", "k_proj", "v_proj")
FUSED = ("qkv_proj",)
OUTPUTS = ("o_proj", "dense")
NORMS = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")
HARMLESS = ("Dropout", "Identity")


@dataclass
class Attention:
    """One attention module with plain, separate (or row-wise fused) projections.

    :ivar inputs: q, k, v; or one module whose rows are q, then k, then v.
    :ivar norms: head norms of queries and keys, or empty.
    """

    name: str
    module: Any
    inputs: list[Any]
    output: Any
    norms: list[Any]
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def sizes(self) -> list[int]:
        return [heads * self.head_dim for heads in (self.query_heads, self.kv_heads, self.kv_heads)]


def refuse(name: str, module: nn.Module, why: str) -> UsageError:
    return UsageError(f"gqa cannot convert {name} ({type(module).__name__}): {why}; leave gqa out of the plan for this model")


def attentions(model: PreTrainedModel) -> list[Attention]:
    """Every self-attention module of the decoder.

    :raises UsageError: where one cannot be converted, with the reason.
    """
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = [(name, module) for name, module in decoder.named_modules() if type(module).__name__.endswith("Attention")]
    if not found:
        raise refuse("the model", model, "it has no attention module")
    if not isinstance(getattr(config, "num_key_value_heads", None), int):
        raise refuse(
            *found[0], "its config has no num_key_value_heads: every query head has its own key head built in, so a converted model could "
            "not be saved as a folder that transformers loads"
        )  # fmt: skip
    return [_attention(name, module, config) for name, module in found]


def _attention(name: str, module: nn.Module, config: Any) -> Attention:
    from torch import nn

    children: dict[str, Any] = dict(module.named_children())
    inputs = next(([children[key] for key in keys] for keys in (INPUTS, FUSED) if all(key in children for key in keys)), None)
    output = next((children[key] for key in OUTPUTS if key in children), None)
    if inputs is None or output is None or not hasattr(module, "num_key_value_groups"):
        raise refuse(name, module, "it has no separate query, key, value and output projections with grouped heads")
    norms = [children[key] for key in NORMS if key in children]
    known = {*INPUTS, *FUSED, *OUTPUTS, *NORMS}
    strange = [key for key, child in children.items() if key not in known and type(child).__name__ not in HARMLESS]
    strange += [key for key, _ in module.named_parameters(recurse=False)]
    if strange:
        raise refuse(name, module, f"it has {', '.join(strange)}, and what that does to single heads is not known")
    if getattr(config, "clip_qkv", None):
        raise refuse(name, module, "clip_qkv clamps keys and values, which no change of their basis survives")
    if any(type(linear) is not nn.Linear for linear in (*inputs, output)):
        kinds = ", ".join(sorted({type(linear).__name__ for linear in (*inputs, output)}))
        raise refuse(name, module, f"its projections are {kinds}; it converts plain full-precision linear layers")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = Attention(name, module, inputs, output, norms, config.num_attention_heads, config.num_key_value_heads, head_dim)
    if sum(linear.out_features for linear in inputs) != sum(found.sizes) or output.in_features != found.sizes[0]:
        raise refuse(name, module, f"its projections do not have the shapes of {found.query_heads} query and {found.kv_heads} key heads")
    for norm in norms:
        weight = getattr(norm, "weight", None)
        if weight is None or weight.shape != (head_dim,) or "RMSNorm" not in type(norm).__name__:
            raise refuse(name, module, "its query and key norms are not root-mean-square norms over one head")
    return found


def read(attention: Attention) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value heads of shape (heads, head_dim, hidden + 1), the bias (or 0) as the last column, and the output's
    columns as (query heads, head_dim, hidden); float64."""
    import torch

    def rows(linear: Any) -> torch.Tensor:
        weight = linear.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double()
        return torch.cat([weight, bias[:, None]], dim=1)

    stacked = torch.cat([rows(linear) for linear in attention.inputs])
    query, key, value = (part.unflatten(0, (-1, attention.head_dim)) for part in stacked.split(attention.sizes))
    return query, key, value, attention.output.weight.detach().double().T.unflatten(0, (-1, attention.head_dim))


def write(attention: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
    """Put heads of these shapes (``read``) into the module, with as many key and value heads as there are, in the weights' dtype."""
    import torch
    from torch import nn

    attention.kv_heads = len(key)
    stacked = torch.cat([query, key, value]).flatten(0, 1)
    pieces = stacked.split(attention.sizes) if len(attention.inputs) > 1 else (stacked,)
    for linear, rows in zip(attention.inputs, pieces, strict=True):
        old = linear.weight
        linear.weight = nn.Parameter(rows[:, :-1].to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        if linear.bias is not None:
            linear.bias = nn.Parameter(rows[:, -1].to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        linear.out_features = len(rows)
    attention.output.weight.data.copy_(output.flatten(0, 1).T)
    attention.module.num_key_value_groups = attention.query_heads // attention.kv_heads
    if hasattr(attention.module, "num_key_value_heads"):
        attention.module.num_key_value_heads = attention.kv_heads


def key_blocks(attention: Attention, rotary_dim: int) -> list[Block]:
    """What each row of a key head is free to do.

    Under a head norm a pair may turn only where both norms weigh its two rows alike; elsewhere only the sign is free.

    :param rotary_dim: rows that the rotary embedding turns, 0 for none.
    """
    import torch

    device = attention.output.weight.device
    pairs = rotary_pairs(attention, rotary_dim) if rotary_dim and getattr(attention.module, "use_rope", True) else []
    turned = {row for pair in pairs for row in pair}
    rest = [row for row in range(attention.head_dim) if row not in turned]
    weights = [norm.weight.detach() for norm in attention.norms]
    even = [pair for pair in pairs if all(weight[pair[0]] == weight[pair[1]] for weight in weights)]
    uneven = [pair for pair in pairs if pair not in even]
    lone = ("sign", [(row,) for row in rest]) if weights else ("full", [tuple(rest)] if rest else [])
    chosen = [("rotation", even), ("sign", uneven), lone]
    return [Block(kind, torch.tensor(rows, device=device), unit=bool(weights)) for kind, rows in chosen if rows]


def value_blocks(attention: Attention) -> list[Block]:
    """Values are read by the output projection alone: any invertible map is free."""
    import torch

    return [Block("full", torch.arange(attention.head_dim, device=attention.output.weight.device)[None])]


def rotary_dim(model: PreTrainedModel) -> int:
    """Rows of a head that the rotary embedding turns; 0 in a model without one."""
    sizes = {2 * buffer.numel() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    if len(sizes) > 1:
        raise refuse("the model", model, f"its rotary embeddings turn different widths ({sorted(sizes)})")
    return sizes.pop() if sizes else 0


def rotary_pairs(attention: Attention, width: int) -> list[tuple[int, int]]:
    """(real, imaginary) rows that turn together, found by turning the unit vectors with the module's own function.

    transformers' models use two layouts, halves (i, i + width / 2) and neighbours (2i, 2i + 1), under one name.
    """
    import torch

    turn = getattr(sys.modules[type(attention.module).__module__], "apply_rotary_pos_emb", None)
    cosine, sine = 0.6, 0.8
    units = torch.eye(width)[None, None]
    try:
        turned = [part[0, 0] for part in turn(units, units, torch.full((1, width, width), cosine), torch.full((1, width, width), sine))]  # type: ignore[misc]
    except (TypeError, RuntimeError, ValueError) as error:
        raise _unknown_layout(attention) from error
    pairs = [(real, int(row.argmax())) for real, row in enumerate(turned[1] - cosine * torch.eye(width)) if row.max() > sine / 2]
    expected = cosine * torch.eye(width)
    for real, imaginary in pairs:
        expected[real, imaginary], expected[imaginary, real] = sine, -sine
    if len(pairs) != width // 2 or not all(torch.allclose(part, expected, atol=1e-5) for part in turned):
        raise _unknown_layout(attention)
    return pairs


def _unknown_layout(attention: Attention) -> UsageError:
    return UsageError(
        f"gqa cannot align the keys of {attention.name} ({type(attention.module).__name__}): the layout of its rotary embedding is not "
        "known; set gqa.align to false for plain mean pooling"
    )
