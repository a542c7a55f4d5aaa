"""Products of one activation with a 16-bit weight matrix: ``matvec``, and the compiler pass that puts it into decode steps of one row.

Such a product reads its weight once and computes next to nothing, so its time is bytes over bandwidth, and what is lost is the time until
enough reads are under way. cuBLAS loses a quarter of it on the small layers of an 8B model; one program a row of the weight, each with its
whole row under way at once, loses less. Only in compiled steps: outside of a CUDA graph the launch costs more than is gained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import statically_known_true

from optkit_plugins.kernels.attention.decode import power_of_two, runs_on
from optkit_plugins.kernels.device import starts_early
from optkit_plugins.kernels.fused.product import count, plain_fused, register

#: Columns that a program reads at once: the wide block where it divides them.
BLOCK, WIDE = 2048, 4096
#: Weights below this many bytes stay with the library: their product is over before it matters.
FEWEST_BYTES = 1 << 20


@torch.library.custom_op("optkit::matvec", mutates_args=())
def matvec(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` (1, columns) times the transpose of ``weight`` (rows, columns) plus ``bias`` (rows,): (1, rows), summed in float32."""
    count()
    if not runs_on(x.device):
        return torch.nn.functional.linear(x, weight, bias)
    return launch(x, weight, bias)


@matvec.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(1, weight.shape[0])


@torch.library.custom_op("optkit::fused_matvec", mutates_args=())
def fused_matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """``matvec`` with what ``fused.product`` names: (1, rows), half as many where ``gated``."""
    count(norm_weight, residual, gated)
    if not runs_on(x.device):
        return plain_fused(lambda x: torch.nn.functional.linear(x, weight, bias), x, norm_weight, eps, residual, gated)
    return launch(x, weight, bias, norm_weight, eps, residual, gated)


@fused_matvec.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    return x.new_empty(1, weight.shape[0] // 2 if gated else weight.shape[0])


register(torch.ops.optkit.matvec.default, torch.ops.optkit.fused_matvec.default, takes=lambda node: True)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    *,
    block: int | None = None,
    lines: int | None = None,
    warps: int | None = None,
    early: bool | None = None,
) -> torch.Tensor:
    """The kernel's launch; under Triton's interpreter on a CPU too.

    :param block: columns that a program reads at once. :param lines: outputs of a program. :param early: see the kernel; where the device
        can, by default. The defaults are the fastest of those measured on an H200 at the shapes of an 8B model.
    """
    from optkit_plugins.kernels.fused import matvec_triton as kernel

    rows, columns = weight.shape
    outputs = rows // 2 if gated else rows
    out = x.new_empty(1, outputs)
    early = starts_early(x.device) if early is None else early
    block = block or (WIDE if columns % WIDE == 0 else BLOCK)
    lines = lines or (2 if norm_weight is not None and not gated and outputs % 2 == 0 else 1)
    kernel.product[(outputs // lines,)](
        x.contiguous(),
        weight,
        out if norm_weight is None else norm_weight,
        out if bias is None else bias,
        out if residual is None else residual.contiguous(),
        out,
        weight.stride(0),
        outputs,
        eps,
        COLUMNS=columns,
        BLOCK=min(block, power_of_two(columns)),
        LINES=2 * lines if gated else lines,
        NORM=norm_weight is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        GATED=gated,
        EARLY=early,
        num_warps=warps or block // 512,
        **({"launch_pdl": True} if early else {}),
    )
    return out


class MatvecPass(CustomGraphPass):
    """Inductor's pass that gives products of one row to ``matvec``. :ivar replaced: how many, over all graphs compiled so far."""

    def __init__(self) -> None:
        self.replaced = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        aten = torch.ops.aten
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default):
                continue
            bias, x, turned = (None, *node.args) if node.target is aten.mm.default else node.args
            weight = original(turned)
            if node.kwargs or weight is None or not suits(x, weight, bias):
                continue
            with graph.inserting_before(node):
                replacement = graph.call_function(torch.ops.optkit.matvec.default, (x, weight, bias))
            replacement.meta.update(node.meta)
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            self.replaced += 1

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def original(turned: Any) -> Any:
    """The node whose transpose this is, or ``None``."""
    aten = torch.ops.aten
    if turned.op == "call_function" and (
        (turned.target is aten.permute.default and list(turned.args[1]) == [1, 0]) or turned.target is aten.t.default
    ):
        return turned.args[0]
    return None


def suits(x: Any, weight: Any, bias: Any) -> bool:
    """Whether ``matvec`` is made for tensors like these."""
    one, matrix = x.meta["val"], weight.meta["val"]
    return (
        statically_known_true(one.shape[0] == 1)
        and one.dtype == matrix.dtype
        and one.dtype in (torch.bfloat16, torch.float16)
        and matrix.stride(1) == 1
        and matrix.stride(0) % 8 == 0
        and matrix.numel() * 2 >= FEWEST_BYTES
        and (bias is None or (tuple(bias.meta["val"].shape) == (matrix.shape[0],) and bias.meta["val"].stride(0) == 1))
    )
