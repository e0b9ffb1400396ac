"""Arithmetic shared by the kernels: bf16 parts and their products, folds, rows.

Tensor cores multiply 16-bit numbers exactly and add in fp32. A wider number is therefore written as
a sum of bf16 parts, ``x = x0 + x1 + x2``: a part holds 8 significant bits, so one holds a bf16, two
hold an fp16 and three hold an fp32 exactly. A product of two such sums is the sum of the products
of their parts; those below fp32's last bit are left out.
"""

import os

import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bf16 numbers, and truncates where it should round.
# Under it the same values are carried in fp32 instead: products and sums are then the same.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

LN2 = tl.constexpr(0.6931471805599453)

# Below it a row has no direction: it is divided by this, and gets no gradient.
NORM_FLOOR = tl.constexpr(1e-12)
# Sums of squares above the first, 2^100, may be beyond fp32's range: they are taken once more of
# rows times the second, 2^-80. Such rows are far from the floor then, too.
LARGE_SQUARES = tl.constexpr(2.0**100)
SHRINK = tl.constexpr(2.0**-80)


@triton.jit
def widen(x):
    """``x`` in fp32."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def cut(x):
    """fp32 ``x`` with all but its 8 leading significant bits set to zero: a bf16, kept in fp32."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def as_bf16(x):
    """fp32 ``x`` that is a bf16 already, as an operand of a product."""
    if INTERPRET:
        return x
    else:
        return x.to(tl.bfloat16)


@triton.jit
def round_like(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded to the nearest number of ``dtype``, ties to even; still in fp32."""
    if dtype == tl.float16:
        return x.to(tl.float16).to(tl.float32)
    elif dtype == tl.bfloat16 and not INTERPRET:
        return x.to(tl.bfloat16).to(tl.float32)
    elif dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = cut((bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True))
        return tl.where(x == x, rounded, x)
    else:
        return x


@triton.jit
def parts(x, PARTS: tl.constexpr):
    """fp32 ``x`` as a sum of PARTS bf16 numbers, largest first. Always three results; the ones
    past PARTS are copies that no product reads."""
    x0 = cut(x)
    if PARTS == 1:
        return as_bf16(x0), as_bf16(x0), as_bf16(x0)
    else:
        x1 = cut(x - x0)
        x2 = cut(x - x0 - x1)
        return as_bf16(x0), as_bf16(x1), as_bf16(x2)


@triton.jit
def transposed(x):
    """The parts of a matrix as the parts of its transpose."""
    return tl.trans(x[0]), tl.trans(x[1]), tl.trans(x[2])


@triton.jit
def dot(a, b, accumulator):
    """``accumulator + a b`` with fp32 sums; a and b are both fp16 or both bf16."""
    if INTERPRET:
        return tl.dot(widen(a), widen(b), accumulator)
    else:
        return tl.dot(a, b, accumulator)


@triton.jit
def multiply_parts(
    a, b, accumulator, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, APART: tl.constexpr
):
    """``accumulator + (a[0] + a[1] + a[2])(b[0] + b[1] + b[2])``, smallest products first.

    APART: summed from zero, and then added. Tensor cores cut the last bits of a sum off where an
    addition rounds them, and would cut small products off a large accumulator altogether.
    """
    total = tl.zeros(accumulator.shape, tl.float32) if APART else accumulator
    if A_PARTS > 2:
        total = dot(a[2], b[0], total)
    if B_PARTS > 2:
        total = dot(a[0], b[2], total)
    if A_PARTS > 1 and B_PARTS > 1:
        total = dot(a[1], b[1], total)
    if A_PARTS > 1:
        total = dot(a[1], b[0], total)
    if B_PARTS > 1:
        total = dot(a[0], b[1], total)
    total = dot(a[0], b[0], total)
    return accumulator + total if APART else total


@triton.jit
def fold(x, GROUPS: tl.constexpr):
    """``x`` (M, B) seen as (M, GROUPS, B / (8 GROUPS), 4, 2).

    The accumulators of the tensor cores give four neighbouring threads two columns each of every
    eight. Axes 2 and 4 of this shape therefore lie inside one thread, and reducing over them needs
    no exchange between threads.
    """
    return tl.reshape(x, [x.shape[0], GROUPS, x.shape[1] // (8 * GROUPS), 4, 2])


@triton.jit
def fold_sum(x, GROUPS: tl.constexpr):
    """Sums over the columns that one thread holds: (M, B) to (M, GROUPS, 4)."""
    return tl.sum(tl.sum(fold(x, GROUPS), 4), 2)


@triton.jit
def fold_max(x, GROUPS: tl.constexpr):
    """Maxima over the columns that one thread holds: (M, B) to (M, GROUPS, 4)."""
    return tl.max(tl.max(fold(x, GROUPS), 4), 2)


@triton.jit
def unfold_sum(x):
    """Sums of (M, GROUPS, 4) per row: (M,)."""
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def load_rows(pointer, n, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``n`` (M,) where ``mask``, zeros elsewhere: (M, BLOCK_D) in fp32."""
    d = tl.arange(0, BLOCK_D)
    offsets = n.to(tl.int64)[:, None] * D + d[None, :]
    return widen(tl.load(pointer + offsets, mask=mask[:, None] & (d < D)[None, :], other=0.0))


@triton.jit
def norms(x, AXIS: tl.constexpr):
    """A power of two for each fp32 row, and the norm of the row times it, which is in range."""
    squares = tl.sum(x * x, AXIS)
    small = x * SHRINK
    shrunk = tl.sum(small * small, AXIS)
    large = squares > LARGE_SQUARES
    return tl.where(large, SHRINK, 1.0), tl.sqrt_rn(tl.where(large, shrunk, squares))


@triton.jit
def unit_rows(x, dtype: tl.constexpr):
    """fp32 rows (M, D) divided by their norms and rounded to ``dtype``; still in fp32.

    One division per row: one per element would fill the registers and nine tenths of the code.
    """
    shrink, norm = norms(x, 1)
    norm = tl.maximum(norm, NORM_FLOOR)
    inverse = tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm)
    return round_like(x * shrink[:, None] * inverse[:, None], dtype)
