"""One tile of the queue as an operand: of the first product, which gives the cosines (M, BLOCK_K),
and of the second, which adds to the means (M, D).

A tile that is KEPT is loaded once, ahead of its turn, and serves both from shared memory, beside
the rows, which lie there for good. For D > 512 these do not fit. Then the pieces of D are loaded
one after the other, the rows' beside the queue's, as a matrix product does with its inner
dimension, and those of the queue once more for the second product: what is on the chip no longer
grows with D, but for the sums.
"""

import triton
import triton.language as tl

from .numerics import parts, transposed, widen
from .rows import columns

# How weights enter the second product: in one fp16 part, in one bf16 part, in three bf16 parts.
IN_FP16 = tl.constexpr(0)
IN_BF16 = tl.constexpr(1)
IN_PARTS = tl.constexpr(2)


@triton.jit
def load_tile(queue_ptr, tile, piece, K, C: tl.constexpr):
    """One piece of the queue rows of one tile (BLOCK_K, PIECE), zeros outside the queue."""
    k = tl.arange(0, C.BLOCK_K)
    queue_ptr += tl.cast(tile, tl.int64) * (C.BLOCK_K * C.D) + piece * C.PIECE
    pointers = queue_ptr + (k[:, None] * C.D + columns(0, C)[None, :])
    in_queue = (tile * C.BLOCK_K + k < K)[:, None]
    in_row = (columns(piece, C) < C.D)[None, :]
    FULL: tl.constexpr = (piece + 1) * C.PIECE <= C.D if C.KEPT else C.D % C.PIECE == 0
    if C.RAGGED and not FULL:
        return tl.load(pointers, mask=in_queue & in_row, other=0.0)
    elif C.RAGGED:
        return tl.load(pointers, mask=in_queue, other=0.0)
    elif not FULL:
        return tl.load(pointers, mask=in_row, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def queue_operands(raw, C: tl.constexpr):
    """A loaded tile as the right operands of the second product and of the first, in parts."""
    q = (raw, raw, raw)
    if C.QUEUE_PARTS > 1 and not C.NATIVE_FP16:
        q = parts(widen(raw), C.QUEUE_PARTS)
    if C.WEIGHTS == IN_FP16 and C.FIRST_MEAN:
        half = widen(raw).to(tl.float16)
        return (half, half, half), transposed(q)
    else:
        return q, transposed(q)


@triton.jit
def mean_operand(q, piece: tl.constexpr, C: tl.constexpr):
    """One piece of a tile for the second product, in parts (BLOCK_K, PIECE), fp16 or bf16 as the
    weights are. ``q`` holds all pieces, or says where they are."""
    if C.KEPT:
        return q[piece]
    else:
        return queue_operands(load_tile(q[0], q[1], piece, q[2], C), C)[0]
