"""The mathematics that backends share: rows, confidence, label mean, loss, and merging of parts.

    the loss         L  = logaddexp(LSE_s, z.t/tau_s)                  (LSE_s without the positive)
                     g+ = g exp(LSE_s - L) + t exp(z.t/tau_s - L)      (g without the positive)
                     loss = L - z.m/tau_s      dloss/dz = (g+ - m)/tau_s

    parts w of a queue, s_w = exp(lse_w - lse) each one's share of the softmax:
                     lse  = logsumexp_w lse_w
                     mean = sum_w s_w mean_w
                     H    = sum_w s_w (H_w - log s_w)

The label mean ``m`` is the rule's: see :mod:`softcl.labels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from softcl.labels import LabelRule

# Below it a row has no direction: it is divided by this, and gets no gradient.
NORM_FLOOR = 1e-12

# A share of exp(-1e4) is 0 in any dtype, and 0 times this is 0 where 0 times infinity is not.
_NO_SHARE = -1e4

# Elements of one piece of logits: 4 M keeps the temporaries at 16 MB in float32.
PIECE_ELEMENTS = 1 << 22
# Sums within a piece are of the vectors' precision, sums over pieces are float64: a float32 product
# over 4096 rows at once, which BLAS may add one by one, has been seen 1e-5 off.
PIECE_ROWS = 512


# -------------------------------------------------------------------------------------------- rows


def scalar_dtype(tensor: Tensor) -> torch.dtype:
    """Of one number per row: float64 where the device has it."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows, (N,), summed in float64 where the device has it."""
    return (a * b).sum(1, dtype=scalar_dtype(a))


def unit_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms and rounded to their own dtype, and the norms (N, 1).

    The rounding makes ``normalize=True`` equal to a separate normalisation in the same dtype. Rows
    are scaled by their largest entry first, whose square may be beyond the dtype.
    """
    values = rows.to(dtype)
    largest = values.abs().amax(1, keepdim=True)
    scale = torch.where((largest > 0.0) & (largest < math.inf), largest, 1.0)
    scaled = values / scale
    relative = scaled.norm(dim=1, keepdim=True)
    norm = scale * relative
    unit = torch.where(norm > NORM_FLOOR, scaled / relative, values / NORM_FLOOR)
    unit = torch.where(norm.isnan(), norm, unit)
    return unit.to(rows.dtype).to(dtype), norm


def pieces(queue: Tensor, num_rows: int, dtype: torch.dtype):
    """The queue in pieces of bounded work: (first row, rows in the dtype of the sums)."""
    length = max(1, min(len(queue), PIECE_ROWS, PIECE_ELEMENTS // num_rows))
    for start in range(0, len(queue), length):
        yield start, queue[start : start + length].to(dtype)


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


# ------------------------------------------------------------------------------------------ labels


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


def label_mean_of(
    rule: LabelRule,
    t: Tensor,  # (N, D)
    teacher_temperature: float,
    lse: Tensor | None,  # (N,) of the teacher's softmax over the queue, as all that follow
    mean: Tensor | None,  # (N, D)
    confidence: Tensor | None,  # (N,)
    neighbor_logits: Tensor,  # (N, n)
    neighbor_sum: Callable[[Tensor], Tensor],  # weights (N, w) -> their sum of the w nearest rows
) -> Tensor:
    """The label mean m (N, D) of the one formula in :mod:`softcl.labels`."""
    m, total = rule.positive * t, rule.positive
    weights = None
    if rule.needs_softmax:
        c = confidence[:, None]
        weights = rule.neighbor + rule.confident_neighbor * c
    elif rule.neighbor > 0.0:
        weights = torch.full_like(t[:, :1], rule.neighbor)
    if rule.needs_mean:
        mass = rule.mean + rule.confident_mean * c  # a
        total = total + mass
        if rule.teacher_positive is not None:
            own = 0.0
            if rule.teacher_positive == "self":
                own = row_dot(t, t)[:, None] / teacher_temperature
            m = m + mass * torch.sigmoid(own - lse[:, None]) * t
            mass = mass * torch.sigmoid(lse[:, None] - own)  # a r
        m = m + mass * mean
        if rule.clip:
            shares = torch.exp(neighbor_logits[:, : rule.num_weighted] - lse[:, None])  # q, (N, w)
            weights = (rule.positive - mass * shares).clamp(max=0.0)
    if rule.adds_neighbors:
        weights = weights.to(t.dtype).expand(-1, rule.num_weighted)
        m = m + neighbor_sum(weights)
        total = total + weights.sum(1, keepdim=True)
    return m / total


def weighted_sum(queue: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights_nj queue[indices_nj], (N, D), of weights (N, w) and the first w indices."""
    rows = queue[indices[:, : weights.shape[1]]].to(weights.dtype)
    return torch.einsum("nk,nkd->nd", weights, rows)


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
        dquery = dquery.masked_fill(norm <= NORM_FLOOR, 0.0)  # and not that of a NaN
    return loss, dquery.to(dtype)


# ----------------------------------------------------------------------------------------- merging


def merge_sums(
    lse: Tensor,  # (W, N)
    mean: Tensor | None,  # (W, N, D)
    entropy: Tensor | None,  # (W, N)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """lse (N,), mean (N, D) and entropy (N,) of the whole, in float64 where the device has it.

    Differentiable in every part. Each part is scaled by the largest lse, so it holds at any
    temperature.
    """
    dtype = scalar_dtype(lse)
    lse = lse.to(dtype)
    whole = lse.logsumexp(0)
    log_share = (lse - whole).clamp(min=_NO_SHARE)
    share = log_share.exp()  # (W, N)
    if mean is not None:
        mean = (share[:, :, None] * mean.to(dtype)).sum(0)
    if entropy is not None:
        entropy = (share * (entropy.to(dtype) - log_share)).sum(0)
    return whole, mean, entropy


def merge_neighbors(logits: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the candidates (N, M), descending, equal ones by lowest index."""
    indices, order = indices.sort(dim=1)
    logits, by_value = logits.gather(1, order).sort(dim=1, descending=True, stable=True)
    return logits[:, :k], indices.gather(1, by_value)[:, :k]


# ---------------------------------------------------------------------------------------- gradient


def statistics_backward(
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
