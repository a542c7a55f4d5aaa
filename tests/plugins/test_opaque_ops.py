"""Operators that inductor knows before it meets them."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import fresh_cache
from torch._library.custom_ops import OPDEFS

from optkit_plugins.kernels.attention import decode_step  # noqa: F401 (these modules define the operators)
from optkit_plugins.kernels.decode.opaque_ops import make_known
from optkit_plugins.kernels.fused import matvec  # noqa: F401
from optkit_plugins.kernels.packed import linear  # noqa: F401
from optkit_plugins.kernels.parallel import exchange  # noqa: F401

# torch's own compiler still imports modules that use it
pytestmark = pytest.mark.filterwarnings("ignore:.*torch\\.jit\\.:DeprecationWarning")
LAYERS = 24


def test_every_operator_of_ours_has_a_lowering() -> None:
    from torch._inductor.lowering import lowerings

    make_known()
    ours = [definition._opoverload for name, definition in OPDEFS.items() if name.startswith("optkit::")]
    assert len(ours) >= 9 and all(operator in lowerings for operator in ours)
    assert torch.ops.optkit.fused_matvec.default in ours


def test_an_operator_behind_many_residuals_compiles() -> None:
    """Writing out all that its argument was computed from would take 2^24 lines."""
    weights = [torch.randn(16, 16, dtype=torch.bfloat16) / 4 for _ in range(LAYERS + 1)]

    def network(x: torch.Tensor) -> torch.Tensor:
        for weight in weights[:-1]:
            x = x + torch.ops.optkit.matvec(x, weight, None)
        return torch.ops.optkit.fused_matvec(x, weights[-1], None)

    x = torch.randn(1, 16, dtype=torch.bfloat16)
    expected = network(x)
    make_known()
    with fresh_cache(), torch.inference_mode():
        assert torch.equal(torch.compile(network, fullgraph=True)(x), expected)
