"""The rows of a streaming program: made ready once, kept for its whole life, or loaded by pieces.

Rows that are 16 bits wide and already of unit norm are taken as they are. Others go through global
memory, divided by their norms and cut into bf16 parts (numerics.py), by the program itself.
"""

import triton
import triton.language as tl

from .numerics import load_rows, parts, unit_rows, widen

# A cosine outranks the positive's by more than two ways of summing the same products can differ: a
# queue row equal to the key must not count as better than the key.
MARGIN = tl.constexpr(5e-7)


@triton.jit
def prepare_rows(rows_ptr, unit_ptr, parts_ptr, part_stride, N, C: tl.constexpr):
    """Leave the block's rows as the products take them: divided by their norms, in bf16 parts.

    Every split does so, with the same bits. The finishing kernel must see the very rows that are
    multiplied here; and tensor cores take what was loaded from shared memory, but what was computed
    from registers, which have no room for it. So: through global memory, a few rows at a time.
    """
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    d = tl.arange(0, C.BLOCK_D)
    for start in tl.range(0, C.BLOCK_N, C.ROWS_AT_ONCE):
        n = tl.program_id(0) * C.BLOCK_N + start + tl.arange(0, C.ROWS_AT_ONCE)
        mask = (n < N)[:, None] & (d < C.D)[None, :]
        offsets = n.to(tl.int64)[:, None] * C.D + d[None, :]
        x = load_rows(rows_ptr, n, n < N, C.D, C.BLOCK_D)
        if C.NORMALIZE:
            x = unit_rows(x, dtype)
            tl.store(unit_ptr + offsets, x.to(dtype), mask=mask)
        if C.ROW_PARTS > 1:
            x0, x1, x2 = parts(x, C.ROW_PARTS)
            tl.store(parts_ptr + offsets, x0.to(tl.bfloat16), mask=mask)
            tl.store(parts_ptr + part_stride + offsets, x1.to(tl.bfloat16), mask=mask)
            if C.ROW_PARTS > 2:
                tl.store(parts_ptr + 2 * part_stride + offsets, x2.to(tl.bfloat16), mask=mask)


@triton.jit
def columns(piece, C: tl.constexpr):
    """The columns (PIECE,) of one piece of D."""
    return piece * C.PIECE + tl.arange(0, C.PIECE)


@triton.jit
def load_piece(pointers, n_mask, part_stride, piece, C: tl.constexpr):
    """One piece of the rows (M, PIECE), at ``pointers``: three bf16 parts, or one if they are 16
    bits wide.

    Kept rows pass through registers on their way to shared memory. The barriers keep the parts from
    doing so all at once, which would spill them.
    """
    mask = n_mask[:, None] & (columns(piece, C) < C.D)[None, :]
    x0 = tl.load(pointers, mask=mask, other=0.0)
    x1 = x0
    x2 = x0
    if C.ROW_PARTS > 1:
        if C.KEPT:
            tl.debug_barrier()
        x1 = tl.load(pointers + part_stride, mask=mask, other=0.0)
        if C.KEPT:
            tl.debug_barrier()
    if C.ROW_PARTS > 2:
        x2 = tl.load(pointers + 2 * part_stride, mask=mask, other=0.0)
        if C.KEPT:
            tl.debug_barrier()
    return x0, x1, x2


@triton.jit
def row_operand(pointers, n_mask, part_stride, C: tl.constexpr):
    """Rows as a left operand, the first piece at ``pointers``: all pieces, or where they are."""
    if C.KEPT:
        rows = ()
        for piece in tl.static_range(C.PIECES):
            rows += (load_piece(pointers, n_mask, part_stride, piece, C),)
            pointers += C.PIECE
        return rows
    else:
        return pointers, n_mask, part_stride


@triton.jit
def row_piece(rows, piece, C: tl.constexpr):
    """One piece of rows that are not kept."""
    return load_piece(rows[0] + piece * C.PIECE, rows[1], rows[2], piece, C)


@triton.jit
def positive_cosines(z_ptr, t_ptr, n, n_mask, is_second, C: tl.constexpr):
    """z.t of the student rows (M,) and MARGIN. Infinite, so that nothing counts, for a teacher's.

    A few columns at a time: these rows, once more in registers, would not fit beside the others.
    """
    total = tl.where(is_second, float("inf"), MARGIN)
    for start in tl.range(0, C.D, 16):
        d = start + tl.arange(0, 16)
        offsets = n.to(tl.int64)[:, None] * C.D + d[None, :]
        mask = n_mask[:, None] & (d < C.D)[None, :]
        z = widen(tl.load(z_ptr + offsets, mask=mask, other=0.0))
        total += tl.sum(z * widen(tl.load(t_ptr + offsets, mask=mask, other=0.0)), 1)
    return total
