"""Label rules in the kernels: the label mean m of one row, for each rule of softcl.labels.

Teacher's softmax over the queue: mu its mean, H its entropy, c = clamp(1 - H / log K, 0, 1) its
confidence, q_j its weights; N_n the n nearest rows. One function per rule, with the rule's name.
"""

import triton
import triton.language as tl

from .numerics import load_rows

HARD = tl.constexpr(0)
RELATIONAL = tl.constexpr(1)
MIXED = tl.constexpr(2)
ADAPTIVE_SOFT = tl.constexpr(3)
ADAPTIVE_NEIGHBORS = tl.constexpr(4)
NEIGHBORS = tl.constexpr(5)

RULE_CODES = {
    "hard": HARD.value,
    "relational": RELATIONAL.value,
    "mixed": MIXED.value,
    "adaptive_soft": ADAPTIVE_SOFT.value,
    "adaptive_neighbors": ADAPTIVE_NEIGHBORS.value,
    "neighbors": NEIGHBORS.value,
}


@triton.jit
def neighbor_sum(
    queue_ptr,  # (K, D)
    indices_ptr,  # (n,)
    logits_ptr,  # (n,) in base 2, descending
    n,
    log_sum,  # log2 of the teacher's softmax denominator, read if EXCESS
    mass,  # c n
    EXCESS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum_j w_j Q_j (BLOCK_D,) and sum_j w_j over the n nearest rows.

    w_j = 1, or with EXCESS min(0, 1 - mass q_j): what the clipping of labels at 1 takes away.
    """
    row_sum = tl.zeros([BLOCK_D], tl.float32)
    weight_sum = tl.full([], 0.0, tl.float32)
    for start in tl.range(0, n, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        index = tl.load(indices_ptr + j, mask=j < n, other=0)
        weight = tl.where(j < n, 1.0, 0.0)
        if EXCESS:
            logit = tl.load(logits_ptr + j, mask=j < n, other=0.0)
            weight = tl.where(j < n, tl.minimum(1.0 - mass * tl.exp2(logit - log_sum), 0.0), 0.0)
        rows = load_rows(queue_ptr, index, j < n, D, BLOCK_D)
        row_sum += tl.sum(rows * weight[:, None], 0)
        weight_sum += tl.sum(weight, 0)
    return row_sum, weight_sum


@triton.jit
def hard(t):
    """m = t"""
    return t, 0.0


@triton.jit
def relational(mu):
    """m = mu"""
    return mu, 1.0


@triton.jit
def mixed(t, mu, positive_weight):
    """m = w t + (1 - w) mu"""
    return positive_weight * t + (1.0 - positive_weight) * mu, 1.0 - positive_weight


@triton.jit
def adaptive_soft(t, mu, mass, excess_row_sum, excess_sum):
    """m = [t + a mu + sum_C (1 - a q_j) Q_j] / [1 + a + sum_C (1 - a q_j)], a = mass = c n,
    C = {j: a q_j > 1}, all of them among N_n"""
    total = 1.0 + mass + excess_sum
    return (t + mass * mu + excess_row_sum) / total, mass / total


@triton.jit
def adaptive_neighbors(t, confidence, row_sum, n):
    """m = (t + c sum_{N_n} Q_j) / (1 + c n)"""
    return (t + confidence * row_sum) / (1.0 + confidence * n), 0.0


@triton.jit
def neighbors(t, row_sum, n):
    """m = (t + sum_{N_n} Q_j) / (1 + n)"""
    return (t + row_sum) / (1.0 + n), 0.0


@triton.jit
def label_mean(
    RULE: tl.constexpr,
    t,  # (BLOCK_D,)
    mu,  # (BLOCK_D,), read by the rules with a mean
    confidence,  # read by the rules with a softmax
    log_sum,
    positive_weight,
    n,  # number of neighbors
    queue_ptr,
    indices_ptr,
    logits_ptr,
    BLOCK_J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """m (BLOCK_D,) by the rule, and the share of mu in it."""
    if RULE == HARD:
        return hard(t)
    elif RULE == RELATIONAL:
        return relational(mu)
    elif RULE == MIXED:
        return mixed(t, mu, positive_weight)
    else:
        mass = confidence * n.to(tl.float32)
        row_sum, weight_sum = neighbor_sum(
            queue_ptr, indices_ptr, logits_ptr, n, log_sum, mass,
            RULE == ADAPTIVE_SOFT, BLOCK_J, D, BLOCK_D,
        )  # fmt: skip
        if RULE == ADAPTIVE_SOFT:
            return adaptive_soft(t, mu, mass, row_sum, weight_sum)
        elif RULE == ADAPTIVE_NEIGHBORS:
            return adaptive_neighbors(t, confidence, row_sum, n.to(tl.float32))
        else:
            return neighbors(t, row_sum, n.to(tl.float32))
