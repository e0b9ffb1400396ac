"""The softmax statistics of a queue, for each vector, and what merges those of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softcl.distributed.shards import ShardedRows
from softcl.ops import sharded
from softcl.ops.backends import check_backend_name
from softcl.ops.checks import (
    all_finite,
    check_count,
    check_excluded,
    check_rows,
    check_rows_like,
    check_temperature,
    explain_non_finite,
    values_are_at_hand,
)
from softcl.ops.merge import merge_neighbors, merge_sums


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
    local = sharded.local_rows(queue, vectors=vectors)
    check_rows_like("queue", local, vectors, "vectors")
    check_temperature("temperature", temperature)
    check_excluded(excluded, vectors, queue.shape[0])
    check_count("num_neighbors", num_neighbors, queue.shape[0] - int(excluded is not None))
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
