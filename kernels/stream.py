"""The streaming kernel: one visit of every queue tile, for student and teacher rows together.

Each program sweeps one piece ("split") of the queue for one block of rows v (unit norm) and leaves

    sums      the partial softmax sums of its rows over the split (sums.py)
    maxima    the largest v.Q_j of every chunk of queue rows, for the exact top-k (select.py)
    ranks     how many z.Q_j exceed z.t, a diagnostic

Tiling. Grid (row blocks, splits), row blocks fastest, so that the programs in flight read the same
part of the queue. A program keeps its rows and its (rows, D) sums for its whole life; one
(BLOCK_K, D) queue tile is loaded once into shared memory and serves up to four products:

    SINGLE     BLOCK_N rows of one kind: queue statistics, or the student alone
    PAIRED     BLOCK_N samples, student and teacher as two tiles, each with its own products
    STACKED    BLOCK_N samples, students and teachers in one tile of 2 BLOCK_N rows that all get
               both products, eight rows of each in turn (sums.pair_products): for large D

Where the table says so a tile comes in pieces of D, each loaded, taken apart and multiplied by
itself, and the sums (rows, D) are kept in the same pieces. For D > 512 rows and tile have no room
beside the sums (KEPT is false): every product loads its pieces itself.

Traffic: K D elements of queue per row block, from L2; rows and sums once; with maxima four bytes
per row and chunk. Not KEPT: twice the queue for its two products, and the rows once for every tile.
Nothing of size N x K is written.

Chunks. The columns of an accumulator that one thread holds (numerics.fold) make four chunks of each
of the CHUNK_GROUPS column groups of a tile, over TILES_PER_CHUNK consecutive tiles.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import launch as launch_kernel
from .numerics import fold_max, fold_sum, multiply_parts, unfold_sum
from .queue_tile import load_tile, queue_operands
from .rows import columns, positive_cosines, prepare_rows, row_operand, row_piece
from .sums import SLOTS, add_tile, no_sums, store_sums

SINGLE = tl.constexpr(0)
PAIRED = tl.constexpr(1)
STACKED = tl.constexpr(2)

# The cosine of a column past the end of the queue, or of an excluded one: no weight, no rank, the
# least of its chunk. It is finite, so that a weight of zero times it is zero.
ABSENT = tl.constexpr(-1e30)


class Config(NamedTuple):
    """What one compilation of the kernel is specialised to. Integers and booleans only."""

    D: int
    RAGGED: bool  # the last tile reaches past the end of the queue
    EXCLUDED: bool  # one column of each row takes no part
    BLOCK_N: int  # samples per program
    BLOCK_K: int  # queue rows per tile
    BLOCK_D: int  # D rounded up to a power of two
    PIECE: int  # columns of D that are loaded, multiplied and added together
    PIECES: int  # that D takes
    KEPT: bool  # rows and tile stay on the chip; without, every product loads its pieces
    LAYOUT: int
    NUM_STAGES: int
    HAS_KEY: bool  # there are teacher rows, visited here or not
    NORMALIZE: bool  # divide the rows by their norms first, and store them
    FIRST_SOFTMAX: bool  # the student's, or the only, rows: any sums; without, maxima alone
    FIRST_MEAN: bool  # the second product
    FIRST_ENTROPY: bool
    SECOND_SOFTMAX: bool  # the teacher's rows in PAIRED: any sums, with the entropy
    SECOND_MEAN: bool
    STUDENT: bool  # the teacher's expectation of z.Q
    MAXIMA: bool
    RANKS: bool
    RUNNING_MAX: bool
    ROWS_AT_ONCE: int  # that are made ready together
    ROW_PARTS: int  # bf16 parts of the rows and the queue
    QUEUE_PARTS: int
    MEAN_PARTS: int  # of the queue, in the second product
    WEIGHTS: int  # in the second product, sums.py
    NATIVE_FP16: bool  # fp16 rows meet an fp16 queue as they are, in one part
    APART: bool  # a tile's mean is summed by itself; see sums.py
    LANDED: bool  # the mean's products are waited for in the loop; see sums.landed
    SUM_GROUPS: int  # column groups that different warps hold
    CHUNK_GROUPS: int
    TILES_PER_CHUNK: int


@triton.jit
def add_cosines(cosines, rows, q_transposed, C: tl.constexpr):
    """``cosines`` (M, BLOCK_K) with the products of one piece of D added."""
    TILE_PARTS: tl.constexpr = 1 if C.NATIVE_FP16 else C.QUEUE_PARTS
    return multiply_parts(rows, q_transposed, cosines, C.ROW_PARTS, TILE_PARTS, C.PIECES > 1)


@triton.jit
def first_products(first, second, queue_ptr, tile, K, M: tl.constexpr, C: tl.constexpr):
    """The tile for the second product, and the cosines (M, BLOCK_K) of both operands."""
    cosines = tl.zeros([M, C.BLOCK_K], tl.float32)
    teacher_cosines = cosines
    q = ()
    if C.KEPT:
        for piece in tl.static_range(C.PIECES):
            q_piece, q_transposed = queue_operands(load_tile(queue_ptr, tile, piece, K, C), C)
            cosines = add_cosines(cosines, first[piece], q_transposed, C)
            if C.LAYOUT == PAIRED:
                teacher_cosines = add_cosines(teacher_cosines, second[piece], q_transposed, C)
            q += (q_piece,)
    else:
        for piece in tl.range(0, C.PIECES, num_stages=C.NUM_STAGES):
            _, q_transposed = queue_operands(load_tile(queue_ptr, tile, piece, K, C), C)
            cosines = add_cosines(cosines, row_piece(first, piece, C), q_transposed, C)
            if C.LAYOUT == PAIRED:
                rows = row_piece(second, piece, C)
                teacher_cosines = add_cosines(teacher_cosines, rows, q_transposed, C)
        q = (queue_ptr, tile, K)
    if C.LAYOUT != PAIRED:
        teacher_cosines = cosines
    return q, cosines, teacher_cosines


@triton.jit
def visit_tile(
    state,
    tile,
    first,  # operand of the first tile of rows, rows.row_operand
    second,  # of the second, read if PAIRED
    first_scale,
    second_scale,
    is_second,  # (M,) in STACKED: which rows are teachers
    positive,  # (M,) what z.Q must exceed to outrank z.t, read if RANKS
    excluded,  # (M,) the column that takes no part, read if EXCLUDED
    queue_ptr,
    K,
    maxima_ptr,  # of the row block's first row
    maxima_offsets,  # (M, CHUNK_GROUPS, 4), chunk 0 of each row
    maxima_mask,
    C: tl.constexpr,
):
    """Load one queue tile and add it to everything; returns the new state."""
    first_sums, second_sums, chunk_maxima, ranks = state
    # Both first products before the first softmax, so that the second overlaps it.
    M: tl.constexpr = is_second.shape[0]
    q, cosines, teacher_cosines = first_products(first, second, queue_ptr, tile, K, M, C)
    if C.RAGGED:
        if (tile + 1) * C.BLOCK_K > K:
            exists = (tile * C.BLOCK_K + tl.arange(0, C.BLOCK_K) < K)[None, :]
            cosines = tl.where(exists, cosines, ABSENT)
            teacher_cosines = tl.where(exists, teacher_cosines, ABSENT)
    if C.EXCLUDED:
        takes_part = tl.arange(0, C.BLOCK_K)[None, :] != (excluded - tile * C.BLOCK_K)[:, None]
        cosines = tl.where(takes_part, cosines, ABSENT)
        teacher_cosines = tl.where(takes_part, teacher_cosines, ABSENT)

    if C.RANKS:
        ranks += fold_sum((cosines > positive[:, None]).to(tl.int32), C.SUM_GROUPS)
    if C.MAXIMA:
        maxima = fold_max(teacher_cosines, C.CHUNK_GROUPS)
        if C.TILES_PER_CHUNK > 1:
            # Every tile stores; the last one of a chunk writes the chunk's maximum.
            fresh = tile % C.TILES_PER_CHUNK == 0
            maxima = tl.where(fresh, maxima, tl.maximum(maxima, chunk_maxima))
            chunk_maxima = maxima
        chunk = tile // C.TILES_PER_CHUNK * (4 * C.CHUNK_GROUPS)
        tl.store(maxima_ptr + chunk + maxima_offsets, maxima, mask=maxima_mask)

    STACKED_STUDENT: tl.constexpr = C.STUDENT and C.LAYOUT == STACKED
    if C.FIRST_SOFTMAX:
        first_sums = add_tile(
            first_sums, cosines, cosines, is_second[:, None], first_scale, q,
            C.FIRST_MEAN, C.FIRST_ENTROPY, STACKED_STUDENT, True, C,
        )  # fmt: skip
    if C.SECOND_SOFTMAX:
        second_sums = add_tile(
            second_sums, teacher_cosines, cosines, is_second[:, None], second_scale, q,
            C.SECOND_MEAN, True, C.STUDENT, False, C,
        )  # fmt: skip
    return first_sums, second_sums, chunk_maxima, ranks


@triton.jit(
    do_not_specialize=["N", "K", "tiles_per_split", "chunk_quads"],
)
def stream_kernel(
    first_ptr,  # (N, D) query, or the vectors
    second_ptr,  # (N, D) key
    queue_ptr,  # (K, D)
    excluded_ptr,  # (N,) int64, read if EXCLUDED
    unit_ptr,  # (2 N, D) normalised rows, out, with NORMALIZE; (N, D) without a key
    parts_ptr,  # (ROW_PARTS, 2 N, D) rows in bf16 parts, out, with ROW_PARTS > 1
    sums_ptr,  # (splits, SLOTS, rows) out; rows: N of the first, then N of the second
    means_ptr,  # (splits, rows, D) out
    maxima_ptr,  # (N, 4 chunk_quads) out
    ranks_ptr,  # (splits, N) out
    N,
    K,
    first_scale,
    second_scale,
    tiles_per_split,
    chunk_quads,
    C: tl.constexpr,  # Config
):
    M: tl.constexpr = 2 * C.BLOCK_N if C.LAYOUT == STACKED else C.BLOCK_N
    split = tl.program_id(1)
    second_offset = tl.cast(N, tl.int64) * C.D
    part_stride = second_offset * (2 if C.HAS_KEY else 1)
    if C.NORMALIZE or C.ROW_PARTS > 1:
        prepare_rows(first_ptr, unit_ptr, parts_ptr, part_stride, N, C)
        if C.HAS_KEY:
            prepare_rows(
                second_ptr, unit_ptr + second_offset, parts_ptr + second_offset, part_stride, N, C
            )
        tl.debug_barrier()  # read back by other threads than wrote them
        if C.NORMALIZE:
            first_ptr = unit_ptr
            second_ptr = unit_ptr + second_offset

    r = tl.arange(0, M)
    samples = r // 16 * 8 + r % 8 if C.LAYOUT == STACKED else r
    is_second = r // 8 % 2 == 1 if C.LAYOUT == STACKED else r < 0
    n = tl.program_id(0) * C.BLOCK_N + samples
    n_mask = n < N

    positive = tl.zeros([M], tl.float32)
    if C.RANKS:
        positive = positive_cosines(first_ptr, second_ptr, n, n_mask, is_second, C)
    excluded = tl.zeros([M], tl.int32)
    if C.EXCLUDED:
        excluded = tl.load(excluded_ptr + n, mask=n_mask, other=-1).to(tl.int32)
    if C.ROW_PARTS > 1:
        first_ptr = parts_ptr
        second_ptr = parts_ptr + second_offset
    num_rows = N if C.LAYOUT == SINGLE else 2 * N
    scale = first_scale
    offsets = n.to(tl.int64)[:, None] * C.D + columns(0, C)[None, :]
    pointers = first_ptr + offsets
    if C.LAYOUT == STACKED:
        scale = tl.where(is_second, second_scale, first_scale)[:, None]
        pointers = tl.where(is_second[:, None], second_ptr + offsets, pointers)
    first = row_operand(pointers, n_mask, part_stride, C)
    second = first
    if C.LAYOUT == PAIRED:
        second = row_operand(second_ptr + offsets, n_mask, part_stride, C)

    g = tl.arange(0, C.CHUNK_GROUPS)
    four = tl.arange(0, 4)
    maxima_ptr += tl.cast(tl.program_id(0) * C.BLOCK_N, tl.int64) * (4 * chunk_quads)
    maxima_offsets = samples[:, None, None] * (4 * chunk_quads)
    maxima_offsets += g[None, :, None] * 4 + four[None, None, :]
    maxima_mask = n_mask & is_second if C.LAYOUT == STACKED else n_mask

    state = (
        no_sums(M, C.FIRST_MEAN, C),
        no_sums(M, C.SECOND_MEAN, C),
        tl.full([M, C.CHUNK_GROUPS, 4], float("-inf"), tl.float32),
        tl.zeros([M, C.SUM_GROUPS, 4], tl.int32),
    )
    start = split * tiles_per_split
    end = tl.minimum(start + tiles_per_split, tl.cdiv(K, C.BLOCK_K))
    for tile in tl.range(start, end, num_stages=C.NUM_STAGES if C.KEPT else 1):
        state = visit_tile(
            state, tile, first, second, scale, second_scale, is_second, positive, excluded,
            queue_ptr, K, maxima_ptr, maxima_offsets, maxima_mask[:, None, None], C,
        )  # fmt: skip

    first_sums, second_sums, _, ranks = state
    rows = n + tl.where(is_second, N, 0)
    if C.FIRST_SOFTMAX:
        store_sums(
            first_sums, sums_ptr, means_ptr, split, rows, n_mask, num_rows,
            C.FIRST_MEAN, C.FIRST_ENTROPY, C.STUDENT and C.LAYOUT == STACKED, C,
        )  # fmt: skip
    if C.SECOND_SOFTMAX:
        store_sums(
            second_sums, sums_ptr, means_ptr, split, rows + N, n_mask, num_rows,
            C.SECOND_MEAN, True, C.STUDENT, C,
        )  # fmt: skip
    if C.RANKS:
        mask = n_mask & (is_second == 0)
        tl.store(ranks_ptr + split.to(tl.int64) * N + n, unfold_sum(ranks), mask=mask)


# ------------------------------------------------------------------------------------------ launch


class Streamed(NamedTuple):
    """What the kernel leaves behind; entries that were not asked for are empty."""

    unit_rows: torch.Tensor  # (2 N, D) or (N, D)
    row_parts: torch.Tensor  # (ROW_PARTS, 2 N or N, D) bf16
    sums: torch.Tensor  # (splits, SLOTS, rows)
    means: torch.Tensor  # (splits, rows, D)
    maxima: torch.Tensor  # (N, num_chunks)
    ranks: torch.Tensor  # (splits, N) int32


def launch(
    first: torch.Tensor,  # (N, D)
    second: torch.Tensor | None,  # (N, D)
    queue: torch.Tensor,  # (K, D)
    first_scale: float,  # log2(e) / temperature
    second_scale: float,
    plan,  # plan.Plan
    excluded: torch.Tensor | None = None,  # (N,) int64
) -> Streamed:
    """Allocate the workspace and launch. Nothing waits for the device."""
    c = plan.config
    N, D = first.shape
    rows = N * plan.num_rows
    means = c.FIRST_MEAN or c.SECOND_MEAN
    empty = functools.partial(torch.empty, device=first.device, dtype=torch.float32)
    given = N * (1 + c.HAS_KEY)
    out = Streamed(
        empty((given, D) if c.NORMALIZE else (0,), dtype=first.dtype),
        empty((c.ROW_PARTS, given, D) if c.ROW_PARTS > 1 else (0,), dtype=torch.bfloat16),
        empty((plan.splits, SLOTS.value, rows) if c.FIRST_SOFTMAX else (0,)),
        empty((plan.splits, rows, D) if means else (0,)),
        empty((N, plan.num_chunks) if c.MAXIMA else (0,)),
        empty((plan.splits, N) if c.RANKS else (0,), dtype=torch.int32),
    )
    arguments = (
        first, first if second is None else second, queue,
        queue if excluded is None else excluded, *out, N, queue.shape[0], first_scale,
        second_scale, plan.tiles_per_split, plan.num_chunks // 4,
    )  # fmt: skip
    grid = plan.row_blocks, plan.splits
    launch_kernel(
        stream_kernel, grid, arguments, (c,),
        num_warps=plan.num_warps, num_stages=c.NUM_STAGES, max_registers=plan.max_registers,
    )  # fmt: skip
    return out
