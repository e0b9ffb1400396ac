"""Exact top-k of one row from its chunk maxima, without the other N x K products.

The k best columns of a row lie within the k chunks that have the largest maxima: a chunk left out
holds nothing above its maximum, and k columns at least as good are among those kept. So

    1. pick the k chunks with the largest maxima,
    2. compute v.Q_j again for their k * CHUNK_COLUMNS columns, in fp32,
    3. pick the k best of those and put each in its place.

Picking is a search for the k-th largest value by bisection over fp32's ordered bit patterns: at
most 32 counting passes, whatever k is, and no sort. Places are counted too, k^2 comparisons per
row.

Ties. Equal cosines go by lowest queue row. Where more chunks than there is room for equal the k-th
largest maximum T, a second search picks those that come first. The 4 CHUNK_GROUPS chunks of one run
of tiles interleave, and are kept or left together: a run that is left comes after r runs' chunks
equal to T, r the places that those above T leave, and each of these holds a row equal to T that is
lower than all of the run's. So at most k - 1 + 4 CHUNK_GROUPS chunks are kept, and k where nothing
ties.

Tiling: BLOCK_N rows per program, side by side; up to MOST_KEYS keys of a row are held in registers.
Traffic per row: the maxima once from HBM (of more keys the passes after the first hit L1), and k *
CHUNK_COLUMNS queue rows from L2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import launch as launch_kernel
from .numerics import INTERPRET, widen

# What a NaN, or minus infinity, counts as: below every cosine, above what is not a column at all.
WORST = tl.constexpr(-1e20)

# Below the key of every number, and one above the largest.
NO_KEY = tl.constexpr(-0x80000000)
LARGEST_KEY = tl.constexpr(0x7FFFFFFF)

# Halvings that search among 2^30 rows, the most there are.
SEARCH_STEPS = tl.constexpr(30)


class Config(NamedTuple):
    """What one compilation of the kernel is specialised to. Integers only."""

    D: int
    BLOCK_D: int
    BLOCK_K: int  # the streaming kernel's tile and chunks
    CHUNK_GROUPS: int
    TILES_PER_CHUNK: int
    CHUNK_COLUMNS: int
    EXCLUDED: bool  # one column of each row takes no part
    BLOCK_N: int  # rows per program
    BLOCK_C: int  # chunks of a row counted together
    HELD: bool  # which are all of them
    BLOCK_CANDIDATES: int  # candidates of a row counted together
    HELD_CANDIDATES: bool
    BLOCK_J: int  # candidates of a row multiplied together
    BLOCK_TOP: int  # k rounded up to a power of two
    BLOCK_OTHERS: int  # of the picked ones, compared with all of them together


@triton.jit
def key_of(x):
    """Integers in the order of fp32 ``x``, which is no NaN; -0 equals +0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def load_keys(values_ptrs, start, lengths, rows_mask, BLOCK: tl.constexpr):
    """Keys (R, BLOCK) of one stretch of the rows' values; NO_KEY where there is none."""
    i = start + tl.arange(0, BLOCK)[None, :]
    exist = rows_mask & (i < lengths)
    x = tl.load(values_ptrs + i, mask=exist, other=0.0)
    return tl.where(exist, key_of(tl.where(x == x, x, WORST)), NO_KEY)


@triton.jit
def keys_at(held, values_ptrs, start, lengths, rows_mask, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """What is held in registers, or the same loaded again."""
    if HELD:
        return held
    else:
        return load_keys(values_ptrs, start, lengths, rows_mask, BLOCK)


@triton.jit
def chunk_column(chunk, i, C: tl.constexpr):
    """Queue row of the i-th column of a chunk (see stream.py and numerics.fold)."""
    WIDTH: tl.constexpr = C.BLOCK_K // C.CHUNK_GROUPS
    PER_TILE: tl.constexpr = WIDTH // 4
    group = chunk // 4 % C.CHUNK_GROUPS
    tile = chunk // (4 * C.CHUNK_GROUPS) * C.TILES_PER_CHUNK + i // PER_TILE
    j = i % PER_TILE
    return tile * C.BLOCK_K + group * WIDTH + j // 2 * 8 + chunk % 4 * 2 + j % 2


@triton.jit
def candidate_columns(chunks_ptrs, i, mask, C: tl.constexpr):
    """Queue rows of the i-th candidates: the columns of the kept chunks, one after the other."""
    chunk = tl.load(chunks_ptrs + i // C.CHUNK_COLUMNS, mask=mask, other=0)
    return chunk_column(chunk, i % C.CHUNK_COLUMNS, C)


@triton.jit
def tie_break(chunks_ptrs, i, mask, CHUNKS: tl.constexpr, C: tl.constexpr):
    """What equal values go by, lowest first: a chunk's run of tiles, or a candidate's queue row."""
    if CHUNKS:
        return i // (4 * C.CHUNK_GROUPS)
    else:
        return candidate_columns(chunks_ptrs, i, mask, C)


@triton.jit
def pick_largest(
    values_ptrs,  # (R, 1) the first value of each row
    lengths,  # (R, 1) values of each row
    longest,  # the largest length
    count,  # <= every length
    out_ptrs,  # (R, 1) the first position written of each row
    rows_mask,  # (R, 1)
    chunks_ptrs,  # (R, 1) the chunks that the values belong to, unless CHUNKS
    last,  # no tie-break is above it
    CHUNKS: tl.constexpr,  # the values are all chunks' maxima
    BLOCK: tl.constexpr,  # values of a row counted together
    HELD: tl.constexpr,  # which are all of them
    C: tl.constexpr,  # Config
):
    """Write the positions of every row's ``count`` largest values, ascending; how many (R, 1).

    Equal ones go by `tie_break`; there are more than ``count`` where that ties too.
    """
    R: tl.constexpr = C.BLOCK_N
    if HELD:
        longest = BLOCK
    held = load_keys(values_ptrs, 0, lengths, rows_mask, BLOCK)
    smallest = tl.full([R, BLOCK], LARGEST_KEY, tl.int32)
    largest = tl.full([R, BLOCK], NO_KEY, tl.int32)
    for start in tl.range(0, longest, BLOCK):
        keys = keys_at(held, values_ptrs, start, lengths, rows_mask, BLOCK, HELD)
        smallest = tl.minimum(smallest, tl.where(keys > NO_KEY, keys, LARGEST_KEY))
        largest = tl.maximum(largest, keys)
    # At least `count` keys reach `low`, `above` of them and fewer than `count` reach `high`.
    low = tl.min(smallest, 1, keep_dims=True).to(tl.int64)
    high = tl.max(largest, 1, keep_dims=True).to(tl.int64) + 1
    above = tl.zeros([R, 1], tl.int32)
    open_rows = tl.max((rows_mask & (high - low > 1)).to(tl.int32))
    while open_rows > 0:
        middle = low + (high - low) // 2
        counts = tl.zeros([R, BLOCK], tl.int32)
        for start in tl.range(0, longest, BLOCK):
            keys = keys_at(held, values_ptrs, start, lengths, rows_mask, BLOCK, HELD)
            counts += (keys >= middle.to(tl.int32)).to(tl.int32)
        reached = tl.sum(counts, 1, keep_dims=True)
        # Exactly enough: nothing equals `high` - 1 = `low`, and the search of this row is over.
        low = tl.where(reached >= count, middle, low)
        low = tl.where(reached == count, middle - 1, low)
        above = tl.where(reached <= count, reached, above)
        high = tl.where(reached <= count, middle, high)
        open_rows = tl.max((rows_mask & (high - low > 1)).to(tl.int32))

    # Keys above `low` are in; of those equal to it, the ones that go before the others: fewer than
    # are wanted have a tie-break up to `before`, enough have one up to `until`.
    before = tl.full([R, 1], -1, tl.int32)
    until = tl.where(above < count, last, -1)
    tied = tl.max((rows_mask & (until - before > 1)).to(tl.int32))
    for _ in tl.range(0, tied * SEARCH_STEPS):
        middle = before + (until - before + 1) // 2
        counts = tl.zeros([R, BLOCK], tl.int32)
        for start in tl.range(0, longest, BLOCK):
            keys = keys_at(held, values_ptrs, start, lengths, rows_mask, BLOCK, HELD)
            i = start + tl.arange(0, BLOCK)[None, :]
            order = tie_break(chunks_ptrs, i, keys > NO_KEY, CHUNKS, C)
            counts += ((keys == low.to(tl.int32)) & (order <= middle)).to(tl.int32)
        enough = tl.sum(counts, 1, keep_dims=True) >= count - above
        until = tl.where(enough, middle, until)
        before = tl.where(enough, before, middle)

    taken = tl.zeros([R, 1], tl.int32)
    for start in tl.range(0, longest, BLOCK):
        keys = keys_at(held, values_ptrs, start, lengths, rows_mask, BLOCK, HELD)
        i = start + tl.zeros([R, BLOCK], tl.int32) + tl.arange(0, BLOCK)[None, :]
        first = tie_break(chunks_ptrs, i, keys > NO_KEY, CHUNKS, C) <= until
        wide = keys.to(tl.int64)
        chosen = (keys > NO_KEY) & ((wide > low) | ((wide == low) & first))
        ones = chosen.to(tl.int32)
        position = taken + tl.cumsum(ones, 1) - ones
        tl.store(out_ptrs + position, i, mask=chosen)
        taken += tl.sum(ones, 1, keep_dims=True)
    return taken


@triton.jit
def picked_column(picked_ptrs, cosines_ptrs, chunks_ptrs, j, mask, K, C: tl.constexpr):
    """Cosine and queue row of the j-th picked candidates."""
    i = tl.load(picked_ptrs + j, mask=mask, other=0)
    column = tl.minimum(candidate_columns(chunks_ptrs, i, mask, C), K - 1)
    return tl.load(cosines_ptrs + i, mask=mask, other=0.0), column


@triton.jit(do_not_specialize=["N", "K", "k", "num_chunks", "room"])
def select_kernel(
    vectors_ptr,  # (N, D)
    queue_ptr,  # (K, D)
    maxima_ptr,  # (N, num_chunks)
    excluded_ptr,  # (N,) int64, read if EXCLUDED
    chunks_ptr,  # (N, room) scratch
    cosines_ptr,  # (N, room CHUNK_COLUMNS) scratch
    picked_ptr,  # (N, k) scratch
    logits_ptr,  # (N, k) out: factor v.Q_j, descending
    indices_ptr,  # (N, k) out, int64
    N,
    K,
    k,
    num_chunks,
    room,  # chunks that can be kept
    factor,
    C: tl.constexpr,  # Config
):
    R: tl.constexpr = C.BLOCK_N
    n = tl.program_id(0) * R + tl.arange(0, R)
    n_mask = n < N
    n = n.to(tl.int64)[:, None]
    rows_mask = n_mask[:, None]
    maxima_ptrs = maxima_ptr + n * num_chunks
    chunks_ptrs = chunks_ptr + n * room
    cosines_ptrs = cosines_ptr + n * (room * C.CHUNK_COLUMNS)
    picked_ptrs = picked_ptr + n * k
    all_chunks = tl.zeros([R, 1], tl.int32) + num_chunks
    num_kept = pick_largest(
        maxima_ptrs, all_chunks, num_chunks, tl.minimum(k, num_chunks), chunks_ptrs, rows_mask,
        chunks_ptrs, (num_chunks - 1) // (4 * C.CHUNK_GROUPS), True, C.BLOCK_C, C.HELD, C,
    )  # fmt: skip
    tl.debug_barrier()  # what other threads of the program wrote
    num_columns = num_kept * C.CHUNK_COLUMNS
    most_columns = tl.max(tl.where(rows_mask, num_columns, 0))

    d = tl.arange(0, C.BLOCK_D)[None, None, :]
    v_mask = rows_mask[:, :, None] & (d < C.D)
    v = widen(tl.load(vectors_ptr + n[:, :, None] * C.D + d, mask=v_mask, other=0.0))
    if C.EXCLUDED:
        excluded = tl.load(excluded_ptr + n, mask=rows_mask, other=-1).to(tl.int32)
    for start in tl.range(0, most_columns, C.BLOCK_J):
        i = start + tl.arange(0, C.BLOCK_J)[None, :]
        mask = rows_mask & (i < num_columns)
        column = candidate_columns(chunks_ptrs, i, mask, C)
        inside = mask & (column < K)
        if C.EXCLUDED:
            inside = inside & (column != excluded)
        q_ptrs = queue_ptr + column.to(tl.int64)[:, :, None] * C.D + d
        q = widen(tl.load(q_ptrs, mask=inside[:, :, None] & (d < C.D), other=0.0))
        x = tl.sum(q * v, 2)  # (R, BLOCK_J)
        x = tl.where(x == x, tl.maximum(x, WORST), WORST)
        tl.store(cosines_ptrs + i, tl.where(inside, x, float("-inf")), mask=mask)
    tl.debug_barrier()
    pick_largest(
        cosines_ptrs, num_columns, most_columns, k, picked_ptrs, rows_mask, chunks_ptrs, K - 1,
        False, C.BLOCK_CANDIDATES, C.HELD_CANDIDATES, C,
    )  # fmt: skip
    tl.debug_barrier()

    # Every one's place is the number of those before it: by value, then by lowest row.
    j = tl.arange(0, C.BLOCK_TOP)[None, :]
    mask = rows_mask & (j < k)
    x, column = picked_column(picked_ptrs, cosines_ptrs, chunks_ptrs, j, mask, K, C)
    place = tl.zeros([R, C.BLOCK_TOP], tl.int32)
    for start in tl.range(0, k, C.BLOCK_OTHERS):
        i = start + tl.arange(0, C.BLOCK_OTHERS)[None, :]
        others = rows_mask & (i < k)
        y, row = picked_column(picked_ptrs, cosines_ptrs, chunks_ptrs, i, others, K, C)
        equal = (y[:, :, None] == x[:, None, :]) & (row[:, :, None] < column[:, None, :])
        before = others[:, :, None] & ((y[:, :, None] > x[:, None, :]) | equal)
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(logits_ptr + n * k + place, x * factor, mask=mask)
    tl.store(indices_ptr + n * k + place, column.to(tl.int64), mask=mask)


# ------------------------------------------------------------------------------------------ launch


# Rows per program, and the numbers that it holds at once. The interpreter's time goes by the number
# of operations.
ROWS = 32 if INTERPRET.value else 2
ELEMENTS = 1 << 20 if INTERPRET.value else 8192

# Keys of a row that a program counts together, and holds in registers if there are no more: 64 a
# thread. A row of 65536 queue rows has 4096 chunks at most for up to 16 neighbours.
FEW_KEYS = 256
MOST_KEYS = 4096


def power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def launch(
    vectors: torch.Tensor,  # (N, D) the very rows that the streaming kernel multiplied
    queue: torch.Tensor,  # (K, D)
    maxima: torch.Tensor,  # (N, num_chunks)
    k: int,
    factor: float,
    plan,  # plan.Plan of the streaming kernel
    excluded: torch.Tensor | None = None,  # (N,) int64
) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor v.Q_j, descending, (N, k) fp32) and (j, (N, k) int64) of the k nearest rows."""
    c = plan.config
    N = vectors.shape[0]
    room = min(k - 1 + 4 * c.CHUNK_GROUPS, plan.num_chunks)
    block_top = power_of_two(k, 2)
    # Few sizes, and none by the queue's length: a queue that fills would compile at every doubling.
    block_c = next((x for x in (FEW_KEYS, MOST_KEYS) if plan.num_chunks <= x), 1024)
    candidates = (k - 1 + 4 * c.CHUNK_GROUPS) * plan.chunk_columns
    block_candidates = min(power_of_two(candidates, FEW_KEYS), MOST_KEYS)
    config = Config(
        D=c.D,
        BLOCK_D=c.BLOCK_D,
        BLOCK_K=c.BLOCK_K,
        CHUNK_GROUPS=c.CHUNK_GROUPS,
        TILES_PER_CHUNK=c.TILES_PER_CHUNK,
        CHUNK_COLUMNS=plan.chunk_columns,
        EXCLUDED=c.EXCLUDED,
        BLOCK_N=ROWS,
        BLOCK_C=block_c,
        HELD=plan.num_chunks <= block_c,
        BLOCK_CANDIDATES=block_candidates,
        HELD_CANDIDATES=candidates <= block_candidates,
        BLOCK_J=max(1, ELEMENTS // (ROWS * c.BLOCK_D)),
        BLOCK_TOP=block_top,
        BLOCK_OTHERS=min(block_top, max(1, ELEMENTS // (ROWS * block_top))),
    )
    device = vectors.device
    chunks = torch.empty((N, room), device=device, dtype=torch.int32)
    cosines = torch.empty((N, room * plan.chunk_columns), device=device, dtype=torch.float32)
    picked = torch.empty((N, k), device=device, dtype=torch.int32)
    logits = torch.empty((N, k), device=device, dtype=torch.float32)
    indices = torch.empty((N, k), device=device, dtype=torch.int64)
    arguments = (
        vectors, queue, maxima, queue if excluded is None else excluded, chunks, cosines, picked,
        logits, indices, N, queue.shape[0], k, plan.num_chunks, room, factor,
    )  # fmt: skip
    # Left to itself ptxas spills keys, for the sake of one program more on a multiprocessor.
    launch_kernel(
        select_kernel, (-(-N // ROWS), 1), arguments, (config,), num_warps=4,
        max_registers=None if plan.max_registers is None else 255,
    )  # fmt: skip
    return logits, indices
