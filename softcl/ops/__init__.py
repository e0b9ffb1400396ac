"""The operator, in two levels: the softmax statistics of a queue, and the losses built on them.

    queue_statistics        log-sum-exp, mean, entropy and nearest rows of a queue, for each vector
    soft_contrastive_loss   cross-entropy against the soft labels of a rule, with its exact gradient
    label_mean              the labels' mean alone, for losses that are no cross-entropy

All visit the queue once, in one of several backends (see :mod:`softcl.ops.backends`), and never
hold an N x K matrix. The arguments are checked before a backend sees them. A queue
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

from collections.abc import Iterable

from torch import Tensor

from softcl.labels import LabelRule
from softcl.ops import library as _library  # noqa: F401  (registers torch.ops.softcl)
from softcl.ops.backends import (
    BACKENDS,
    FUSED_BACKENDS,
    BackendChoice,
    Call,
    UnsupportedBackendError,
    choose,
    options_of,
)
from softcl.ops.checks import REDUCTIONS
from softcl.ops.compose import LabelMean
from softcl.ops.losses import Diagnostics, label_mean, soft_contrastive_loss
from softcl.ops.statistics import QueueStatistics, merge_statistics, queue_statistics

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
