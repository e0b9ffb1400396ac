"""From the shapes of a call to the launch of the streaming kernel: tile, splits and chunks.

Everything here depends on shapes, dtypes and the kind of device alone, so a call is planned once
and runs the same way every time.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from . import queue_tile, stream
from .tiles import WIDEST_KEPT, Tile, find_tile

LOG2_E = math.log2(math.e)

# 2^x of unit rows stays in fp32's range for |x| <= log2(e) / temperature <= 63.
COLDEST_WITHOUT_MAXIMUM = 0.023

# Bounds the chunk maxima of a row, so that the workspace does not grow with the queue.
MOST_CHUNKS = 8192
MOST_SPLITS = 64

# Queue rows of a split, with means, of fp32 and of other rows. With sums that are cut off as tensor
# cores do (tests/tensor_cores.py), for clustered rows and D = 128, the gradient's error is 1.0e-6
# at 8192 fp32 rows in a split (2.1e-6 at 32768), and 4.5e-4 at 32768 16-bit ones: it grows so.
LONGEST_FP32_SPLIT = 8192
LONGEST_SPLIT = 32768
# Of the means of all splits, where accuracy asks for more of them than fill the GPU.
MOST_MEAN_BYTES = 512 << 20

PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
PRECISIONS = {1: "bf16", 2: "fp16", 3: "fp32"}


@dataclass(frozen=True)
class Work:
    """What the streaming kernel has to do for one call."""

    N: int
    K: int
    D: int
    row_dtype: torch.dtype
    queue_dtype: torch.dtype
    has_key: bool = False  # two kinds of rows: student and teacher
    softmax: bool = True  # False: neighbours alone
    mean: bool = True  # of the student's, or the only, rows
    entropy: bool = False
    teacher_softmax: bool = False
    teacher_mean: bool = False
    num_neighbors: int = 0
    normalize: bool = False
    ranks: bool = False
    excluded: bool = False
    coldest: float = 0.1  # the smallest temperature in use

    @property
    def visits_teacher(self) -> bool:
        return self.has_key and (self.teacher_softmax or self.num_neighbors > 0)

    @property
    def cold(self) -> bool:
        """The softmax needs a running maximum."""
        return self.softmax and self.coldest < COLDEST_WITHOUT_MAXIMUM

    @property
    def native_fp16(self) -> bool:
        return self.row_dtype == self.queue_dtype == torch.float16

    @property
    def heavy(self) -> bool:
        """A maximum, columns that take no part, tiles that are not full: each takes registers."""
        maximum = self.cold or self.mean and weights_of(self) == queue_tile.IN_FP16.value
        return maximum or self.excluded or self.K % 128 != 0

    @property
    def kind(self) -> str:
        """The products of one tile: what the tile table is indexed by."""
        if not self.visits_teacher:
            return "single" if self.softmax else "search"
        return "dense" if self.teacher_mean and self.mean else "mixed"

    @property
    def precision(self) -> str:
        """The widest dtype among rows and queue, by its parts: "bf16", "fp16" or "fp32".

        "both-fp32" if neither is narrower; "bf16" too if both are fp16, which multiply as they are.
        """
        if self.native_fp16:
            return "bf16"
        parts = PARTS[self.row_dtype], PARTS[self.queue_dtype]
        return "both-fp32" if parts == (3, 3) else PRECISIONS[max(parts)]


@dataclass(frozen=True)
class Plan:
    """How the streaming kernel is launched, and how its chunks are laid out."""

    config: stream.Config
    row_blocks: int
    splits: int
    tiles_per_split: int
    num_chunks: int
    num_warps: int
    max_registers: int | None  # per thread; None where it cannot be said

    @property
    def num_rows(self) -> int:
        """Rows of the buffers of partial sums per sample."""
        return 1 if self.config.LAYOUT == stream.SINGLE.value else 2

    @property
    def chunk_columns(self) -> int:
        c = self.config
        return c.BLOCK_K // (4 * c.CHUNK_GROUPS) * c.TILES_PER_CHUNK


@functools.lru_cache(maxsize=256)
def make_plan(
    work: Work,
    target: str,
    num_multiprocessors: int,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Plan:
    """The plan of a call. ``tile`` and ``splits`` override the table and the choice made here."""
    tile = tile or find_tile(target, work.kind, work.precision, work.D, work.heavy)
    layout = stream.STACKED if tile.stacked else stream.PAIRED
    if not work.visits_teacher:
        layout = stream.SINGLE
    stacked = layout == stream.STACKED
    rows = tile.block_n * (2 if stacked else 1)
    # Rows of an accumulator that one warp holds; a second warp takes other columns of them. Four
    # warps read 128 rows of tensor memory.
    in_tensor_memory = target == "sm_100" and tile.num_warps >= 4 and rows >= 64
    rows_per_warp = 32 if in_tensor_memory else 16
    sum_groups = max(1, min(tile.num_warps * rows_per_warp // rows, tile.block_k // 8))
    chunk_groups, tiles_per_chunk = chunking(work.K, work.num_neighbors, tile.block_k, sum_groups)

    num_tiles = -(-work.K // tile.block_k)
    row_blocks = -(-work.N // tile.block_n)
    slots = num_multiprocessors * tile.programs_per_sm
    apart = work.row_dtype == torch.float32
    wanted = splits or choose_splits(row_blocks, num_tiles, slots)
    if work.mean and not splits:
        wanted = max(wanted, splits_for_accuracy(work))
    tiles_per_split = -(-num_tiles // wanted)
    tiles_per_split = -(-tiles_per_split // tiles_per_chunk) * tiles_per_chunk

    weights = weights_of(work)
    row_parts, queue_parts = PARTS[work.row_dtype], PARTS[work.queue_dtype]
    # Up to 64 numbers of a row in each thread, half of that where anything is cut into parts.
    block_d = max(16, 1 << (work.D - 1).bit_length())
    # Pieces are for what a tile holds in registers: a queue taken apart, means beside the sums.
    kept = work.D <= WIDEST_KEPT
    piece = block_d // (tile.pieces if queue_parts > 1 or apart or not kept else 1)
    numbers = 32 * tile.num_warps * (64 if row_parts == queue_parts == 1 else 32)
    config = stream.Config(
        D=work.D,
        RAGGED=work.K % tile.block_k != 0,
        EXCLUDED=work.excluded,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_D=block_d,
        PIECE=piece,
        PIECES=-(-work.D // piece),
        KEPT=kept,
        LAYOUT=layout.value,
        NUM_STAGES=tile.num_stages,
        HAS_KEY=work.has_key,
        NORMALIZE=work.normalize,
        FIRST_SOFTMAX=work.softmax,
        FIRST_MEAN=work.mean or stacked,
        FIRST_ENTROPY=work.entropy or stacked,
        SECOND_SOFTMAX=work.teacher_softmax and layout == stream.PAIRED,
        SECOND_MEAN=work.kind == "dense" and layout == stream.PAIRED,
        STUDENT=work.teacher_mean,
        MAXIMA=work.num_neighbors > 0,
        RANKS=work.ranks,
        RUNNING_MAX=work.cold or weights == queue_tile.IN_FP16.value and (work.mean or stacked),
        ROWS_AT_ONCE=min(tile.block_n, max(1, numbers // block_d)),
        ROW_PARTS=1 if work.native_fp16 else row_parts,
        QUEUE_PARTS=queue_parts,
        MEAN_PARTS=queue_parts if apart else 1,
        WEIGHTS=weights,
        NATIVE_FP16=work.native_fp16,
        APART=apart,
        LANDED=target == "sm_90" and work.mean and work.precision == "bf16",
        SUM_GROUPS=sum_groups,
        CHUNK_GROUPS=chunk_groups,
        TILES_PER_CHUNK=tiles_per_chunk,
    )
    return Plan(
        config=config,
        row_blocks=row_blocks,
        splits=-(-num_tiles // tiles_per_split),
        tiles_per_split=tiles_per_split,
        num_chunks=-(-num_tiles // tiles_per_chunk) * 4 * chunk_groups,
        num_warps=tile.num_warps,
        max_registers=max_registers(target, tile),
    )


def max_registers(target: str, tile: Tile) -> int | None:
    """Registers of a thread that let the tile's programs share a multiprocessor.

    To be told so keeps ptxas from spilling a few to fit one program more than the table wants.
    """
    if not target.startswith("sm_"):
        return None
    return min(255, (1 << 16) // (tile.programs_per_sm * 32 * tile.num_warps))


def weights_of(work: Work) -> int:
    """How a softmax weight enters the second product: in as much as its gradient's promise takes.

    One bf16 part leaves an error of 2^-8 in every weight, about 1.5e-3 of a mean of random rows.
    That is a quarter of the 1e-3 promised to half-precision inputs where the positive's label
    dominates the gradient, but not where it is the difference of two such means, or for a mean by
    itself. These take fp16, with an eighth of that error and a maximum; so does a queue that is not
    bf16, which would be two bf16 parts. fp32 rows take three parts, which hold a weight exactly.
    """
    if work.row_dtype == torch.float32:
        return queue_tile.IN_PARTS.value
    exact = work.kind == "dense" or not work.has_key or work.queue_dtype != torch.bfloat16
    return queue_tile.IN_FP16.value if exact else queue_tile.IN_BF16.value


def chunking(K: int, num_neighbors: int, block_k: int, sum_groups: int) -> tuple[int, int]:
    """(column groups of a tile, tiles per chunk) that make chunks of the wanted size.

    Long chunks mean few maxima to write and to scan, short ones few columns to multiply again for
    each of the neighbours.
    """
    wanted = 32 if num_neighbors <= 4 else 16 if num_neighbors <= 16 else 8
    while -(-K // wanted) > MOST_CHUNKS:
        wanted *= 2
    groups = max(sum_groups, block_k // (4 * wanted), 1)
    columns_per_tile = block_k // (4 * groups)
    return groups, max(1, wanted // columns_per_tile)


def splits_for_accuracy(work: Work) -> int:
    """Splits that keep the means' promise, as far as there is room for so many."""
    longest = LONGEST_FP32_SPLIT if work.row_dtype == torch.float32 else LONGEST_SPLIT
    rows = work.N * (2 if work.visits_teacher else 1)
    room = MOST_MEAN_BYTES // (rows * work.D * 4)
    return max(1, min(-(-work.K // longest), room, MOST_SPLITS))


def choose_splits(row_blocks: int, num_tiles: int, slots: int) -> int:
    """Splits of the queue that keep ``slots`` resident programs evenly busy.

    The time of one program is its tiles plus about two more for its start and end; programs run in
    waves of ``slots``. Of equal times the fewest splits win: fewer sums to merge.
    """
    best, best_time = 1, math.inf
    for splits in range(1, min(MOST_SPLITS, num_tiles) + 1):
        waves = -(-row_blocks * splits // slots)
        time = waves * (-(-num_tiles // splits) + 2) + splits / 8
        if time < best_time:
            best, best_time = splits, time
    return best
