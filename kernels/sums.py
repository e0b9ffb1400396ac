"""The partial sums of a softmax over the queue: add a tile, store a split, merge the splits.

With weights 2^x_j, x_j the logits in base 2, one row v's partial sums over part of the queue are

    weight_sum   sum_j 2^x_j                 what the entropy, the log-sum-exp and z.mu divide by
    cut_sum      sum_j w_j                   w_j: 2^x_j as the product takes it, if in one bf16 part
    cosine_sum   sum_j 2^x_j v.Q_j           for the entropy
    student_sum  sum_j 2^x_j z.Q_j           of a teacher's row, z the student's: z.mu in fp32
    mean_sum     sum_j w_j Q_j

and those of disjoint parts add up to those of the whole. 2^x needs no running maximum while |x|
stays inside fp32's exponent range: |x| <= log2(e) / temperature for unit rows, so RUNNING_MAX is
only asked for at temperatures below 0.023 (|x| > 63). With it all sums are relative to 2^maximum,
and cosine_sum is sum_j 2^(x_j - maximum) (x_j - maximum).

For fp32 rows (APART) a tile's part of mean_sum is a sum by itself (numerics.multiply_parts), and
splits are short (plan.LONGEST_FP32_SPLIT): tensor cores cut the low parts off long sums.

Weights go to the second product in one fp16 part, relative to a maximum that makes the largest
2^15: as they are they reach 1e-18. One bf16 part, where it is enough (plan.weights_of), needs no
maximum: it is cut, not rounded, and the mean divided by the parts' own sum, so that what the cut
takes from all of them alike drops out. fp32 rows take three bf16 parts.
"""

import triton
import triton.language as tl

from .numerics import INTERPRET, cut, fold_sum, multiply_parts, parts, unfold_sum
from .queue_tile import IN_BF16, IN_FP16, IN_PARTS, mean_operand
from .rows import columns

# Slots of the buffer of partial sums (splits, SLOTS, rows).
WEIGHTS = tl.constexpr(0)
CUT_WEIGHTS = tl.constexpr(1)
COSINES = tl.constexpr(2)
STUDENT_COSINES = tl.constexpr(3)
MAXIMUM = tl.constexpr(4)
SLOTS = tl.constexpr(5)

# Below every logit, and finite: the difference of two of them must not be NaN.
LOWEST = tl.constexpr(-1e30)

# log2 of the largest weight in fp16, which keeps 11 bits of all down to 2^-29 of it.
FP16_TOP = tl.constexpr(15.0)


@triton.jit
def no_sums(M: tl.constexpr, MEAN: tl.constexpr, C: tl.constexpr):
    """The sums over no tile, each (M, SUM_GROUPS, 4) spread over the threads that will add to it.

    mean_sum has a part (M, PIECE) for each piece of D, a placeholder where it is not needed.
    """
    zero = tl.zeros([M, C.SUM_GROUPS, 4], tl.float32)
    mean_piece = tl.zeros([M, C.PIECE if MEAN else 1], tl.float32)
    mean_sum = ()
    for _ in tl.static_range(C.PIECES):
        mean_sum += (mean_piece,)
    return zero, zero, zero, zero, tl.full([M], LOWEST, tl.float32), mean_sum


@triton.jit
def scaled(mean_sum, factor, C: tl.constexpr):
    """Every piece of a sum times ``factor`` (M, 1)."""
    pieces = ()
    for piece in tl.static_range(C.PIECES):
        pieces += (mean_sum[piece] * factor,)
    return pieces


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def pair_products(student, teacher, is_teacher):
    """Products of every student's row with its teacher's, in both rows' places.

    In one stacked tile (M, B) rows 0-7 of each 16 are students and rows 8-15 their teachers. The
    accumulators of the tensor cores give rows r and r + 8 to one thread: nothing moves.
    """
    M: tl.constexpr = student.shape[0]
    B: tl.constexpr = student.shape[1]
    both = tl.reshape(tl.where(is_teacher, teacher, student), [M // 16, 2, 8, B])
    product = tl.reduce(both, 1, multiply, keep_dims=True)
    return tl.reshape(tl.broadcast_to(product, [M // 16, 2, 8, B]), [M, B])


@triton.jit
def add_tile(
    sums,
    cosines,  # (M, BLOCK_K) v.Q of one tile
    student_cosines,  # (M, BLOCK_K) z.Q, read if STUDENT
    is_teacher,  # (M, 1), read in a stacked tile if STUDENT
    scale,  # x = scale v.Q
    q,  # the tile for the second product, as queue_tile.mean_operand takes it
    MEAN: tl.constexpr,
    ENTROPY: tl.constexpr,
    STUDENT: tl.constexpr,
    STACKED: tl.constexpr,
    C: tl.constexpr,  # stream.Config
):
    """The sums with one tile added."""
    weight_sum, cut_sum, cosine_sum, student_sum, maximum, mean_sum = sums
    logits = cosines * scale
    factor = cosines
    if C.RUNNING_MAX:
        top = tl.max(logits, 1)
        if C.WEIGHTS == IN_FP16:
            top -= FP16_TOP
        new_maximum = tl.maximum(maximum, top)
        drop = maximum - new_maximum
        carry = tl.exp2(drop)
        cosine_sum = (cosine_sum + drop[:, None, None] * weight_sum) * carry[:, None, None]
        student_sum *= carry[:, None, None]
        weight_sum *= carry[:, None, None]
        cut_sum *= carry[:, None, None]
        mean_sum = scaled(mean_sum, carry[:, None], C)
        maximum = new_maximum
        logits -= new_maximum[:, None]
        factor = logits
    weights = tl.exp2(logits)
    weight_sum += fold_sum(weights, C.SUM_GROUPS)
    if ENTROPY:
        cosine_sum += fold_sum(weights * factor, C.SUM_GROUPS)
    if STUDENT:
        if STACKED:
            products = pair_products(cosines, weights, is_teacher)
        else:
            products = weights * student_cosines
        student_sum += fold_sum(products, C.SUM_GROUPS)
    if MEAN:
        WEIGHT_PARTS: tl.constexpr = 3 if C.WEIGHTS == IN_PARTS else 1
        if C.WEIGHTS == IN_FP16:
            half = weights.to(tl.float16)
            w = (half, half, half)
        else:
            w = parts(weights, WEIGHT_PARTS)
        if C.WEIGHTS == IN_BF16:
            cut_sum += fold_sum(cut(weights), C.SUM_GROUPS)
        means = ()
        for piece in tl.static_range(C.PIECES):
            operand = mean_operand(q, piece, C)
            mean = multiply_parts(w, operand, mean_sum[piece], WEIGHT_PARTS, C.MEAN_PARTS, C.APART)
            means += (landed(mean) if C.LANDED else mean,)
        mean_sum = means
    return weight_sum, cut_sum, cosine_sum, student_sum, maximum, mean_sum


@triton.jit
def landed(x):
    """x, once it is there: an empty instruction that reads it.

    On Hopper, with queues that are not taken apart: without a use in the loop, the wait for the
    last wgmma sinks behind it, and ptxas then waits for every single one (its warning C7515).
    """
    if INTERPRET:
        return x
    else:
        return tl.inline_asm_elementwise("// $0", "=f,0", [x], tl.float32, is_pure=False, pack=1)


@triton.jit
def store_sums(
    sums,
    sums_ptr,  # (splits, SLOTS, num_rows)
    means_ptr,  # (splits, num_rows, D)
    split,
    rows,  # (M,)
    mask,
    num_rows,
    MEAN: tl.constexpr,
    ENTROPY: tl.constexpr,
    STUDENT: tl.constexpr,
    C: tl.constexpr,  # stream.Config
):
    """Write a row block's sums over one split."""
    weight_sum, cut_sum, cosine_sum, student_sum, maximum, mean_sum = sums
    base = sums_ptr + split.to(tl.int64) * SLOTS * num_rows + rows
    tl.store(base + WEIGHTS * num_rows, unfold_sum(weight_sum), mask=mask)
    if ENTROPY:
        tl.store(base + COSINES * num_rows, unfold_sum(cosine_sum), mask=mask)
    if STUDENT:
        tl.store(base + STUDENT_COSINES * num_rows, unfold_sum(student_sum), mask=mask)
    if C.RUNNING_MAX:
        tl.store(base + MAXIMUM * num_rows, maximum, mask=mask)
    if MEAN:
        if C.WEIGHTS == IN_BF16:
            tl.store(base + CUT_WEIGHTS * num_rows, unfold_sum(cut_sum), mask=mask)
        for piece in tl.static_range(C.PIECES):
            d = columns(piece, C)
            offsets = (split.to(tl.int64) * num_rows + rows)[:, None] * C.D + d[None, :]
            mean_piece = mean_sum[piece]
            tl.store(means_ptr + offsets, mean_piece, mask=mask[:, None] & (d < C.D)[None, :])


@triton.jit
def merge_sums(
    sums_ptr,  # (splits, SLOTS, num_rows)
    means_ptr,  # (splits, num_rows, D)
    row,
    num_rows,
    splits,
    scale,
    BLOCK_S: tl.constexpr,  # splits in flight together
    MEAN: tl.constexpr,
    ENTROPY: tl.constexpr,
    STUDENT: tl.constexpr,
    RUNNING_MAX: tl.constexpr,
    WEIGHTS_IN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row's maximum and log2 of its weight sum relative to that, entropy in bits, expected z.Q,
    and mean (BLOCK_D,).

    The maximum is 0 without RUNNING_MAX. It comes by itself: added to it at a temperature of 1e-4,
    where logits are 14427 and their last bit is 1e-3, the log2 would lose what a merge decides.
    What was not asked for is meaningless. The order of the additions depends on shapes alone.
    """
    d = tl.arange(0, BLOCK_D)
    maximum = tl.full([], 0.0, tl.float32)
    if RUNNING_MAX:
        maximum += LOWEST
        for start in tl.range(0, splits, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            slot = (s.to(tl.int64) * SLOTS + MAXIMUM) * num_rows
            here = tl.load(sums_ptr + slot + row, mask=s < splits, other=LOWEST)
            maximum = tl.maximum(maximum, tl.max(here, 0))
    weight_sum = tl.full([], 0.0, tl.float32)
    cut_sum = tl.full([], 0.0, tl.float32)
    cosine_sum = tl.full([], 0.0, tl.float32)
    student_sum = tl.full([], 0.0, tl.float32)
    mean_sum = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = s < splits
        base = sums_ptr + s.to(tl.int64) * SLOTS * num_rows + row
        weights = tl.load(base + WEIGHTS * num_rows, mask=mask, other=0.0)
        drop = tl.zeros([BLOCK_S], tl.float32)
        if RUNNING_MAX:
            drop = tl.load(base + MAXIMUM * num_rows, mask=mask, other=LOWEST) - maximum
        carry = tl.exp2(drop)
        weight_sum += tl.sum(weights * carry, 0)
        if ENTROPY:
            cosines = tl.load(base + COSINES * num_rows, mask=mask, other=0.0)
            cosine_sum += tl.sum((cosines + drop * weights) * carry, 0)
        if STUDENT:
            products = tl.load(base + STUDENT_COSINES * num_rows, mask=mask, other=0.0)
            student_sum += tl.sum(products * carry, 0)
        if MEAN:
            if WEIGHTS_IN == IN_BF16:
                cuts = tl.load(base + CUT_WEIGHTS * num_rows, mask=mask, other=0.0)
                cut_sum += tl.sum(cuts * carry, 0)
            offsets = (s.to(tl.int64) * num_rows + row)[:, None] * D + d[None, :]
            rows = tl.load(means_ptr + offsets, mask=mask[:, None] & (d < D)[None, :], other=0.0)
            mean_sum += tl.sum(rows * carry[:, None], 0)
    log_sum = tl.log2(weight_sum)
    entropy = log_sum - cosine_sum / weight_sum * (1.0 if RUNNING_MAX else scale)
    if MEAN:
        mean_sum = mean_sum / (cut_sum if WEIGHTS_IN == IN_BF16 else weight_sum)
    return maximum, log_sum, entropy, student_sum / weight_sum, mean_sum
