"""The operator, in two levels: the softmax statistics of a queue, and the losses built on them.

    queue_statistics        log-sum-exp, mean, entropy and nearest rows of a queue, for each vector
    soft_contrastive_loss   cross-entropy against the soft labels of a rule, with its exact gradient
    label_mean              the labels' mean alone, for losses that are no cross-entropy

All visit the queue once, in one of several backends (see :mod:`softcl.ops.backends`), and never
hold an N x K matrix. The arguments are checked here and become one record
(:mod:`softcl.ops.call`), which a backend gets whole.

A queue may be of a type that an operator was registered for with :func:`register_rows`, such as
:class:`softcl.distributed.ShardedRows`, of which each process has a part: then every process calls
with its own vectors and gets their results over the whole queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcl.labels import LabelRule
from softcl.ops import algebra, library
from softcl.ops.backends import (
    BACKENDS,
    FUSED_BACKENDS,
    BackendChoice,
    UnsupportedBackendError,
    check_backend_name,
    choose,
)
from softcl.ops.call import (
    REDUCTIONS,
    LossCall,
    StatisticsCall,
    all_finite,
    check_constant_rows,
    check_count,
    check_excluded,
    check_rows,
    check_rows_like,
    explain_non_finite,
    filled_rows,
    integer_of,
    shape_of,
    sum_dtype,
    temperature_of,
    values_are_at_hand,
)

__all__ = [
    "BACKENDS",
    "FUSED_BACKENDS",
    "REDUCTIONS",
    "BackendChoice",
    "Diagnostics",
    "LabelMean",
    "QueueStatistics",
    "UnsupportedBackendError",
    "choose_backend",
    "label_mean",
    "merge_statistics",
    "queue_statistics",
    "register_rows",
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


class LabelMean(NamedTuple):
    """The label mean of a rule, and what it was made of. None where the rule does not need it.

    Attributes:
        mean: m = sum_j y_j v_j over the positive and the queue, (N, D), constant.
        confidence, entropy: of the teacher's softmax, (N,).
        neighbor_indices: the nearest queue rows that the rule read, (N, n) int64.
    """

    mean: Tensor
    confidence: Tensor | None
    entropy: Tensor | None
    neighbor_indices: Tensor | None


def soft_contrastive_loss(
    query: Tensor,  # (N, D)
    key: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    rule: LabelRule,
    *,
    temperature: float,
    teacher_temperature: float,
    positive: bool = True,
    reduction: str = "mean",
    normalize: bool = False,
    filled: int | None = None,
    excluded: Tensor | None = None,
    diagnostics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Cross-entropy of the student's softmax over the queue against the labels of a rule.

        p    = softmax over [z . t, z . Q_1, .., z . Q_K] / temperature
        y    = labels of the rule, made from softmax_j(t . Q_j / teacher_temperature)
        loss = - sum_j y_j log p_j = L - z . m / temperature,     m = sum_j y_j v_j

    with z the query, t the key (its positive) and L the log of the softmax's denominator. The exact
    gradient (sum_j p_j v_j - m) / temperature is known at the end of the same pass over the queue:
    the backward pass only scales it. There is a forward-mode derivative too, but no second one.

    Args:
        query: (N, D) student rows, unit norm unless ``normalize``; the only input with a gradient.
        key: (N, D) teacher rows, constant. Of another dtype than the query, both are taken in the
            wider one. Several queries may share a key: ``key.repeat(V, 1)``.
        queue: (K, D) past keys of unit norm, constant; float32 or bfloat16, whatever the query's.
        rule: a :class:`softcl.LabelRule`.
        temperature: student's, in [1e-6, 1e6]; a number or a 0-dim tensor, which is read in the
            call (on a GPU the host waits for it). It has no gradient.
        teacher_temperature: teacher's, likewise; read by the rules that use the teacher's softmax.
        positive: the positive takes part in the student's softmax (not so in ReSSL).
        reduction: "mean", "sum" or "none" (one loss per row).
        normalize: query and key are raw projections; they are divided by their norms here, in
            float32 and rounded to their dtype, and the gradient goes through the division. A row of
            norm 1e-12 or less has no direction: its gradient is 0.
        filled: only the first ``filled`` rows of the queue take part, and K is that number;
            None for all. A ring that is still filling has its valid rows first.
        excluded: (N,) int64, for each query a queue row that takes part neither in the student's
            nor in the teacher's softmax, or -1 for none. K is then one less.
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
    elsewhere = operator_of(queue)
    local = queue if elsewhere is None else elsewhere.local_rows(queue, query=query)
    check_constant_rows("queue", local, query, "query")
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have query's shape {shape_of(query)}, got {shape_of(key)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    queue = filled_rows(queue, filled)
    _check_labels(rule, query, queue, excluded, backend)
    if key.dtype != query.dtype:
        dtype = torch.promote_types(key.dtype, query.dtype)
        query, key = query.to(dtype), key.to(dtype)
    call = LossCall(
        query,
        key,
        queue,
        rule,
        temperature_of("temperature", temperature),
        temperature_of("teacher_temperature", teacher_temperature),
        bool(positive),
        bool(normalize),
        excluded,
        (query.requires_grad and torch.is_grad_enabled()) or _forward_mode(),
        bool(diagnostics),
        backend,
    )
    loss, dquery, *shown = (library if elsewhere is None else elsewhere).run(call)
    # Of unit rows the gradient is finite where the loss is.
    checked = (loss,) if normalize else (loss, dquery)
    if values_are_at_hand(loss) and not all_finite(*checked):
        rows = queue if elsewhere is None else queue.local
        explain_non_finite(query=query, key=key, queue=rows)
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    if not diagnostics:
        return loss
    return loss, Diagnostics(*_shown(rule, *shown))


def queue_statistics(
    vectors: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
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
        temperature: in [1e-6, 1e6], divides the cosines; a number or a 0-dim tensor.
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
    elsewhere = operator_of(queue)
    local = queue if elsewhere is None else elsewhere.local_rows(queue, vectors=vectors)
    check_rows_like("queue", local, vectors, "vectors")
    check_excluded(excluded, vectors, queue.shape[0])
    k = integer_of("num_neighbors", num_neighbors)
    check_count("num_neighbors", k, queue.shape[0] - int(excluded is not None))
    check_backend_name(backend)
    temperature = temperature_of("temperature", temperature)
    call = StatisticsCall(vectors, queue, temperature, k, bool(sums), excluded, backend)
    statistics = QueueStatistics(*(library if elsewhere is None else elsewhere).run(call))
    shown = statistics.lse if sums else statistics.neighbor_logits
    if values_are_at_hand(shown) and not all_finite(shown):
        explain_non_finite(vectors=vectors, queue=local)
    return statistics


@torch.no_grad()
def label_mean(
    rule: LabelRule,
    key: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    *,
    teacher_temperature: float,
    normalize: bool = False,
    filled: int | None = None,
    excluded: Tensor | None = None,
    backend: str = "auto",
) -> LabelMean:
    """The label mean m = sum_j y_j v_j of a rule over the positive (the key) and the queue.

    A linear loss, such as BYOL's 2 - 2 z . v with the labels' candidates v, needs no more than m:
    sum_j y_j (2 - 2 z . v_j) = 2 - 2 z . m. The arguments are those of
    :func:`soft_contrastive_loss`, and so are the errors. No gradient is recorded.
    """
    check_rows("key", key)
    elsewhere = operator_of(queue)
    local = queue if elsewhere is None else elsewhere.local_rows(queue, key=key)
    check_constant_rows("queue", local, key, "key")
    queue = filled_rows(queue, filled)
    _check_labels(rule, key, queue, excluded, backend)
    teacher_temperature = temperature_of("teacher_temperature", teacher_temperature)
    if isinstance(teacher_temperature, Tensor):  # read here, under its own name
        teacher_temperature = temperature_of("teacher_temperature", teacher_temperature.item())
    dtype = sum_dtype(key, local)
    if normalize:
        key = algebra.unit_rows(key, dtype)[0].to(key.dtype)
    t, n = key.to(dtype), rule.num_neighbors
    if not rule.needs_softmax and n == 0:
        return LabelMean(t, None, None, None)
    found = queue_statistics(
        key, queue, teacher_temperature, num_neighbors=n, excluded=excluded,
        sums=rule.needs_softmax, backend=backend,
    )  # fmt: skip
    confidence = None
    if rule.needs_softmax:
        confidence = algebra.confidence_of(found.entropy, len(queue), excluded)
    weighted_sum = algebra.weighted_sum if elsewhere is None else elsewhere.weighted_sum
    mean = algebra.label_mean_of(
        rule, t, teacher_temperature, found.lse, found.mean, confidence,
        found.neighbor_logits,
        lambda weights: weighted_sum(queue, found.neighbor_indices, weights),
    )  # fmt: skip
    confidence, entropy, _, indices = _shown(
        rule, confidence, found.entropy, None, found.neighbor_indices
    )
    return LabelMean(mean, confidence, entropy, indices)


def choose_backend(
    query: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    *,
    rule: LabelRule | None = None,
    temperature: float = 0.1,
    teacher_temperature: float = 0.05,
    num_neighbors: int = 0,
    excluded: Tensor | None = None,
    backend: str = "auto",
) -> BackendChoice:
    """Which backend a call with these inputs runs, and why not the ones before it.

    With a ``rule`` this speaks of :func:`soft_contrastive_loss`, otherwise of
    :func:`queue_statistics` with ``num_neighbors``.

    Raises:
        ValueError: ``backend`` is the name of none.
        UnsupportedBackendError: the backend asked for cannot run such a call.
    """
    if rule is None:
        return choose(
            StatisticsCall(query, queue, temperature, num_neighbors, True, excluded, backend)
        )
    return choose(
        LossCall(
            query, query, queue, rule, temperature, teacher_temperature, True, True, excluded,
            True, True, backend,
        )
    )  # fmt: skip


def merge_statistics(
    parts: Sequence[QueueStatistics], *, num_neighbors: int | None = None
) -> QueueStatistics:
    """The statistics of a queue from those of its parts, for the same vectors; differentiable.

    Args:
        parts: of each part of the queue, with ``neighbor_indices`` of the whole (add the place of
            the part's first row, for one).
        num_neighbors: k, None for the longest of the parts' lists. The k nearest rows are right
            where each part's list holds its k nearest, or all its rows.

    Raises:
        TypeError, ValueError: there is no part, or num_neighbors is unusable.
    """
    if not parts:
        raise ValueError("parts must not be empty")
    sums = (torch.stack([part[place] for part in parts]) for place in range(3))
    dtype, lengths = parts[0].lse.dtype, [part.neighbor_indices.shape[1] for part in parts]
    k = max(lengths)
    if num_neighbors is not None:
        k = integer_of("num_neighbors", num_neighbors)
        if not 0 <= k <= sum(lengths):
            raise ValueError(
                f"num_neighbors must be between 0 and the parts' {sum(lengths)} together, got {k}"
            )
    lists = (torch.cat([part[place] for part in parts], 1) for place in (3, 4))
    merged = (x.to(dtype) for x in algebra.merge_sums(*sums))
    return QueueStatistics(*merged, *algebra.merge_neighbors(*lists, k))


_OPERATORS: dict[type, ModuleType] = {}


def register_rows(kind: type, operator: ModuleType) -> None:
    """Let queues be of type ``kind``, with ``shape``, ``len`` and ``[:filled]`` as a tensor has.

    ``operator`` has local_rows(queue, **vectors), the rows that are checked and whose dtype and
    device are the queue's; run(call), which returns the results of a call with such a queue; and
    weighted_sum(queue, indices, weights).
    """
    _OPERATORS[kind] = operator


def operator_of(queue: Any) -> ModuleType | None:
    """What runs calls with such a queue; None for a tensor, and for what is none of either."""
    return None if isinstance(queue, Tensor) else _OPERATORS.get(type(queue))


def _check_labels(
    rule: LabelRule, rows: Tensor, queue: Any, excluded: Tensor | None, backend: str
) -> None:
    if not isinstance(rule, LabelRule):
        raise TypeError(f"rule must be a softcl.LabelRule, got {rule!r}")
    check_excluded(excluded, rows, queue.shape[0])
    limit = queue.shape[0] - int(excluded is not None)
    check_count("rule.num_neighbors", rule.num_neighbors, limit)
    check_backend_name(backend)


def _shown(
    rule: LabelRule,
    confidence: Tensor | None,
    entropy: Tensor | None,
    positive_rank: Tensor | None,
    neighbor_indices: Tensor,
) -> tuple[Tensor | None, ...]:
    """All of it, None where the rule does not need it."""
    return (
        confidence if rule.needs_softmax else None,
        entropy if rule.needs_softmax else None,
        positive_rank,
        neighbor_indices if rule.num_neighbors > 0 else None,
    )


def _forward_mode() -> bool:
    """Within a level of dual numbers (torch.func.jvp, torch.autograd.forward_ad)."""
    return torch.autograd.forward_ad._current_level >= 0
