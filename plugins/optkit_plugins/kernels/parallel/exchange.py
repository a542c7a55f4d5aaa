"""What the processes of a sliced model tell each other: sums of partial products, and the parts of a vector that each has computed.

In a decode step these are a few kilobytes, twice a layer, and cost latency alone. NCCL takes about ten microseconds for one; where GPUs
can write to each other's memory a single kernel does it in one crossing (``exchange_triton``). Both can be recorded in a CUDA graph.
Larger tensors, other devices, and GPUs without such memory take torch's process group.
"""

from __future__ import annotations

import torch
from torch import distributed as dist

from optkit_plugins.kernels.fused.product import plain_fused, register

#: Words of 32 bits that an inbox takes of each process: 256 KB. More is a matter of bandwidth, where doubling every byte would cost.
CAPACITY = 1 << 16
#: Words of a program: one warp polls for them.
BLOCK = 256
PACKED = (torch.bfloat16, torch.float16, torch.float32)


class Inboxes:
    """Memory that the other GPUs write to, (2, processes, ``CAPACITY``) words of 64 bits on each.

    :param inbox: this process's own, zeroed. :param addresses: where every process's inbox lies for this one.
    """

    def __init__(self, inbox: torch.Tensor, addresses: list[int], rank: int):
        self.inbox, self.rank, self.world = inbox, rank, len(addresses)
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=inbox.device)
        self.epochs = torch.zeros(CAPACITY // BLOCK, dtype=torch.int32, device=inbox.device)

    def takes(self, x: torch.Tensor) -> bool:
        size = x.numel() * x.element_size()
        return x.dtype in PACKED and size % 4 == 0 and 0 < size <= 4 * CAPACITY and x.data_ptr() % 4 == 0

    def exchange(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None, *, add: bool) -> torch.Tensor:
        """``out`` of the shape of ``x``: the sum over all processes and of the ``residual`` that all hold; or (processes, *shape): each
        one's, without ``add``."""
        import triton.language as tl

        from optkit_plugins.kernels.parallel.exchange_triton import exchange

        mine = x.contiguous().view(-1).view(torch.int32)
        held = mine if residual is None else residual.contiguous().view(-1).view(torch.int32)
        kinds = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
        exchange[(-(-len(mine) // BLOCK),)](
            mine, held, out.view(-1).view(torch.int32), self.inbox, self.addresses, self.epochs, len(mine),
            RANK=self.rank, WORLD=self.world, CAPACITY=CAPACITY, BLOCK=BLOCK, DTYPE=kinds[x.dtype], SUM=add,
            RESIDUAL=residual is not None, num_warps=1,
        )  # fmt: skip
        return out


class Exchange:
    """The group that this process has joined. :ivar problem: why no GPU writes to another's memory, or ""."""

    def __init__(self, device: torch.device, *, direct: bool = True):
        """:param direct: let GPUs write to each other's memory where they can. All processes make this call at the same time."""
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.inboxes: Inboxes | None = None
        self.problem = "" if direct else "not asked for"
        if device.type == "cuda" and direct:
            self.inboxes, self.problem = connect(device)

    @property
    def form(self) -> str:
        return "one kernel that writes to the other GPUs" if self.inboxes else str(dist.get_backend())

    def sum(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Over all processes, rounded alike in each, and the ``residual`` that all of them hold."""
        if self.inboxes is not None and self.inboxes.takes(x) and (residual is None or self.inboxes.takes(residual)):
            return self.inboxes.exchange(x, torch.empty(x.shape, dtype=x.dtype, device=x.device), residual, add=True)
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out if residual is None else out + residual

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(processes, *shape of ``x``), of which there is at least one dimension."""
        out = x.new_empty(self.world, *x.shape)
        if self.inboxes is not None and self.inboxes.takes(x):
            return self.inboxes.exchange(x, out, add=False)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the second is the first's name before torch 2.12
        gather(out.flatten(0, 1), x.contiguous())
        return out


def connect(device: torch.device) -> tuple[Inboxes | None, str]:
    """The inboxes of all processes of the group, or why there are none; the same answer in all of them."""
    from torch.distributed import _symmetric_memory as symmetric

    found, problem = None, ""
    try:
        inbox = symmetric.empty(2, dist.get_world_size(), CAPACITY, dtype=torch.int64, device=device)
        inbox.zero_()
        addresses = [int(address) for address in symmetric.rendezvous(inbox, dist.group.WORLD).buffer_ptrs]  # type: ignore[arg-type]
        found = Inboxes(inbox, addresses, dist.get_rank())
    except (RuntimeError, ImportError) as error:  # no NVLink or PCIe peers, or a container that hides the others' handles
        problem = str(error).splitlines()[0][:200]
    agreed = torch.tensor([int(found is not None)], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)  # behind every process's zeroes, too
    if bool(agreed.item()):
        return found, ""
    return None, problem or "another process cannot"


#: The group of this process; torch's default group is one a process, too.
_joined: Exchange | None = None


def join(exchange: Exchange | None) -> None:
    global _joined
    _joined = exchange


def joined() -> Exchange:
    assert _joined is not None, "this process has joined no group"
    return _joined


# Opaque for the compiler, which has no say in how they run; their order is given, for each needs what the one before gave.


@torch.library.custom_op("optkit::sum_parts", mutates_args=())
def sum_parts(x: torch.Tensor) -> torch.Tensor:
    """The sum of ``x`` over all processes, rounded alike in each."""
    return joined().sum(x)


@sum_parts.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("optkit::sum_parts_fused", mutates_args=())
def sum_parts_fused(
    x: torch.Tensor, norm_weight: torch.Tensor | None = None, eps: float = 0.0, residual: torch.Tensor | None = None, gated: bool = False
) -> torch.Tensor:
    """``sum_parts`` with what ``fused.product`` names; in a model that is the residual."""
    if norm_weight is None and not gated:
        return joined().sum(x, residual)
    return plain_fused(joined().sum, x, norm_weight, eps, residual, gated)


@sum_parts_fused.register_fake
def _(
    x: torch.Tensor, norm_weight: torch.Tensor | None = None, eps: float = 0.0, residual: torch.Tensor | None = None, gated: bool = False
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1])


register(torch.ops.optkit.sum_parts.default, torch.ops.optkit.sum_parts_fused.default, takes=lambda node: True)


@torch.library.custom_op("optkit::gather_parts", mutates_args=())
def gather_parts(x: torch.Tensor, world: int) -> torch.Tensor:
    """(..., world × n): what ``world`` processes hold of a vector, ``x`` (..., n), one after another."""
    return joined().gather(x).movedim(0, -2).reshape(*x.shape[:-1], world * x.shape[-1]).contiguous()


@gather_parts.register_fake
def _(x: torch.Tensor, world: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], world * x.shape[-1])
