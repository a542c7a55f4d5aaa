"""Makes our opaque operators known to inductor before it meets one in a graph."""

from __future__ import annotations

import torch
from torch._library.custom_ops import OPDEFS
from torch._library.utils import get_layout_constraint_tag

NAMESPACE = "optkit::"


def make_known() -> None:
    """Register a lowering for each operator that is defined by now: the call of it, as inductor would do at its first sight.

    At that sight, torch up to 2.12 writes the operator's arguments out for a log that nobody asked for, each with all that it was computed
    from. In a network with residuals that doubles with every layer in front, so that an operator which only stands behind the last layer
    (the head's product) would keep the compiler busy for ever.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint

    for name, definition in list(OPDEFS.items()):
        operator: torch._ops.OpOverload = definition._opoverload
        if name.startswith(NAMESPACE) and operator not in lowerings:
            constraint = tag_to_layout_constraint(get_layout_constraint_tag(operator, with_default=True))
            make_fallback(operator, layout_constraint=constraint, warn=False)
