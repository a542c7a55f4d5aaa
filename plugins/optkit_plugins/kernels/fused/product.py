"""What a product of one row can do beside multiplying, and which products can.

A decode step's layer is four products and, between them, a dozen kernels that touch a few kilobytes each and cost microseconds that have
nothing to do with their bytes. Every program of a product reads the whole input anyway, so it can normalize it, and it holds its outputs
in float32, so it can act on them. A product that takes these arguments is registered here, with the plain op that it stands for; the
compiler pass (``fused.graph``) then looks for norms, gates and residuals round the plain op, whoever's it is.

The arguments that a fused op takes after all of the plain op's own (the first of which is the input), in this order:

===============  ==============================================================================================================
``norm_weight``  (columns,) or ``None``: the input is RMS-normalized first, ``x / sqrt(mean(x²) + eps) · norm_weight``
``eps``          of the norm
``residual``     of the output's shape, or ``None``: added at the end
``gated``        the weight's rows are those of a gate, then those of an up projection: ``silu(gate) · up``, half as many outputs
===============  ==============================================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Fused:
    """:ivar op: the overload that takes the arguments. :ivar takes: whether it is made for a plain op's node in a graph."""

    op: Any
    takes: Callable[[torch.fx.Node], bool]


#: Overload of a plain product, such as ``torch.ops.optkit.matvec.default`` -> what it can be replaced by.
FUSED: dict[Any, Fused] = {}


#: How often ops of this kind were called, and what they did beside their own work: shows whether a step is fused, also where its
#: compiled graph comes from a cache on disk and went through no pass.
CALLS: Counter[str] = Counter()


def count(norm_weight: torch.Tensor | None = None, residual: torch.Tensor | None = None, gated: bool = False) -> None:
    """Note one call of a product of one row."""
    named = {"products": True, "norms": norm_weight is not None, "residuals": residual is not None, "gates": gated}
    CALLS.update(name for name, there in named.items() if there)


def register(plain: Any, op: Any, takes: Callable[[torch.fx.Node], bool]) -> None:
    """Say that ``op`` is ``plain`` with the further arguments."""
    FUSED[plain] = Fused(op, takes)


def plain_fused(
    product: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """The same round any ``product``, in plain torch and the input's dtype; norm and gate in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if norm_weight is not None:
        x = (x.to(wide) * (x.to(wide).square().mean(-1, keepdim=True) + eps).rsqrt() * norm_weight.to(wide)).to(x.dtype)
    y = product(x)
    if gated:
        gate, up = y.to(wide).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    return y if residual is None else y + residual
