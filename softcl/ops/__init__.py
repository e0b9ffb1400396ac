"""The operator, in two levels: the softmax statistics of a queue, and the losses built on them.

    queue_statistics        log-sum-exp, mean, entropy and nearest rows of a queue, for each vector
    soft_contrastive_loss   cross-entropy against the soft labels of a rule, with its exact gradient
    label_mean              the labels' mean alone, for losses that are no cross-entropy

All visit the queue once, in one of several backends (see :mod:`softcl.ops.backends`), and never
hold an N x K matrix. The arguments are checked here; a backend may rely on them. A queue
may also be :class:`softcl.distributed.ShardedRows`, of which each process has a part: then every
process calls with its own vectors and gets their results over the whole queue.

Options, and which backends have them:

    positive, normalize, filled          every backend
    queries_per_key, label_sum           every backend: keys repeated, losses scaled
    virtual_logit                        every backend: each half of the pass in a call
    gradient to the queue (statistics)   every backend: one more pass in PyTorch, in pieces
    excluded                             those with it in their ``OPTIONS``: `options_of(name)`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softcl.distributed.shards import ShardedRows
from softcl.labels import HardLabels, LabelRule, MixedLabels
from softcl.ops import library as _library  # noqa: F401  (registers torch.ops.softcl)
from softcl.ops import sharded
from softcl.ops.backends import (
    BACKENDS,
    FUSED_BACKENDS,
    BackendChoice,
    Call,
    UnsupportedBackendError,
    check_backend_name,
    choose,
    options_of,
)
from softcl.ops.checks import (
    REDUCTIONS,
    all_finite,
    check_constant_rows,
    check_count,
    check_excluded,
    check_filled,
    check_rows,
    check_rows_like,
    check_temperature,
    explain_non_finite,
    shape_of,
    values_are_at_hand,
)
from softcl.ops.compose import LabelMean, compose_label_mean, towards
from softcl.ops.merge import merge_neighbors, merge_sums
from softcl.ops.reference import sum_dtype, unit_rows

__all__ = [
    "BACKENDS",
    "FUSED_BACKENDS",
    "BackendChoice",
    "Diagnostics",
    "LabelMean",
    "QueueStatistics",
    "REDUCTIONS",
    "UnsupportedBackendError",
    "choose_backend",
    "label_mean",
    "merge_statistics",
    "options_of",
    "queue_statistics",
    "soft_contrastive_loss",
]


class QueueStatistics(NamedTuple):
    """Softmax statistics of a queue, per vector. x_j = v . Q_j / temperature, p = softmax(x).

    Attributes:
        lse: log sum_j exp(x_j), (N,).
        mean: sum_j p_j Q_j, (N, D).
        entropy: - sum_j p_j log p_j in nats, (N,).
        neighbor_logits: the k largest x_j, descending, (N, k). Cosine / temperature.
        neighbor_indices: their queue rows, (N, k) int64; equal logits by lowest row.

    Floating results are float32, or float64 if an input is. Statistics over disjoint parts of a
    queue determine those of the whole: see :func:`merge_statistics`.
    """

    lse: Tensor
    mean: Tensor
    entropy: Tensor
    neighbor_logits: Tensor
    neighbor_indices: Tensor


class Diagnostics(NamedTuple):
    """What the pass over the queue knows besides the loss. None where the rule does not need it.

    Attributes:
        confidence: clamp(1 - H / log K, 0, 1) of the teacher's softmax, (N,).
        entropy: H, in nats, (N,).
        positive_rank: how many queue rows are more similar to the query than its positive, (N,)
            int64; 0 is a top-1 hit of instance discrimination. None for losses without a softmax.
        neighbor_indices: the teacher's nearest queue rows that the rule read, (N, n) int64.
    """

    confidence: Tensor | None
    entropy: Tensor | None
    positive_rank: Tensor | None
    neighbor_indices: Tensor | None


def queue_statistics(
    vectors: Tensor,  # (N, D)
    queue: Tensor | ShardedRows,  # (K, D)
    temperature: float,
    *,
    num_neighbors: int = 0,
    excluded: Tensor | None = None,
    sums: bool = True,
    backend: str = "auto",
) -> QueueStatistics:
    """Softmax statistics of every vector over a queue, and its nearest rows, in one pass.

        x_j = v . Q_j / temperature       p = softmax_j(x)
        lse = log sum_j exp(x_j)     mean = sum_j p_j Q_j     entropy = - sum_j p_j log p_j

    This is attention with keys = values = queue that also returns its normaliser, its entropy and
    an exact top-k. It is differentiable in ``vectors``: ``lse`` and ``neighbor_logits`` at no extra
    pass, ``mean`` and ``entropy`` with one more. Where ``queue`` requires grad (the other vectors
    of a batch), it is differentiable in it too, with one more pass.

    Args:
        vectors: (N, D) rows of unit norm; float32, bfloat16, float16 or float64.
        queue: (K, D) rows of unit norm; its dtype may differ from the vectors'.
        temperature: > 0, divides the cosines.
        num_neighbors: k, 0 <= k <= K.
        excluded: (N,) int64, for each vector a queue row that takes no part in its statistics
            (its own, where the queue is the batch), or -1 for none. K is then one less.
        sums: False searches neighbours alone, at less than half the work; ``lse``, ``mean`` and
            ``entropy`` then have no rows.
        backend: "auto" or the name of one backend, which then runs or raises.

    Returns:
        :class:`QueueStatistics`.

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value.
        UnsupportedBackendError: the backend asked for cannot run this call.
    """
    check_rows("vectors", vectors)
    local = _local_rows(queue, vectors=vectors)
    check_rows_like("queue", local, vectors, "vectors")
    check_temperature("temperature", temperature)
    check_excluded(excluded, vectors, queue.shape[0])
    check_count("num_neighbors", num_neighbors, queue.shape[0] - (excluded is not None))
    check_backend_name(backend)
    if isinstance(queue, ShardedRows):
        found = sharded.queue_statistics(
            vectors, queue, float(temperature), num_neighbors, sums=bool(sums), backend=backend,
            excluded=excluded,
        )  # fmt: skip
    else:
        found = torch.ops.softcl.queue_statistics(
            vectors, queue, float(temperature), num_neighbors, bool(sums), backend, excluded
        )
    statistics = QueueStatistics(*found)
    shown = statistics.lse if sums else statistics.neighbor_logits
    if values_are_at_hand(shown) and not all_finite(shown):
        explain_non_finite(vectors=vectors, queue=local)
    return statistics


def _local_rows(queue: Tensor | ShardedRows, **vectors: Tensor) -> Tensor:
    """The queue, or this process's part of it; processes with batches of other lengths are told."""
    if not isinstance(queue, ShardedRows):
        return queue
    for name, rows in vectors.items():
        queue.world.check_rows(name, rows.shape[0])
    return queue.local


def merge_statistics(
    parts: Sequence[QueueStatistics], *, num_neighbors: int | None = None
) -> QueueStatistics:
    """The statistics of a queue from those of its parts, for the same vectors; differentiable.

    Args:
        parts: of each part of the queue, with ``neighbor_indices`` of the whole (add the place of
            the part's first row, for one).
        num_neighbors: k, None for the longest of the parts' lists. The k nearest rows are right
            where each part's list holds its k nearest, or all its rows.
    """
    sums = (torch.stack([part[place] for part in parts]) for place in range(3))
    dtype, k = parts[0].lse.dtype, num_neighbors
    k = max(part.neighbor_indices.shape[1] for part in parts) if k is None else k
    lists = (torch.cat([part[place] for part in parts], 1) for place in (3, 4))
    merged = (x.to(dtype) for x in merge_sums(*sums))
    return QueueStatistics(*merged, *merge_neighbors(*lists, k))


def soft_contrastive_loss(
    query: Tensor,  # (N, D)
    key: Tensor,  # (N, D), or (N / queries_per_key, D)
    queue: Tensor | ShardedRows,  # (K, D)
    rule: LabelRule,
    *,
    temperature: float,
    teacher_temperature: float,
    positive: bool = True,
    reduction: str = "mean",
    normalize: bool = False,
    filled: int | None = None,
    excluded: Tensor | None = None,
    queries_per_key: int = 1,
    virtual_logit: bool = False,
    label_sum: float | Tensor = 1.0,
    diagnostics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Cross-entropy of the student's softmax over the queue against the labels of a rule.

        p    = softmax over [z . t, z . Q_1, .., z . Q_K] / temperature
        y    = labels of the rule, made from softmax_j(t . Q_j / teacher_temperature)
        loss = - sum_j y_j log p_j = L - z . m / temperature,     m = sum_j y_j v_j

    with z the query, t the key (its positive) and L the log of the softmax's denominator. The exact
    gradient (sum_j p_j v_j - m) / temperature is known at the end of the same pass over the queue:
    the backward pass only scales it.

    Args:
        query: (N, D) student rows, unit norm unless ``normalize``; the only input with a gradient.
        key: (N, D) teacher rows in the query's dtype, constant.
        queue: (K, D) past keys of unit norm, constant; float32 or bfloat16, whatever the query's.
        rule: one of :mod:`softcl.labels`.
        temperature: student's, > 0.
        teacher_temperature: teacher's, > 0; read by the rules that use the teacher's softmax.
        positive: the positive takes part in the student's softmax (not so in ReSSL).
        reduction: "mean", "sum" or "none" (one loss per row).
        normalize: query and key are raw projections; they are divided by their norms here, in
            float32 and rounded to their dtype, and the gradient goes through the division.
        filled: only the first ``filled`` rows of the queue take part, and K is that number;
            None for all. A ring that is still filling has its valid rows first.
        excluded: (N,) int64, for each query a queue row that takes part neither in the student's
            nor in the teacher's softmax, or -1 for none. K is then one less.
        queries_per_key: V queries share a key: query i has the key i mod (N / V), as when the
            crops of a batch are stacked (multi-crop).
        virtual_logit: the teacher's softmax has one more entry of logit 0, whose share goes to the
            positive (the released code of SCE); for :class:`MixedLabels` alone.
        label_sum: what the labels of a row sum to, a number or (N,); scales its loss.
        diagnostics: also return :class:`Diagnostics`.
        backend: "auto" or the name of one backend, which then runs or raises.

    Returns:
        The loss, float32 (float64 if an input is): a scalar, or (N,) for reduction "none".
        With ``diagnostics``, the pair (loss, :class:`Diagnostics`).

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value. Rows
            that are not finite are reported on the CPU; on a GPU, where reading them back would
            stall the step, they give a loss of NaN.
        UnsupportedBackendError: the backend asked for cannot run this call.

    Sources: methods and formulas are cited at each rule in :mod:`softcl.labels`.
    """
    check_rows("query", query)
    check_constant_rows("key", key, query, "query")
    local = _local_rows(queue, query=query)
    check_constant_rows("queue", local, query, "query")
    check_count("queries_per_key", queries_per_key, query.shape[0], least=1, what="queries")
    if key.shape[0] * queries_per_key != query.shape[0]:
        per_key = f" with {queries_per_key} queries per key" if queries_per_key > 1 else ""
        raise ValueError(
            f"key must have query's shape {shape_of(query)}{per_key}, got {shape_of(key)}"
        )
    if key.dtype != query.dtype:
        raise TypeError(f"key must have query's dtype {query.dtype}, got {key.dtype}")
    if not isinstance(rule, LabelRule):
        raise TypeError(f"rule must be a label rule of softcl.labels, got {rule!r}")
    check_temperature("temperature", temperature)
    check_temperature("teacher_temperature", teacher_temperature)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if filled is not None:
        check_filled(filled, queue.shape[0])
        queue = queue[:filled]
    check_excluded(excluded, query, queue.shape[0])
    least_rows = queue.shape[0] - (excluded is not None)
    check_count("rule.num_neighbors", rule.num_neighbors, least_rows)
    if virtual_logit and not isinstance(rule, MixedLabels):
        raise ValueError(f"virtual_logit needs MixedLabels, got {rule!r}")
    check_backend_name(backend)
    if isinstance(queue, ShardedRows):
        loss, *shown = sharded.soft_contrastive(
            query, key, queue, rule, float(temperature), float(teacher_temperature),
            positive=positive, normalize=normalize, diagnostics=diagnostics,
            queries_per_key=queries_per_key, virtual_logit=virtual_logit, backend=backend,
            excluded=excluded,
        )  # fmt: skip
        if values_are_at_hand(loss) and not all_finite(loss):
            explain_non_finite(query=query, key=key, queue=queue.local)
        loss = _reduced(loss, label_sum, reduction)
        return (loss, Diagnostics(*shown)) if diagnostics else loss
    if queries_per_key > 1:
        key = key.repeat(queries_per_key, 1)

    in_pass = HardLabels() if virtual_logit else rule
    loss, _, *extra = torch.ops.softcl.soft_contrastive(
        query,
        key,
        queue,
        in_pass.name,
        in_pass.num_neighbors,
        float(in_pass.positive_weight),
        float(temperature),
        float(teacher_temperature),
        bool(positive),
        bool(normalize),
        query.requires_grad and torch.is_grad_enabled(),
        bool(diagnostics),
        backend,
        excluded,
    )
    confidence, entropy, positive_rank, neighbor_indices = extra
    if virtual_logit:
        labels = label_mean(
            rule, key, queue, teacher_temperature=teacher_temperature, normalize=normalize,
            excluded=excluded, virtual_logit=True, backend=backend,
        )  # fmt: skip
        loss = loss + towards(query, key, labels.mean, normalize=normalize) / temperature
        confidence, entropy = labels.confidence, labels.entropy
    if values_are_at_hand(loss) and not all_finite(loss):
        explain_non_finite(query=query, key=key, queue=queue)
    loss = _reduced(loss, label_sum, reduction)
    if not diagnostics:
        return loss
    return loss, Diagnostics(
        confidence if rule.needs_softmax else None,
        entropy if rule.needs_softmax else None,
        positive_rank,
        neighbor_indices if rule.num_neighbors > 0 else None,
    )


def _reduced(loss: Tensor, label_sum: float | Tensor, reduction: str) -> Tensor:
    if isinstance(label_sum, Tensor) or label_sum != 1.0:
        loss = loss * label_sum
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def label_mean(
    rule: LabelRule,
    key: Tensor,  # (N, D)
    queue: Tensor | ShardedRows,  # (K, D)
    *,
    teacher_temperature: float,
    normalize: bool = False,
    filled: int | None = None,
    excluded: Tensor | None = None,
    virtual_logit: bool = False,
    backend: str = "auto",
) -> LabelMean:
    """The label mean m = sum_j y_j v_j of a rule over the positive (the key) and the queue.

    A linear loss, such as BYOL's 2 - 2 z . v with the labels' candidates v, needs no more than m:
    sum_j y_j (2 - 2 z . v_j) = 2 - 2 z . m. The arguments are those of
    :func:`soft_contrastive_loss`, and so are the errors. No gradient is recorded.
    """
    check_rows("key", key)
    check_constant_rows("queue", _local_rows(queue, key=key), key, "key")
    if not isinstance(rule, LabelRule):
        raise TypeError(f"rule must be a label rule of softcl.labels, got {rule!r}")
    check_temperature("teacher_temperature", teacher_temperature)
    if filled is not None:
        check_filled(filled, queue.shape[0])
        queue = queue[:filled]
    check_excluded(excluded, key, queue.shape[0])
    check_count("rule.num_neighbors", rule.num_neighbors, queue.shape[0] - (excluded is not None))
    check_backend_name(backend)
    key = key.detach()
    if isinstance(queue, ShardedRows):
        return LabelMean(
            *sharded.label_mean(
                rule, key, queue, float(teacher_temperature),
                normalize=normalize, virtual_logit=virtual_logit, backend=backend,
                excluded=excluded,
            )
        )  # fmt: skip
    if normalize:
        key = unit_rows(key, sum_dtype(key, queue))[0].to(key.dtype)
    return compose_label_mean(
        rule, key, queue, teacher_temperature,
        excluded=excluded, virtual_logit=virtual_logit, backend=backend,
    )  # fmt: skip


def choose_backend(
    vectors: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    *,
    rule: LabelRule | None = None,
    temperature: float = 0.1,
    teacher_temperature: float = 0.05,
    num_neighbors: int = 0,
    options: Iterable[str] = (),
    backend: str = "auto",
) -> BackendChoice:
    """Which backend a call with these inputs runs, and why not the ones before it.

    With a ``rule`` this speaks of :func:`soft_contrastive_loss`, otherwise of
    :func:`queue_statistics` with ``num_neighbors``. ``options`` names those that not every backend
    has ("excluded").

    Raises:
        ValueError, UnsupportedBackendError: as the call itself would.
    """
    if rule is None:
        call = Call.of_statistics(vectors, queue, temperature, num_neighbors, frozenset(options))
    else:
        call = Call.of_loss(
            vectors, queue, rule, temperature, teacher_temperature, frozenset(options)
        )
    return choose(call, backend)
