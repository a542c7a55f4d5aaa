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

from optkit_plugins.kernels.decode_attention import power_of_two, runs_on

#: Columns that a program reads at once.
BLOCK = 2048
#: Weights below this many bytes stay with the library: their product is over before it matters.
FEWEST_BYTES = 1 << 20


@torch.library.custom_op("optkit::matvec", mutates_args=())
def matvec(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` (1, columns) times the transpose of ``weight`` (rows, columns) plus ``bias`` (rows,): (1, rows), summed in float32."""
    if not runs_on(x.device):
        return torch.nn.functional.linear(x, weight, bias)
    return launch(x, weight, bias)


@matvec.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(1, weight.shape[0])


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The kernel's launch; under Triton's interpreter on a CPU too."""
    from optkit_plugins.kernels import matvec_triton as kernel

    rows, columns = weight.shape
    out = x.new_empty(1, rows)
    block = min(BLOCK, power_of_two(columns))
    kernel.matvec[(rows,)](
        x.contiguous(), weight, out if bias is None else bias, out, weight.stride(0), COLUMNS=columns, BLOCK=block, BIAS=bias is not None,
        num_warps=8,
    )  # fmt: skip
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


def with_products(arguments: dict[str, Any], products: str) -> dict[str, Any]:
    """Arguments of ``torch.compile`` under which ``products`` multiplies single rows: ``library``, ``matvec``, or ``inductor``, which
    writes and tunes a reduction for each."""
    from torch._inductor import list_mode_options

    if arguments.get("backend") != "inductor" or products == "library":
        return arguments
    chosen = {"coordinate_descent_tuning": True} if products == "inductor" else {"post_grad_custom_pre_pass": MatvecPass()}
    mode = arguments.get("mode")
    rest = {name: value for name, value in arguments.items() if name != "mode"}
    return {**rest, "options": {**(list_mode_options(mode) if mode else {}), **chosen}}
