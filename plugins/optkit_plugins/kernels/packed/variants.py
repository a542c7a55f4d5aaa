"""Which kernel multiplies packed weights with how many activations, and how it cuts the work: the fastest on an H200, by shape.

Measured by ``benchmarks/weight_kernels.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from optkit_plugins.kernels.packed.formats import TABLES

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
    """

    pairs: bool = False
    column_warps: int = 4
    row_warps: int = 1
    row_tiles: int = 1
    column_tiles: int = 4
    ahead: int = 1


@dataclass(frozen=True)
class Wide:
    """Many activations, in shared memory.

    :ivar row_tiles: tiles of 16 rows a program. :ivar tokens: activations a program. :ivar stages: column tiles under way.
    :ivar warps: of a program. :ivar splits: programs that share the columns; their sums are added by a second kernel.
    :ivar pairs: look 4-bit tables up in shared memory. Takes stages enough for more than 48 KB beside: where its own arrays are smaller,
        Triton does not ask the driver for more than 48 KB in all.
    """

    row_tiles: int
    tokens: int
    stages: int
    warps: int
    splits: int = 1
    pairs: bool = False


def choose(format: str, batch: int, row_tiles: int, blocks: int, gated: bool = False) -> Row | Few | Wide:
    """:param blocks: column tiles. :param gated: the rows are a gate's and an up projection's, which a program needs both."""
    if batch == 1:
        return choose_row(format, row_tiles, blocks, gated)
    return choose_few(format, batch, row_tiles) if batch <= FEW_BATCH else choose_wide(format, batch, row_tiles, blocks)


def choose_row(format: str, row_tiles: int, blocks: int, gated: bool) -> Row:
    if gated:
        return Row(2, 2, 4)
    if blocks > 128:
        return Row(8, 1, 4)
    if row_tiles >= VERY_MANY and format in TABLES:
        return Row(1, 4, 8)
    return Row(8, 1, 8) if row_tiles >= MANY else Row(4, 1, 4)


def choose_few(format: str, batch: int, row_tiles: int) -> Few:
    table = format in TABLES
    if row_tiles >= MANY:
        return Few(table, column_warps=2, row_warps=2, row_tiles=2, column_tiles=2, ahead=1 if batch <= 8 or format == "int4" else 0)
    return Few(table, column_tiles=2 if batch > 8 and row_tiles > FEW else 4)


def choose_wide(format: str, batch: int, row_tiles: int, blocks: int) -> Wide:
    many, long, table = row_tiles >= MANY, blocks >= 128, format in TABLES
    if batch > 64:
        splits = 1 if many else 4 if long or row_tiles <= FEW else 2
        return Wide(16 if many and format != "int8" else 8, 128, 3, 8, divide(blocks, splits), pairs=table)
    tokens = 32 if batch <= 32 else 64
    splits = divide(blocks, 1 if many else 8 if long else 4)
    if format != "int4" and tokens == 32:
        return Wide(4, tokens, 4, 4, divide(blocks, 2) if many and row_tiles < VERY_MANY else splits)
    if format != "int4":
        return Wide(8 if many or long else 4, tokens, 4, 8 if many and not table else 4, splits)
    return Wide(8 if many or long or tokens == 64 else 4, tokens, 4, 8 if many and tokens == 32 else 4, splits)


def divide(blocks: int, splits: int) -> int:
    """``splits``, halved until it divides the column tiles."""
    while blocks % splits:
        splits //= 2
    return splits
