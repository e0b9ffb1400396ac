"""Losses against the soft labels of a rule, and the labels' mean alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softcl.distributed.shards import ShardedRows
from softcl.labels import HardLabels, LabelRule, MixedLabels
from softcl.ops import sharded
from softcl.ops.backends import check_backend_name
from softcl.ops.checks import (
    REDUCTIONS,
    all_finite,
    check_constant_rows,
    check_count,
    check_excluded,
    check_filled,
    check_rows,
    check_temperature,
    explain_non_finite,
    shape_of,
    values_are_at_hand,
)
from softcl.ops.compose import LabelMean, compose_label_mean, towards
from softcl.ops.reference import sum_dtype, unit_rows


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
    local = sharded.local_rows(queue, query=query)
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
    least_rows = queue.shape[0] - int(excluded is not None)
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
    check_constant_rows("queue", sharded.local_rows(queue, key=key), key, "key")
    if not isinstance(rule, LabelRule):
        raise TypeError(f"rule must be a label rule of softcl.labels, got {rule!r}")
    check_temperature("teacher_temperature", teacher_temperature)
    if filled is not None:
        check_filled(filled, queue.shape[0])
        queue = queue[:filled]
    check_excluded(excluded, key, queue.shape[0])
    check_count(
        "rule.num_neighbors", rule.num_neighbors, queue.shape[0] - int(excluded is not None)
    )
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
