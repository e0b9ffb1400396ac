"""The specification: both operators in plain PyTorch, in pieces of the queue.

Every other backend is held to this file. It runs on any device and in any floating dtype; sums are
float64 if an input is, float32 otherwise. The queue is visited in pieces, so its memory is
O(N (piece + D)), and its running softmax (softcl/ops/running.py) needs no bound on the logits.

    one reduction    lse = log sum_j exp(x_j)    mean = sum_j p_j Q_j    H = lse - sum_j p_j x_j
                     x_j = v . Q_j / temperature,  p = softmax(x)
    the loss         L  = logaddexp(LSE_s, z.t/tau_s)                  (LSE_s without the positive)
                     g+ = g exp(LSE_s - L) + t exp(z.t/tau_s - L)      (g without the positive)
                     loss = L - z.m/tau_s      dloss/dz = (g+ - m)/tau_s

``m`` comes from the label rule: see :mod:`softcl.labels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from softcl.labels import LabelRule
from softcl.ops.backends import Call
from softcl.ops.running import RunningSoftmax, RunningTopk, scalar_dtype

# Elements of one piece of logits: 4 M keeps the temporaries at 16 MB in float32.
PIECE_ELEMENTS = 1 << 22
# Sums within a piece are of the vectors' precision, sums over pieces are float64: a float32 product
# over 4096 rows at once, which BLAS may add one by one, has been seen 1e-5 off.
PIECE_ROWS = 512
NORM_FLOOR = 1e-12

OPTIONS = frozenset({"excluded"})  # all there are


def unsupported(call: Call) -> str | None:
    """The reference runs everything."""
    return None


def queue_statistics(
    vectors: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    temperature: float,
    num_neighbors: int,
    *,
    sums: bool = True,
    excluded: Tensor | None = None,  # (N,)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse (N,), mean (N, D), entropy (N,), neighbor_logits (N, k), neighbor_indices (N, k).

    Without ``sums`` the first three have no rows: a search for neighbours alone. Without its
    excluded row a vector's queue has one row less, of which at least one must be left.
    """
    dtype = sum_dtype(vectors, queue)
    vectors = vectors.to(dtype)
    softmax = RunningSoftmax(vectors if sums else vectors[:0], with_mean=True)
    nearest = RunningTopk(vectors, num_neighbors)
    for start, rows in pieces(queue, vectors.shape[0], dtype):
        logits = (vectors @ rows.T).div_(temperature)  # (N, piece)
        fill_excluded(logits, excluded, start, torch.finfo(dtype).min)
        nearest.add(logits, start)
        if sums:
            softmax.add(logits, rows)
    values, indices = nearest.result()
    results = (softmax.lse(), softmax.mean(), softmax.entropy())
    return *(x.to(dtype) for x in results), values, indices


def queue_statistics_backward(
    vectors: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    temperature: float,
    lse: Tensor,  # (N,)
    mean: Tensor,  # (N, D)
    entropy: Tensor,  # (N,)
    neighbor_indices: Tensor,  # (N, k)
    dlse: Tensor | None,  # (N,)
    dmean: Tensor | None,  # (N, D)
    dentropy: Tensor | None,  # (N,)
    dneighbor_logits: Tensor | None,  # (N, k)
    excluded: Tensor | None = None,  # (N,)
    with_queue: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient of the statistics with respect to ``vectors`` (N, D) and to ``queue`` (K, D).

    With x the logits and p their softmax, the chain rule through x is

        dx_j = p_j [dlse + (Q_j - mean).dmean - dentropy (x_j - lse + H)]  (+ dneighbor_logits)
        dv   = sum_j dx_j Q_j / temperature
        dQ_j = sum_i dx_ij v_i / temperature + p_ij dmean_i

    The part of dv in ``dlse`` is ``dlse * mean``: free. Only ``dmean``, ``dentropy`` and the
    queue's gradient need a second pass over the queue, made here in pieces for every backend.
    The queue's gradient comes back empty unless ``with_queue``.
    """
    dtype = mean.dtype
    gradient = mean.new_zeros(vectors.shape)
    queue_gradient = mean.new_zeros(queue.shape if with_queue else (0,))
    if dlse is not None:
        gradient += dlse[:, None] * mean
    if dmean is not None or dentropy is not None or (with_queue and dlse is not None):
        vectors = vectors.to(dtype)
        for start, rows in pieces(queue, vectors.shape[0], dtype):
            logits = (vectors @ rows.T).div_(temperature)  # (N, piece)
            fill_excluded(logits, excluded, start, torch.finfo(dtype).min)
            weights = torch.exp(logits - lse[:, None])
            slope = torch.zeros_like(logits)
            if dmean is not None:
                slope += dmean @ rows.T - (dmean * mean).sum(1, keepdim=True)
            if dentropy is not None:
                slope -= dentropy[:, None] * (logits - (lse - entropy)[:, None])
            fill_excluded(slope, excluded, start, 0.0)
            gradient += (weights * slope) @ rows
            if with_queue:
                if dlse is not None:
                    slope += dlse[:, None]
                piece = (weights * slope).T @ vectors / temperature
                if dmean is not None:
                    piece += weights.T @ dmean
                queue_gradient[start : start + len(rows)] = piece
    if dneighbor_logits is not None and neighbor_indices.shape[1] > 0:
        slope = dneighbor_logits.to(dtype)  # (N, k)
        gradient += torch.einsum("nk,nkd->nd", slope, queue[neighbor_indices].to(dtype))
        if with_queue:
            products = slope[:, :, None] * vectors.to(dtype)[:, None] / temperature  # (N, k, D)
            queue_gradient.index_add_(0, neighbor_indices.flatten(), products.flatten(0, 1))
    return gradient / temperature, queue_gradient


def soft_contrastive(
    query: Tensor,  # (N, D)
    key: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    rule: LabelRule,
    temperature: float,
    teacher_temperature: float,
    *,
    positive: bool,
    normalize: bool,
    gradient: bool,
    diagnostics: bool,
    excluded: Tensor | None = None,  # (N,)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (N,), dquery (N, D), confidence, entropy, positive_rank (N,), neighbor_indices (N, n).

    What was not asked for, or what the rule does not compute, comes back empty.
    """
    dtype = sum_dtype(query, queue)
    z, t = query.to(dtype), key.to(dtype)
    if normalize:
        z, norm = unit_rows(query, dtype)
        t, _ = unit_rows(key, dtype)
    # Per-row scalars are float64 up to the end: the loss is a difference of larger numbers.
    positive_cosine = row_dot(z, t)  # (N,)

    student = RunningSoftmax(z, with_mean=gradient)
    teacher = RunningSoftmax(t, with_mean=rule.needs_mean)
    nearest = RunningTopk(t, rule.num_neighbors)
    rank = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    lowest = torch.finfo(dtype).min
    for start, rows in pieces(queue, len(z), dtype):
        cosines = z @ rows.T  # (N, piece)
        if diagnostics:
            better = cosines > positive_cosine[:, None]
            fill_excluded(better, excluded, start, False)
            rank += better.sum(1)
        logits = cosines.div_(temperature)
        fill_excluded(logits, excluded, start, lowest)
        student.add(logits, rows)
        if rule.needs_softmax or rule.num_neighbors > 0:
            teacher_logits = (t @ rows.T).div_(teacher_temperature)
            fill_excluded(teacher_logits, excluded, start, lowest)
            nearest.add(teacher_logits, start)
            if rule.needs_softmax:
                teacher.add(teacher_logits, rows)

    neighbor_logits, neighbors = nearest.result()
    confidence = entropy = None
    if rule.needs_softmax:
        entropy = teacher.entropy()
        confidence = confidence_of(entropy, len(queue), excluded)
    # What is left is O(N n D) and subtracts nearly equal means: float64 as the scalars.
    label_mean = t.to(positive_cosine.dtype)
    if rule.needs_softmax or rule.num_neighbors > 0:
        numbers = (confidence, neighbor_logits, queue[neighbors])
        label_mean = label_mean_of(
            rule,
            label_mean,
            teacher.lse(),
            teacher.mean() if rule.needs_mean else None,
            *(None if x is None else x.to(label_mean.dtype) for x in numbers),
        )

    loss, dquery = finish(
        z,
        t,
        norm if normalize else None,
        student.lse(),
        student.mean() if gradient else None,
        label_mean,
        temperature,
        positive,
    )
    empty = loss.new_empty(0)
    dquery = empty if dquery is None else dquery
    return (
        loss,
        dquery,
        confidence.to(dtype) if diagnostics and confidence is not None else empty,
        entropy.to(dtype) if diagnostics and entropy is not None else empty.clone(),
        rank if diagnostics else rank[:0].clone(),
        neighbors if diagnostics else neighbors[:, :0].clone(),
    )


def finish(
    z: Tensor,  # (N, D)
    t: Tensor,  # (N, D)
    norm: Tensor | None,  # (N, 1) of the query that z was made from, or None
    lse: Tensor,  # (N,) of the student's softmax over the queue
    expected: Tensor | None,  # (N, D), its mean; None where no gradient is wanted
    label_mean: Tensor,  # (N, D)
    temperature: float,
    positive: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss (N,) and its gradient in the query (N, D), from what the pass has summed."""
    dtype = z.dtype
    positive_logit = row_dot(z, t) / temperature
    total = torch.logaddexp(lse, positive_logit) if positive else lse
    loss = (total - row_dot(z, label_mean) / temperature).to(dtype)
    if expected is None:
        return loss, None
    if positive:
        expected = expected * torch.exp(lse - total)[:, None]
        expected = expected + t * torch.exp(positive_logit - total)[:, None]
    dquery = (expected - label_mean) / temperature
    if norm is not None:
        dquery = (dquery - z * (z * dquery).sum(1, keepdim=True)) / norm
    return loss, dquery.to(dtype)


def label_mean_of(
    rule: LabelRule,
    t: Tensor,  # (N, D)
    lse: Tensor,  # (N,) of the teacher's softmax, as all that follow
    mean: Tensor | None,  # (N, D)
    confidence: Tensor | None,  # (N,)
    neighbor_logits: Tensor,  # (N, n)
    neighbors: Tensor | Callable[[Tensor | None], Tensor],
) -> Tensor:
    """The label mean ``m`` (N, D) of each rule, as :mod:`softcl.labels` defines it.

    ``neighbors`` are the nearest rows (N, n, D), or a function that adds them: (N, D) for weights
    (N, n), or None for weights of 1.
    """
    n = rule.num_neighbors

    def neighbor_sum(weights: Tensor | None = None) -> Tensor:
        if not isinstance(neighbors, Tensor):
            return neighbors(weights)
        rows = neighbors.to(t.dtype)
        return rows.sum(1) if weights is None else torch.einsum("nk,nkd->nd", weights, rows)

    if rule.name == "hard":
        return t
    if rule.name == "relational":
        return mean
    if rule.name == "mixed":
        w = rule.positive_weight
        return w * t + (1.0 - w) * mean
    if rule.name == "adaptive_soft":
        mass = (confidence * n)[:, None]  # (N, 1), the paper's c K
        shares = torch.exp(neighbor_logits - lse[:, None]).to(t.dtype)  # (N, n)
        # min(1, a q) differs from a q only where a q > 1; those rows are all among the n nearest.
        excess = (1.0 - mass * shares).clamp(max=0.0)
        total = 1.0 + mass + excess.sum(1, keepdim=True)
        return (t + mass * mean + neighbor_sum(excess)) / total
    if rule.name == "adaptive_neighbors":
        c = confidence[:, None]
        return (t + c * neighbor_sum()) / (1.0 + c * n)
    if rule.name == "neighbors":
        return (t + neighbor_sum()) / (1.0 + n)
    raise ValueError(f"rule is not one the reference knows: {rule!r}")


def confidence_of(entropy: Tensor, num_rows: int, excluded: Tensor | None = None) -> Tensor:
    """``clamp(1 - H / log K, 0, 1)``, K the rows that take part; 0 for a queue of one row.

    One row alone says nothing about relations.
    """
    if excluded is None:
        if num_rows == 1:
            return torch.zeros_like(entropy)
        return (1.0 - entropy / math.log(num_rows)).clamp(0.0, 1.0)
    rows = torch.where(excluded < 0, num_rows, num_rows - 1).to(entropy.dtype)
    confidence = (1.0 - entropy / rows.log()).clamp(0.0, 1.0)
    return torch.where(rows > 1, confidence, torch.zeros_like(entropy))


def fill_excluded(
    values: Tensor,  # (N, piece)
    excluded: Tensor | None,  # (N,)
    start: int,
    value: float,
) -> None:
    """Write ``value`` at each row's excluded column, where the piece from ``start`` on has it.

    Excluded logits are the lowest finite number and not -inf: their weight is 0 as soon as any
    other column is seen, and 0 times a finite number stays 0.
    """
    if excluded is None:
        return
    column = (excluded - start)[:, None]
    inside = (column >= 0) & (column < values.shape[1])
    column = column.clamp(0, values.shape[1] - 1)
    kept = values.gather(1, column)
    values.scatter_(1, column, torch.where(inside, torch.full_like(kept, value), kept))


def unit_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms and rounded to their own dtype, and the norms (N, 1).

    The rounding makes ``normalize=True`` equal to a separate normalisation in the same dtype.
    """
    values = rows.to(dtype)
    norm = values.norm(dim=1, keepdim=True).clamp(min=NORM_FLOOR)
    return (values / norm).to(rows.dtype).to(dtype), norm


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows, (N,), summed in float64 where the device has it."""
    return (a * b).sum(1, dtype=scalar_dtype(a))


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def pieces(queue: Tensor, num_rows: int, dtype: torch.dtype):
    """The queue in pieces of bounded work: (first row, rows in the dtype of the sums)."""
    length = max(1, min(len(queue), PIECE_ROWS, PIECE_ELEMENTS // num_rows))
    for start in range(0, len(queue), length):
        yield start, queue[start : start + length].to(dtype)
