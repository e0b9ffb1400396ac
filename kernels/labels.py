"""The label rule in the kernels: the label mean m of one row, for the numbers of any rule.

Teacher's softmax over the queue: q_j its weights, mu its mean, c its confidence; N_n the n nearest
rows (softcl/labels.py has the words):

    m   = [(p + a (1 - r)) t + a r mu + sum_{N_n} w_j Q_j] / [p + a + sum_{N_n} w_j]
    a   = mean + confident_mean c
    w_j = neighbor + confident_neighbor c        with CLIP: min(0, p - a r q_j)
    r   = 1, or the queue's share in the teacher's softmax with one more entry, the positive's

The numbers are arguments at run time. What is compiled is which of the terms there are.
"""

import triton
import triton.language as tl

from .numerics import load_rows
from .queue_tile import IN_FP16
from .sums import FP16_TOP

# The logit of the positive's entry in the teacher's softmax: there is none, 0, or that of t.t.
NO_ENTRY = tl.constexpr(0)
ZERO_ENTRY = tl.constexpr(1)
OWN_ENTRY = tl.constexpr(2)
TEACHER_POSITIVES = {None: NO_ENTRY.value, "zero": ZERO_ENTRY.value, "self": OWN_ENTRY.value}


@triton.jit
def shares(excess):
    """2^excess and 1 over their sum, each by itself: 1 less the larger would lose the smaller."""
    odds = tl.exp2(-tl.abs(excess))
    larger = 1.0 / (1.0 + odds)
    smaller = odds / (1.0 + odds)
    return tl.where(excess > 0.0, larger, smaller), tl.where(excess > 0.0, smaller, larger)


@triton.jit
def neighbor_sum(
    queue_ptr,  # (K, D)
    indices_ptr,  # (n,)
    logits_ptr,  # (n,) in base 2, descending, read if CLIP
    n,
    weight,  # w_j, read unless CLIP
    positive,  # p
    mass,  # a r
    maximum,  # the teacher's softmax denominator is 2^(maximum + log_sum), read if CLIP
    log_sum,
    C: tl.constexpr,  # finish.Config
):
    """sum_j w_j Q_j (BLOCK_D,) and sum_j w_j over the n nearest rows."""
    row_sum = tl.zeros([C.BLOCK_D], tl.float32)
    weight_sum = tl.full([], 0.0, tl.float32)
    if C.CLIP and C.RUNNING_MAX:
        # The same logit by the sum that the others here come from: at low temperatures the bits in
        # which two sums differ would be a large part of q_j.
        maximum = tl.load(logits_ptr)
        if C.WEIGHTS == IN_FP16:
            maximum -= FP16_TOP
    for start in tl.range(0, n, C.BLOCK_J):
        j = start + tl.arange(0, C.BLOCK_J)
        index = tl.load(indices_ptr + j, mask=j < n, other=0)
        weights = tl.zeros([C.BLOCK_J], tl.float32) + weight
        if C.CLIP:
            logit = tl.load(logits_ptr + j, mask=j < n, other=0.0)
            weights = tl.minimum(positive - mass * tl.exp2(logit - maximum - log_sum), 0.0)
        weights = tl.where(j < n, weights, 0.0)
        rows = load_rows(queue_ptr, index, j < n, C.D, C.BLOCK_D)
        row_sum += tl.sum(rows * weights[:, None], 0)
        weight_sum += tl.sum(weights, 0)
    return row_sum, weight_sum


@triton.jit
def label_mean(
    rule,  # positive, mean, confident_mean, neighbor, confident_neighbor
    n,  # number of neighbours
    t,  # (BLOCK_D,)
    mu,  # (BLOCK_D,), zeros without a gradient
    confidence,  # read if TEACHER_SOFTMAX
    maximum,  # the teacher's softmax denominator is 2^(maximum + log_sum)
    log_sum,
    teacher_scale,  # log2(e) / temperature
    queue_ptr,
    indices_ptr,
    logits_ptr,
    C: tl.constexpr,  # finish.Config
):
    """m (BLOCK_D,), and the share of mu in it. Where all is the positive's m is t to the bit."""
    positive, mean, confident_mean, neighbor, confident_neighbor = rule
    if C.TEACHER_MEAN or C.NEIGHBORS:
        weight_of_t = positive
        weight_of_mu = tl.full([], 0.0, tl.float32)
        total = positive
        if C.TEACHER_MEAN:
            mass = mean + confident_mean * confidence
            total += mass
            weight_of_mu += mass
            if C.TEACHER_POSITIVE != NO_ENTRY:
                own = 0.0
                if C.TEACHER_POSITIVE == OWN_ENTRY:
                    own = tl.sum(t * t, 0) * teacher_scale
                queue_share, own_share = shares(maximum - own + log_sum)
                weight_of_t += mass * own_share
                weight_of_mu = mass * queue_share
        row_sum = tl.zeros([C.BLOCK_D], tl.float32)
        if C.NEIGHBORS:
            weight = neighbor
            if C.TEACHER_SOFTMAX:
                weight += confident_neighbor * confidence
            row_sum, weight_sum = neighbor_sum(
                queue_ptr, indices_ptr, logits_ptr, n, weight, positive, weight_of_mu, maximum,
                log_sum, C,
            )  # fmt: skip
            total += weight_sum
        # Divided exactly: p / p is 1.
        share_of_mu = tl.div_rn(weight_of_mu, total)
        return tl.div_rn(weight_of_t, total) * t + share_of_mu * mu + row_sum / total, share_of_mu
    else:
        return t, 0.0
