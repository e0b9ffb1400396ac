"""The finishing kernels: merge the splits, then the loss of a label rule, or the bare statistics.

Per row, with LSE the student's log-sum-exp over the queue, g its mean, s+ = z.t / tau and m the
label mean (labels.py):

    L    = logaddexp(LSE, s+)          g+ = g exp(LSE - L) + t exp(s+ - L)      with the positive
    L    = LSE                         g+ = g                                   without
    loss = L - z.m / tau               dz = (g+ - m) / tau
    du   = (dz - z (z.dz)) / |u|       where z = u / |u| was normalised here; 0 for |u| <= 1e-12

With the positive both are computed as what is left once t is taken out, which is small where the
student has learned its positive, and free of cancellation for hard labels (m = t):

    loss = log(1 + exp(LSE - s+)) + z.(t - m) / tau    tau dz = (g - t) exp(LSE - L) + (t - m)

z.m takes its z.mu from a sum in fp32, not from mu, whose weights are rounded for the product.

Tiling: one program per row; every vector of length D lies in its registers. Traffic: the partial
sums once (splits x D), n queue rows from L2, the row in and its gradient out.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .labels import TEACHER_POSITIVES, label_mean
from .launch import launch as launch_kernel
from .numerics import LN2, NORM_FLOOR, norms, widen
from .sums import merge_sums


class Config(NamedTuple):
    """What one compilation of the loss kernel is specialised to. Integers and booleans only."""

    D: int
    BLOCK_D: int
    BLOCK_S: int  # splits in flight together
    BLOCK_J: int  # neighbours in flight together
    TEACHER_SOFTMAX: bool  # the terms that the rule has, labels.py
    TEACHER_MEAN: bool
    TEACHER_POSITIVE: int
    NEIGHBORS: bool
    CLIP: bool
    POSITIVE: bool
    EXCLUDED: bool
    NORMALIZE: bool
    GRADIENT: bool
    DIAGNOSTICS: bool
    RUNNING_MAX: bool
    WEIGHTS: int  # in the means, sums.py


@triton.jit
def load_row(pointer, n, C: tl.constexpr):
    """Row n in fp32, (BLOCK_D,)."""
    d = tl.arange(0, C.BLOCK_D)
    return widen(tl.load(pointer + n * C.D + d, mask=d < C.D, other=0.0))


@triton.jit(do_not_specialize=["N", "num_rows", "splits", "num_neighbors"])
def finish_kernel(
    query_ptr,  # (N, D) as given
    z_ptr,  # (N, D) unit rows: query, or what the streaming kernel normalised
    t_ptr,  # (N, D)
    queue_ptr,  # (K, D)
    sums_ptr,  # (splits, SLOTS, num_rows)
    means_ptr,  # (splits, num_rows, D)
    ranks_ptr,  # (splits, N)
    excluded_ptr,  # (N,) int64, read if EXCLUDED
    neighbor_logits_ptr,  # (N, n) in base 2
    neighbor_indices_ptr,  # (N, n)
    loss_ptr,  # (N,) out
    dquery_ptr,  # (N, D) out
    confidence_ptr,  # (N,) out
    entropy_ptr,  # (N,) out
    positive_rank_ptr,  # (N,) out
    N,
    num_rows,
    splits,
    num_neighbors,
    student_scale,  # log2(e) / temperature
    teacher_scale,
    inverse_temperature,
    inverse_log_K,  # 1 / ln K; 0 for a queue of one row
    inverse_log_rest,  # of a queue of one row less
    positive_label,  # the rule's numbers
    mean_label,
    confident_mean_label,
    neighbor_label,
    confident_neighbor_label,
    C: tl.constexpr,  # Config
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, C.BLOCK_D)
    z = load_row(z_ptr, n, C)
    t = load_row(t_ptr, n, C)

    maximum, log_sum, _, _, mean = merge_sums(
        sums_ptr, means_ptr, n, num_rows, splits, student_scale, C.BLOCK_S,
        C.GRADIENT, False, False, C.RUNNING_MAX, C.WEIGHTS, C.D, C.BLOCK_D,
    )  # fmt: skip
    teacher_maximum = maximum
    teacher_log_sum = log_sum
    mu = tl.zeros([C.BLOCK_D], tl.float32)
    z_mu = log_sum
    confidence = log_sum
    if C.TEACHER_SOFTMAX:
        teacher_maximum, teacher_log_sum, entropy, z_mu, mu = merge_sums(
            sums_ptr, means_ptr, n + N, num_rows, splits, teacher_scale, C.BLOCK_S,
            C.TEACHER_MEAN and C.GRADIENT, True, C.TEACHER_MEAN, C.RUNNING_MAX, C.WEIGHTS,
            C.D, C.BLOCK_D,
        )  # fmt: skip
        entropy = entropy * LN2
        if C.EXCLUDED:
            one_less = tl.load(excluded_ptr + n) >= 0
            inverse_log_K = tl.where(one_less, inverse_log_rest, inverse_log_K)
        confidence = 1.0 - entropy * inverse_log_K
        confidence = tl.clamp(confidence, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        confidence = tl.where(inverse_log_K > 0.0, confidence, 0.0)
        if C.DIAGNOSTICS:
            tl.store(confidence_ptr + n, confidence)
            tl.store(entropy_ptr + n, entropy)
    rule = (
        positive_label, mean_label, confident_mean_label, neighbor_label, confident_neighbor_label
    )  # fmt: skip
    m, share_of_mu = label_mean(
        rule, num_neighbors, t, mu, confidence, teacher_maximum, teacher_log_sum, teacher_scale,
        queue_ptr, neighbor_indices_ptr + n * num_neighbors,
        neighbor_logits_ptr + n * num_neighbors, C,
    )  # fmt: skip

    # Everything in base 2 and relative to the positive.
    positive = tl.sum(z * t, 0) * student_scale
    excess = maximum - positive + log_sum
    share_of_queue = tl.full([], 1.0, tl.float32)
    if C.POSITIVE:
        queue_odds = tl.exp2(-tl.abs(excess))
        total = tl.maximum(excess, 0.0) + tl.log2(1.0 + queue_odds)
        share_of_queue = tl.where(excess > 0.0, 1.0, queue_odds) / (1.0 + queue_odds)
        excess = tl.where(excess == excess, total, excess)
    label_gap = tl.sum(z * (t - m), 0)
    if C.TEACHER_MEAN:
        label_gap -= share_of_mu * (z_mu - tl.sum(z * mu, 0))
    tl.store(loss_ptr + n, excess * LN2 + label_gap * inverse_temperature)

    if C.GRADIENT:
        gradient = ((mean - t) * share_of_queue + (t - m)) * inverse_temperature
        if C.NORMALIZE:
            raw = load_row(query_ptr, n, C)
            shrink, norm = norms(raw, 0)
            gradient = (gradient - z * tl.sum(z * gradient, 0)) * shrink
            gradient = gradient / tl.maximum(norm, NORM_FLOOR)
            gradient = tl.where(norm <= NORM_FLOOR, 0.0, gradient)
        tl.store(dquery_ptr + n * C.D + d, gradient, mask=d < C.D)
    if C.DIAGNOSTICS:
        rank = tl.full([], 0, tl.int64)
        for start in tl.range(0, splits, C.BLOCK_S):
            s = start + tl.arange(0, C.BLOCK_S)
            counts = tl.load(ranks_ptr + s.to(tl.int64) * N + n, mask=s < splits, other=0)
            rank += tl.sum(counts.to(tl.int64), 0)
        tl.store(positive_rank_ptr + n, rank)


@triton.jit(do_not_specialize=["N", "splits"])
def statistics_kernel(
    sums_ptr,  # (splits, SLOTS, N)
    means_ptr,  # (splits, N, D)
    lse_ptr,  # (N,) out
    mean_ptr,  # (N, D) out
    entropy_ptr,  # (N,) out
    N,
    splits,
    scale,  # log2(e) / temperature
    BLOCK_S: tl.constexpr,
    RUNNING_MAX: tl.constexpr,
    WEIGHTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    maximum, log_sum, entropy, _, mean = merge_sums(
        sums_ptr, means_ptr, n, N, splits, scale, BLOCK_S, True, True, False, RUNNING_MAX,
        WEIGHTS, D, BLOCK_D,
    )  # fmt: skip
    tl.store(lse_ptr + n, (maximum + log_sum) * LN2)
    tl.store(entropy_ptr + n, entropy * LN2)
    tl.store(mean_ptr + n * D + d, mean, mask=d < D)


# ------------------------------------------------------------------------------------------ launch


def finish_loss(
    query: torch.Tensor,  # (N, D) as given
    z: torch.Tensor,  # (N, D) unit rows
    t: torch.Tensor,  # (N, D)
    queue: torch.Tensor,  # (K, D)
    streamed,  # stream.Streamed
    neighbor_logits: torch.Tensor,  # (N, n) in base 2
    neighbor_indices: torch.Tensor,  # (N, n)
    rule,  # softcl.labels.LabelRule
    temperature: float,
    scales: tuple[float, float],  # log2(e) / temperature of student and teacher
    plan,  # plan.Plan of the streaming kernel
    excluded: torch.Tensor | None,  # (N,) int64
    *,
    positive: bool,
    gradient: bool,
    diagnostics: bool,
) -> tuple[torch.Tensor, ...]:
    """loss (N,), dquery (N, D), confidence, entropy, positive_rank (N,); empty if not asked for."""
    c = plan.config
    (N, D), K = query.shape, queue.shape[0]
    config = Config(
        D=D,
        BLOCK_D=c.BLOCK_D,
        BLOCK_S=block_of_splits(c.BLOCK_D),
        BLOCK_J=block_of_neighbors(rule.num_neighbors, c.BLOCK_D) if rule.adds_neighbors else 1,
        TEACHER_SOFTMAX=rule.needs_softmax,
        TEACHER_MEAN=rule.needs_mean,
        TEACHER_POSITIVE=TEACHER_POSITIVES[rule.teacher_positive],
        NEIGHBORS=rule.adds_neighbors,
        CLIP=rule.adds_neighbors and rule.clip,
        POSITIVE=positive,
        EXCLUDED=c.EXCLUDED,
        NORMALIZE=c.NORMALIZE,
        GRADIENT=gradient,
        DIAGNOSTICS=diagnostics,
        RUNNING_MAX=c.RUNNING_MAX,
        WEIGHTS=c.WEIGHTS,
    )
    shown = N if diagnostics and rule.needs_softmax else 0

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, device=query.device, dtype=dtype)

    loss, dquery = empty(N), empty(N, D) if gradient else empty(0)
    confidence, entropy = empty(shown), empty(shown)
    rank = empty(N if diagnostics else 0, dtype=torch.int64)
    arguments = (
        query, z, t, queue, streamed.sums, streamed.means, streamed.ranks,
        queue if excluded is None else excluded, neighbor_logits, neighbor_indices, loss, dquery,
        confidence, entropy, rank, N, N * plan.num_rows, plan.splits, rule.num_neighbors, *scales,
        1.0 / temperature, inverse_log(K), inverse_log(K - 1), *numbers_of(rule),
    )  # fmt: skip
    launch_kernel(finish_kernel, (N, 1), arguments, (config,), num_warps=4)
    return loss, dquery, confidence, entropy, rank


def finish_statistics(
    streamed, scale: float, N: int, plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """lse (N,), mean (N, D), entropy (N,)."""
    c = plan.config
    device = streamed.sums.device
    lse = torch.empty(N, device=device, dtype=torch.float32)
    mean = torch.empty((N, c.D), device=device, dtype=torch.float32)
    entropy = torch.empty(N, device=device, dtype=torch.float32)
    arguments = (streamed.sums, streamed.means, lse, mean, entropy, N, plan.splits, scale)
    block_s = block_of_splits(c.BLOCK_D)
    constants = (block_s, c.RUNNING_MAX, c.WEIGHTS, c.D, c.BLOCK_D)
    launch_kernel(statistics_kernel, (N, 1), arguments, constants, num_warps=4)
    return lse, mean, entropy


def numbers_of(rule) -> list[float]:
    """What the kernel takes of the rule, times a power of two that keeps it in fp32's range.

    The label mean divides by the labels' sum, so their common scale changes no bit of it.
    """
    numbers = (
        rule.positive, rule.mean, rule.confident_mean, rule.neighbor, rule.confident_neighbor
    )  # fmt: skip
    _, exponent = math.frexp(max(numbers))
    return [math.ldexp(x, -exponent) for x in numbers]


def inverse_log(rows: int) -> float:
    """1 / ln(rows), or 0 for one row alone, which says nothing about relations."""
    return 1.0 / math.log(rows) if rows > 1 else 0.0


def block_of_neighbors(num_neighbors: int, block_d: int) -> int:
    """Neighbours read together: all of them while they fit in a program's registers."""
    return max(1, min(1 << (num_neighbors - 1).bit_length(), 4096 // block_d))


def block_of_splits(block_d: int) -> int:
    """Splits read together, as many as fit in a program's registers. Not by the number of splits,
    which changes while a queue fills: those that are not there cost no load."""
    return max(1, min(16, 8192 // block_d))
