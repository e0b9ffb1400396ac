"""The tile table of the streaming kernel: tile sizes by architecture, shape of the work and D.

A row of the table is what one program does at a time (see stream.py). Tiles are chosen here, by
look-up, and never by timing at import or at the first call: the same call runs the same code on
every machine of a kind. `bench/tune_triton.py` times candidates on the GPU at hand and prints rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One row of the table.

    Attributes:
        block_n: samples per program; the products have block_n rows, 2 block_n if ``stacked``.
        block_k: queue rows per tile.
        num_warps, num_stages: warps per program, tiles in flight.
        programs_per_sm: how many fit on one multiprocessor (registers, shared memory).
        stacked: student and teacher rows in one tile (dense labels only).
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    stacked: bool = False


# Row counts, tile widths and stages are multiples of what the tensor cores take. INTERPRETER serves
# Triton's interpreter, where time goes by the number of operations, not by their size.
INTERPRETER = Tile(32, 64, 4, 1, 1)


def find_tile(target: str, kind: str, precision: str, D: int) -> Tile:
    return INTERPRETER
