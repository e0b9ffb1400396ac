"""The operator, in two levels: the softmax statistics of a queue, and the losses built on them.

    queue_statistics        log-sum-exp, mean, entropy and nearest rows of a queue, for each vector
    soft_contrastive_loss   cross-entropy against the soft labels of a rule, with its exact gradient

Both visit the queue once, in one of several backends (see :mod:`softcl.ops.backends`), and never
hold an N x K matrix. The arguments are checked here; a backend may rely on them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from softcl.labels import LabelRule
from softcl.ops import library as _library  # noqa: F401  (registers torch.ops.softcl)
from softcl.ops.backends import (
    BACKENDS,
    FUSED_BACKENDS,
    BackendChoice,
    Call,
    UnsupportedBackendError,
    check_backend_name,
    choose,
)

__all__ = [
    "BACKENDS",
    "FUSED_BACKENDS",
    "BackendChoice",
    "Diagnostics",
    "QueueStatistics",
    "UnsupportedBackendError",
    "choose_backend",
    "queue_statistics",
    "soft_contrastive_loss",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


class QueueStatistics(NamedTuple):
    """Softmax statistics of a queue, per vector. x_j = v . Q_j / temperature, p = softmax(x).

    Attributes:
        lse: log sum_j exp(x_j), (N,).
        mean: sum_j p_j Q_j, (N, D).
        entropy: - sum_j p_j log p_j in nats, (N,).
        neighbor_logits: the k largest x_j, descending, (N, k). Cosine / temperature.
        neighbor_indices: their queue rows, (N, k) int64; equal logits by lowest row.

    Floating results are float32, or float64 if an input is. Statistics over disjoint parts of a
    queue determine those of the whole: ``lse`` by logaddexp, ``mean`` and ``lse - entropy``
    (the expected logit) as averages weighted by each part's share exp(lse_part - lse).
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
            int64; 0 is a top-1 hit of instance discrimination.
        neighbor_indices: the teacher's nearest queue rows that the rule read, (N, n) int64.
    """

    confidence: Tensor | None
    entropy: Tensor | None
    positive_rank: Tensor
    neighbor_indices: Tensor | None


def queue_statistics(
    vectors: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    temperature: float,
    *,
    num_neighbors: int = 0,
    sums: bool = True,
    backend: str = "auto",
) -> QueueStatistics:
    """Softmax statistics of every vector over a queue, and its nearest rows, in one pass.

        x_j = v . Q_j / temperature       p = softmax_j(x)
        lse = log sum_j exp(x_j)     mean = sum_j p_j Q_j     entropy = - sum_j p_j log p_j

    This is attention with keys = values = queue that also returns its normaliser, its entropy and
    an exact top-k. It is differentiable in ``vectors``: ``lse`` and ``neighbor_logits`` at no extra
    pass, ``mean`` and ``entropy`` with one more.

    Args:
        vectors: (N, D) rows of unit norm; float32, bfloat16, float16 or float64.
        queue: (K, D) rows of unit norm, constant; its dtype may differ from the vectors'.
        temperature: > 0, divides the cosines.
        num_neighbors: k, 0 <= k <= K.
        sums: False searches neighbours alone, at less than half the work; ``lse``, ``mean`` and
            ``entropy`` then have no rows.
        backend: "auto" or the name of one backend, which then runs or raises.

    Returns:
        :class:`QueueStatistics`.

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value.
        UnsupportedBackendError: the backend asked for cannot run this call.
    """
    _check_rows("vectors", vectors)
    _check_constant_rows("queue", queue, vectors, "vectors")
    _check_temperature("temperature", temperature)
    _check_count("num_neighbors", num_neighbors, queue.shape[0])
    check_backend_name(backend)
    statistics = QueueStatistics(
        *torch.ops.softcl.queue_statistics(
            vectors, queue, float(temperature), num_neighbors, bool(sums), backend
        )
    )
    shown = statistics.lse if sums else statistics.neighbor_logits
    if _values_are_at_hand(shown) and not _all_finite(shown):
        _explain_non_finite(vectors=vectors, queue=queue)
    return statistics


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
    _check_rows("query", query)
    _check_constant_rows("key", key, query, "query")
    _check_constant_rows("queue", queue, query, "query")
    if key.shape != query.shape:
        raise ValueError(f"key must have query's shape {_shape(query)}, got {_shape(key)}")
    if key.dtype != query.dtype:
        raise TypeError(f"key must have query's dtype {query.dtype}, got {key.dtype}")
    if not isinstance(rule, LabelRule):
        raise TypeError(f"rule must be a label rule of softcl.labels, got {rule!r}")
    _check_temperature("temperature", temperature)
    _check_temperature("teacher_temperature", teacher_temperature)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if filled is not None:
        _check_filled(filled, queue.shape[0])
        queue = queue[:filled]
    _check_count("rule.num_neighbors", rule.num_neighbors, queue.shape[0])
    check_backend_name(backend)

    loss, _, *extra = torch.ops.softcl.soft_contrastive(
        query,
        key,
        queue,
        rule.name,
        rule.num_neighbors,
        float(rule.positive_weight),
        float(temperature),
        float(teacher_temperature),
        bool(positive),
        bool(normalize),
        query.requires_grad and torch.is_grad_enabled(),
        bool(diagnostics),
        backend,
    )
    if _values_are_at_hand(loss) and not _all_finite(loss):
        _explain_non_finite(query=query, key=key, queue=queue)
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    if not diagnostics:
        return loss
    confidence, entropy, positive_rank, neighbor_indices = extra
    return loss, Diagnostics(
        confidence if rule.needs_softmax else None,
        entropy if rule.needs_softmax else None,
        positive_rank,
        neighbor_indices if rule.num_neighbors > 0 else None,
    )


def choose_backend(
    vectors: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    *,
    rule: LabelRule | None = None,
    temperature: float = 0.1,
    teacher_temperature: float = 0.05,
    num_neighbors: int = 0,
    backend: str = "auto",
) -> BackendChoice:
    """Which backend a call with these inputs runs, and why not the ones before it.

    With a ``rule`` this speaks of :func:`soft_contrastive_loss`, otherwise of
    :func:`queue_statistics` with ``num_neighbors``.

    Raises:
        ValueError, UnsupportedBackendError: as the call itself would.
    """
    if rule is None:
        call = Call.of_statistics(vectors, queue, temperature, num_neighbors)
    else:
        call = Call.of_loss(vectors, queue, rule, temperature, teacher_temperature)
    return choose(call, backend)


# ------------------------------------------------------------------------------------------ checks


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_rows(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be a matrix of row vectors, got shape {_shape(tensor)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor, got dtype {tensor.dtype}")
    if tensor.shape[0] < 1 or tensor.shape[1] < 1:
        raise ValueError(f"{name} must not be empty, got shape {_shape(tensor)}")


def _check_constant_rows(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    _check_rows(name, tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but only {like_name} has a gradient here: the labels and the "
            f"softmax treat {name} as constant; pass {name}.detach()"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but {like_name} is on {like.device}")
    if tensor.shape[1] != like.shape[1]:
        raise ValueError(
            f"{name} must have {like_name}'s dimension D={like.shape[1]}, "
            f"got shape {_shape(tensor)}"
        )


def _check_temperature(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (value > 0.0 and value < math.inf):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _check_count(name: str, value: int, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0 or value > limit:
        raise ValueError(f"{name} must be between 0 and the queue's {limit} rows, got {value}")


def _check_filled(filled: int, limit: int) -> None:
    if isinstance(filled, bool) or not isinstance(filled, int):
        raise TypeError(f"filled must be an integer or None, got {filled!r}")
    if filled < 1 or filled > limit:
        raise ValueError(f"filled must be between 1 and the queue's {limit} rows, got {filled}")


def _values_are_at_hand(tensor: Tensor) -> bool:
    # A fake or traced tensor has no values, and a GPU's would have to be waited for.
    if torch.compiler.is_compiling():
        return False
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _explain_non_finite(**tensors: Tensor) -> None:
    """Raise with the argument, and its first row, that made a result NaN or infinite."""
    for name, tensor in tensors.items():
        bad = (~torch.isfinite(tensor.detach()).all(1)).nonzero()
        if len(bad) > 0:
            raise ValueError(
                f"{name} has {len(bad)} row(s) that are not finite, the first is row {int(bad[0])}"
            )
    norms = {name: float(x.detach().double().norm(dim=1).max()) for name, x in tensors.items()}
    largest = max(norms, key=norms.get)
    raise ValueError(
        f"the result is not finite although every input is: {largest} has a row of norm "
        f"{norms[largest]:.3g}, and rows must have unit norm"
    )
