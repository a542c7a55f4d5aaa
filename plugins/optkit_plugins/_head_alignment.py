"""Sharing heads: the best common head of a group of attention heads, up to the maps that attention cannot see.

A key head is only defined up to a map that commutes with the rotary embedding, because its queries can be mapped the other way round;
a value head up to any invertible map, which the output projection absorbs. So heads are compared, grouped and merged *modulo* those
maps. With ``head_i ≈ map_i · shared`` the least-squares ``shared`` of a group is a truncated SVD of its stacked heads (Eckart and Young
1936), weighted by what reads the heads; rotations found by Procrustes' method followed by a mean are the special case of equal spectra.

The freedom of a key head, a *block* of its rows each:
  rotation  a pair of rows that the rotary embedding turns as one complex number: any complex factor
  sign      rows under a head norm with uneven weights: only the factor -1 commutes with it
  full      rows that no position touches (values, layers without positions, the rest of partial rotary): any square map
Everything here is float64 (or complex128) and knows nothing of modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Block:
    """Rows of every head that share one kind of freedom.

    :ivar kind: ``rotation``, ``sign`` or ``full``.
    :ivar rows: indices into a head's rows, of shape (blocks, rows of a block); pairs as (real, imaginary) for ``rotation``.
    :ivar unit: factors keep the magnitude, because a norm would undo any other.
    """

    kind: str
    rows: torch.Tensor
    unit: bool = False

    def gather(self, heads: torch.Tensor) -> torch.Tensor:
        """From (heads, rows, columns) to (blocks, heads, size, columns'), complex for ``rotation``."""
        import torch

        picked = heads[:, self.rows].transpose(0, 1)
        if self.kind == "rotation":
            return torch.complex(picked[:, :, 0], picked[:, :, 1]).unsqueeze(2)
        return picked if self.kind == "full" else picked.flatten(2).unsqueeze(2)

    def scatter(self, heads: torch.Tensor, blocks: torch.Tensor) -> None:
        """The inverse of ``gather``, into ``heads``."""
        import torch

        blocks = blocks.transpose(0, 1)
        if self.kind == "rotation":
            blocks = torch.cat([blocks.real, blocks.imag], dim=2)
        heads[:, self.rows] = blocks.reshape(len(heads), *self.rows.shape, heads.shape[-1])


def square_root(gram: torch.Tensor) -> torch.Tensor:
    """The positive square root of (batches of) a positive semidefinite matrix."""
    import torch

    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mH


def reader_weights(block: Block, readers: torch.Tensor, heads: int) -> torch.Tensor:
    """How strongly each direction of each head is read: (blocks, heads, size, size).

    :param readers: (query heads, rows, columns): the queries of a key, the output columns of a value.
    """
    read = block.gather(readers)
    gram = (read @ read.mH).unflatten(1, (heads, -1)).sum(2)
    return square_root(gram)


def share(heads: torch.Tensor, weights: torch.Tensor, unit: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared head of one group.

    :param heads: (blocks, heads of the group, size, columns), in coordinates in which all columns count alike.
    :param weights: (blocks, heads of the group, size, size).
    :return: ``shared`` (blocks, size, columns) and ``maps`` (blocks, heads, size, size) with heads ≈ maps @ shared.
    """
    import torch

    size = heads.shape[2]
    stacked = (weights @ heads).flatten(1, 2)
    # The SVD of a few hundred rows by thousands of columns, by way of the small Gram matrix. That squares the condition, but where the
    # stack has rank ``size`` any invertible mix of its rows spans the right space, so equal heads stay exact.
    directions = torch.linalg.eigh(stacked @ stacked.mH)[1][:, :, -size:]
    basis = torch.linalg.qr((directions.mH @ stacked).mH)[0].mH
    maps = heads @ basis.mH.unsqueeze(1)
    # Turned towards the first head and scaled as the heads are: a basis alone would leave rows of unit length.
    left, _, right = torch.linalg.svd(maps[:, 0])
    turn = left @ right
    maps = maps @ turn.mH.unsqueeze(1)
    if unit:
        phases = torch.where(maps == 0, torch.ones_like(maps), maps.sgn())
        return (phases.mH @ heads).mean(1), phases
    scale = maps.abs().square().mean((1, 2, 3), keepdim=True).mul(size).sqrt()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale.squeeze(1) * (turn @ basis), maps / scale


def captured(heads: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each head could keep if another one stood in its place.

    :param heads: (blocks, heads, size, columns) and their ``weights`` (blocks, heads, size, size).
    :return: (heads, heads) energy of row's head within the row space of column's head, and (heads,) energy of each.
    """
    import torch

    weighted = weights @ heads
    bases = torch.linalg.qr(heads.mH)[0]
    kept = torch.stack([(weighted[:, one, None] @ bases).abs().square().sum((0, 2, 3)) for one in range(heads.shape[1])])
    return kept, weighted.abs().square().sum((0, 2, 3))


def distances(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """(heads, heads), symmetric: the share of energy that is lost when one head stands for the other; 0 for equals.

    :param parts: ``captured`` of each block of a key.
    """
    kept = sum(part[0] for part in parts)
    energy: Any = sum(part[1] for part in parts)
    lost = 1 - kept / energy.clamp_min(1e-300).unsqueeze(1)
    lost = lost.clamp(0, 1)
    lost.fill_diagonal_(0)
    return (lost + lost.T) / 2


def group(distance: torch.Tensor, ratio: int) -> list[list[int]]:
    """Groups of ``ratio`` heads with little distance within: the better of neighbours and a greedy choice, improved by swaps."""
    table = distance.tolist()
    neighbours = [list(range(start, start + ratio)) for start in range(0, len(table), ratio)]
    best = min((_swap(start, table) for start in (neighbours, _greedy(table, ratio))), key=lambda groups: _cost(groups, table))
    # Equal cost keeps the checkpoint's order.
    return neighbours if _cost(neighbours, table) <= _cost(best, table) else sorted(sorted(members) for members in best)


def _cost(groups: list[list[int]], table: list[list[float]]) -> float:
    return sum(table[one][other] for members in groups for one in members for other in members)


def _greedy(table: list[list[float]], ratio: int) -> list[list[int]]:
    """The head with the closest companions first, with these companions."""
    left = set(range(len(table)))
    groups = []
    while left:
        choices = [sorted(left, key=lambda other, one=one: (other != one, table[one][other]))[:ratio] for one in sorted(left)]  # type: ignore[misc]
        groups.append(min(choices, key=lambda members: _cost([members], table)))
        left -= set(groups[-1])
    return groups


def _swap(groups: list[list[int]], table: list[list[float]]) -> list[list[int]]:
    """Exchange two heads of different groups as long as that lowers the cost."""
    groups = [list(members) for members in groups]
    places = [(at, slot) for at in range(len(groups)) for slot in range(len(groups[at]))]

    def to_group(head: int, members: list[int], without: int) -> float:
        return sum(table[head][other] for other in members if other != without)

    improved = True
    while improved:
        improved = False
        for at, slot in places:
            for other_at, other_slot in places:
                if other_at <= at:
                    continue
                here, there = groups[at], groups[other_at]
                one, two = here[slot], there[other_slot]
                gain = to_group(one, here, one) + to_group(two, there, two) - to_group(one, there, two) - to_group(two, here, one)
                if gain > 1e-9:
                    here[slot], there[other_slot] = two, one
                    improved = True
    return groups


def merge(
    written: torch.Tensor, readers: torch.Tensor, blocks: list[Block], weights: list[torch.Tensor], groups: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One shared head for each group of heads.

    :param written: (heads, rows, columns): key or value heads, in coordinates in which all columns count alike.
    :param readers: (query heads, rows, any columns): what reads them, in the order of the heads.
    :return: the shared heads (groups, rows, columns), the readers mapped accordingly and *in the order of the groups*, and the
        relative residual (root of lost over all weighted energy).
    """
    import torch

    shared_heads = written.new_empty(len(groups), *written.shape[1:])
    per_head = len(readers) // len(written)
    mapped = readers.unflatten(0, (len(written), per_head)).clone()
    lost = total = 0.0
    for at, members in enumerate(groups):
        for block, weight in zip(blocks, weights, strict=True):
            heads, weighing = block.gather(written[members]), weight[:, members]
            shared, maps = share(heads, weighing, block.unit)
            block.scatter(shared_heads[at : at + 1], shared.unsqueeze(1))
            lost += float((weighing @ (heads - maps @ shared.unsqueeze(1))).abs().square().sum())
            total += float((weighing @ heads).abs().square().sum())
            for slot, member in enumerate(members):
                reading = block.gather(mapped[member])
                block.scatter(mapped[member], maps[:, slot].mH.unsqueeze(1) @ reading)
    order = [member for members in groups for member in members]
    return shared_heads, torch.cat([mapped[member] for member in order]), (lost / total) ** 0.5 if total else 0.0
