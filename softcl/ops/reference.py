"""The specification: both operators in plain PyTorch, in pieces of the queue.

Every other backend is held to this file, and this file to the dense formulas of
:mod:`softcl.testing`. It runs on any device and in any floating dtype; sums are float64 if an input
is, float32 otherwise. The queue is visited in pieces, so its memory is O(N (piece + D)), and its
running softmax needs no bound on the logits:

    one reduction    lse = log sum_j exp(x_j)    mean = sum_j p_j Q_j    H = lse - sum_j p_j x_j
                     x_j = v . Q_j / temperature,  p = softmax(x)

Confidence, label mean, loss and gradient follow from it as in softcl/ops/algebra.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcl.ops import algebra
from softcl.ops.call import Call, LossCall, StatisticsCall, sum_dtype


def unsupported(call: Call) -> str | None:
    """The reference runs everything."""
    return None


def run(call: Call) -> tuple[Tensor, ...]:
    """The results of the call, as its `empty_results` lists them."""
    return soft_contrastive(call) if isinstance(call, LossCall) else queue_statistics(call)


class RunningSoftmax:
    """One softmax reduction over the queue: running maximum, sum, sum of e*x, sum of e*Q."""

    def __init__(self, vectors: Tensor, with_mean: bool) -> None:
        n, d = vectors.shape
        dtype = algebra.scalar_dtype(vectors)
        self.maximum = vectors.new_full((n, 1), -torch.inf)
        self.sum = vectors.new_zeros((n, 1), dtype=dtype)
        self.shifted = vectors.new_zeros((n, 1), dtype=dtype)  # sum of e (x - maximum)
        self.rows = vectors.new_zeros((n, d), dtype=dtype) if with_mean else None

    def add(self, logits: Tensor, rows: Tensor) -> None:  # (N, piece), (piece, D)
        maximum = torch.maximum(self.maximum, logits.amax(1, keepdim=True))
        # exp(-inf) at the first piece is 0, so nothing is carried over from the empty state.
        drop = (self.maximum - maximum).to(self.sum.dtype)
        carry = torch.exp(drop)
        drop = torch.where(carry > 0, drop, torch.zeros_like(carry))
        below = logits - maximum
        weights = below.exp()
        self.shifted = carry * (self.shifted + drop * self.sum)
        self.shifted += (weights * below).sum(1, keepdim=True)
        self.sum = carry * self.sum + weights.sum(1, keepdim=True)
        if self.rows is not None:
            self.rows = carry * self.rows + weights @ rows
        self.maximum = maximum

    def lse(self) -> Tensor:
        # In float64: rounded to float32, a value of 10 would move every share taken of it by 5e-7.
        return (self.maximum + self.sum.log()).squeeze(1)

    def entropy(self) -> Tensor:
        # log sum - E[x - max]: both terms are small where lse - E[x] would cancel.
        return (self.sum.log() - self.shifted / self.sum).squeeze(1)

    def mean(self) -> Tensor:
        return self.rows / self.sum


class RunningTopk:
    """The k largest logits of each row and their queue rows, descending, of equal ones the lowest
    rows first."""

    def __init__(self, vectors: Tensor, k: int) -> None:
        self.k = k
        self.values = vectors.new_empty((len(vectors), 0))
        self.indices = torch.empty((len(vectors), 0), dtype=torch.int64, device=vectors.device)

    def add(self, logits: Tensor, start: int) -> None:  # (N, piece)
        if self.k == 0:
            return
        # What is kept stands before the piece, whose rows are later ones: a stable sort keeps the
        # lowest of equal ones, whatever the pieces. topk promises no order.
        places = torch.arange(start, start + logits.shape[1], device=logits.device)
        values = torch.cat([self.values, logits], 1)
        indices = torch.cat([self.indices, places.expand(len(logits), -1)], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        self.values = values[:, : self.k].clone()
        self.indices = indices.gather(1, order[:, : self.k])


def queue_statistics(call: StatisticsCall) -> tuple[Tensor, ...]:
    """lse (N,), mean (N, D), entropy (N,), neighbor_logits (N, k), neighbor_indices (N, k).

    Without its excluded row a vector's queue has one row less, of which at least one must be left.
    """
    dtype = sum_dtype(call.query, call.queue)
    vectors = call.query.to(dtype)
    softmax = RunningSoftmax(vectors if call.sums else vectors[:0], with_mean=True)
    nearest = RunningTopk(vectors, call.num_neighbors)
    for start, rows in algebra.pieces(call.queue, len(vectors), dtype):
        logits = (vectors @ rows.T).div_(call.temperature)  # (N, piece)
        algebra.fill_excluded(logits, call.excluded, start, torch.finfo(dtype).min)
        nearest.add(logits, start)
        if call.sums:
            softmax.add(logits, rows)
    results = (softmax.lse(), softmax.mean(), softmax.entropy())
    return *(x.to(dtype) for x in results), nearest.values, nearest.indices


def soft_contrastive(call: LossCall) -> tuple[Tensor, ...]:
    """loss (N,), dquery (N, D), confidence, entropy, positive_rank (N,), neighbor_indices (N, n).

    What is not wanted, or what the rule does not compute, comes back empty.
    """
    rule, excluded = call.rule, call.excluded
    dtype = sum_dtype(call.query, call.queue)
    z, t, norm = call.query.to(dtype), call.key.to(dtype), None
    if call.normalize:
        z, norm = algebra.unit_rows(call.query, dtype)
        t, _ = algebra.unit_rows(call.key, dtype)
    # Per-row scalars are float64 up to the end: the loss is a difference of larger numbers.
    positive_cosine = algebra.row_dot(z, t)  # (N,)

    student = RunningSoftmax(z, with_mean=call.gradient)
    teacher = RunningSoftmax(t, with_mean=rule.needs_mean)
    nearest = RunningTopk(t, rule.num_neighbors)
    rank = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    lowest = torch.finfo(dtype).min
    for start, rows in algebra.pieces(call.queue, len(z), dtype):
        cosines = z @ rows.T  # (N, piece)
        if call.diagnostics:
            better = cosines > positive_cosine[:, None]
            algebra.fill_excluded(better, excluded, start, False)
            rank += better.sum(1)
        logits = cosines.div_(call.temperature)
        algebra.fill_excluded(logits, excluded, start, lowest)
        student.add(logits, rows)
        if rule.needs_softmax or rule.num_neighbors > 0:
            teacher_logits = (t @ rows.T).div_(call.teacher_temperature)
            algebra.fill_excluded(teacher_logits, excluded, start, lowest)
            nearest.add(teacher_logits, start)
            if rule.needs_softmax:
                teacher.add(teacher_logits, rows)

    confidence = entropy = None
    if rule.needs_softmax:
        entropy = teacher.entropy()
        confidence = algebra.confidence_of(entropy, len(call.queue), excluded)
    # What is left is O(N n D) and subtracts nearly equal means: float64 as the scalars.
    wide = positive_cosine.dtype
    label_mean = algebra.label_mean_of(
        rule,
        t.to(wide),
        call.teacher_temperature,
        teacher.lse() if rule.needs_softmax else None,
        teacher.mean() if rule.needs_mean else None,
        confidence,
        nearest.values.to(wide),
        lambda weights: algebra.weighted_sum(call.queue, nearest.indices, weights),
    )
    loss, dquery = algebra.finish(
        z,
        t,
        norm,
        student.lse(),
        student.mean() if call.gradient else None,
        label_mean,
        call.temperature,
        call.positive,
    )
    results = call.empty_results()
    results["loss"] = loss
    if dquery is not None:
        results["dquery"] = dquery
    if call.diagnostics:
        results["positive_rank"], results["neighbor_indices"] = rank, nearest.indices
        if rule.needs_softmax:
            results["confidence"], results["entropy"] = confidence.to(dtype), entropy.to(dtype)
    return tuple(results.values())
