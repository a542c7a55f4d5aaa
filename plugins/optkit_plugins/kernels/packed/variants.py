"""Which kernel multiplies packed weights with how many activations, and how it cuts the work: the fastest on an H200, by shape.

Measured by ``benchmarks/weight_kernels.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from optkit_plugins.kernels.packed.tables import TABLES

#: Activations up to which warps read them from memory, and up to which the product is fused at all; above, the weight is expanded and the
#: library multiplies.
FEW_BATCH, FUSED_BATCH = 16, 256
#: Row tiles up to which all programs run at once although each takes many registers (two a multiprocessor), from which the rows alone
#: fill a GPU, and from which they fill it many times over.
FEW, MANY, VERY_MANY = 264, 1024, 4096


@dataclass(frozen=True)
class Row:
    """One activation.

    :ivar column_warps: warps of a program that share the columns. :ivar row_warps: warps that share the rows.
    :ivar column_tiles: tiles of 64 columns that a warp loads at once, at most 8.
    """

    column_warps: int
    row_warps: int
    column_tiles: int


@dataclass(frozen=True)
class Few:
    """Some activations, which a warp's tensor cores read from memory.

    :ivar pairs: look 4-bit tables up in shared memory, not with byte permutes.
    :ivar column_warps: warps of a program that share the columns. :ivar row_warps: warps that share the rows.
    :ivar row_tiles: tiles of 16 rows a warp. :ivar column_tiles: tiles of 64 columns that a warp loads at once.
    :ivar ahead: steps whose weights are under way while one is computed.
    :ivar splits: programs that share the columns; their sums are added by a second kernel.
    """

    pairs: bool = False
    column_warps: int = 4
    row_warps: int = 1
    row_tiles: int = 1
    column_tiles: int = 4
    ahead: int = 1
    splits: int = 1


@dataclass(frozen=True)
class Wide:
    """Many activations, in shared memory.

    :ivar row_tiles: tiles of 16 rows a program. :ivar tokens: activations a program. :ivar stages: steps under way.
    :ivar warps: of a program. :ivar splits: programs that share the columns; their sums are added by a second kernel.
    :ivar pairs: look 4-bit tables up in shared memory. Takes stages enough for more than 48 KB beside: where its own arrays are smaller,
        Triton does not ask the driver for more than 48 KB in all.
    :ivar ordered: a kernel of its own brings the activations into the weights' order first: they are copied 16 bytes at a time, not 4.
    :ivar blocks: column tiles a step; divides those of a program.
    """

    row_tiles: int
    tokens: int
    stages: int
    warps: int
    splits: int = 1
    pairs: bool = False
    ordered: bool = False
    blocks: int = 1


def choose(format: str, batch: int, row_tiles: int, blocks: int, gated: bool = False) -> Row | Few | Wide:
    """:param blocks: column tiles. :param gated: the rows are a gate's and an up projection's, which a program needs both."""
    if batch == 1:
        return choose_row(format, row_tiles, blocks, gated)
    return choose_few(format, batch, row_tiles, blocks) if batch <= FEW_BATCH else choose_wide(format, batch, row_tiles, blocks)


def choose_row(format: str, row_tiles: int, blocks: int, gated: bool) -> Row:
    if gated:
        return Row(2, 2, 4)
    if blocks > 128:
        return Row(8, 1, 4)
    if row_tiles >= VERY_MANY and format in TABLES:
        return Row(1, 4, 8)
    return Row(8, 1, 8) if row_tiles >= MANY else Row(4, 1, 4)


def choose_few(format: str, batch: int, row_tiles: int, blocks: int) -> Few:
    table = format in TABLES
    if row_tiles >= MANY:
        return Few(table, column_warps=2, row_warps=2, row_tiles=2, column_tiles=2, ahead=1 if batch <= 8 or format == "int4" else 0)
    if table and batch > 8 and blocks >= 128 and blocks % 4 == 0:
        return Few(table, column_warps=2, row_warps=2, row_tiles=2, column_tiles=2, splits=4)
    return Few(table, column_tiles=2 if batch > 8 and row_tiles > FEW else 4)


def choose_wide(format: str, batch: int, row_tiles: int, blocks: int) -> Wide:
    many, long, table = row_tiles >= MANY, blocks >= 128, format in TABLES
    splits = divide(blocks, 1 if many else 4 if row_tiles <= FEW else 2)
    if batch > 128:
        return Wide(8, 256, 3, 8, splits, table, ordered=True) if table else Wide(4, 256, 3, 4, splits, ordered=True)
    if batch > 64:
        splits = divide(blocks, 8) if long and not many else splits
        return Wide(8, 128, 4, 4, splits, table and not many, ordered=many or long)
    if batch > 32 or table:
        return choose_ordered(format, 64 if batch > 32 else 32, many, splits, 2 if blocks // splits % 2 == 0 else 1)
    splits = divide(blocks, 1 if many else 8 if long else 4)
    if format != "int4":
        return Wide(4, 32, 4, 4, divide(blocks, 2) if many and row_tiles < VERY_MANY else splits)
    return Wide(8 if many or long else 4, 32, 4, 8 if many else 4, splits)


def choose_ordered(format: str, tokens: int, many: bool, splits: int, blocks: int) -> Wide:
    """:param blocks: column tiles that a step may have."""
    if format in TABLES and tokens == 32:
        small = blocks == 2 and not many
        return Wide(4, 32, 5, 4, splits, True, True, 2) if small else Wide(8, 32, 7, 4, splits, True, True)
    if format in TABLES:
        return Wide(8, 64, 5, 4, splits, True, True) if many else Wide(4, 64, 6, 4, splits, True, True)
    if many:
        return Wide(8, 64, 3, 4, splits, ordered=True, blocks=blocks) if format == "int4" else Wide(4, 64, 6, 4, splits, ordered=True)
    return Wide(4, 64, 4, 4, splits, ordered=True, blocks=blocks)


def divide(blocks: int, splits: int) -> int:
    """``splits``, halved until it divides the column tiles."""
    while blocks % splits:
        splits //= 2
    return splits
