"""What follows from the two operators without a kernel of its own, hence in every backend.

Loss and gradient are linear in the label mean m, so a label that no rule of the fused pass makes
can be had from the two halves of that pass:

    teacher's half    queue_statistics of the keys      -> m, whatever makes it
    student's half    the loss with hard labels (m = t) -> loss = hard + z . (t - m) / temperature
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softcl.labels import LabelRule
from softcl.ops import reference


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


@torch.no_grad()
def compose_label_mean(
    rule: LabelRule,
    key: Tensor,  # (N, D) unit rows
    queue: Tensor,  # (K, D)
    teacher_temperature: float,
    *,
    excluded: Tensor | None,
    virtual_logit: bool,
    backend: str,
) -> LabelMean:
    """`label_mean` of arguments that are checked and normalised."""
    dtype = reference.sum_dtype(key, queue)
    t = key.to(dtype)
    if not (rule.needs_softmax or rule.num_neighbors > 0):
        return LabelMean(t, None, None, None)
    lse, mean, entropy, logits, indices = torch.ops.softcl.queue_statistics(
        key, queue, float(teacher_temperature), rule.num_neighbors, rule.needs_softmax, backend,
        excluded,
    )  # fmt: skip
    confidence = None
    if rule.needs_softmax:
        confidence = reference.confidence_of(entropy, queue.shape[0], excluded)
    if virtual_logit:
        # exp(0) is one more summand of the teacher's softmax; its share goes to the positive, and
        # the rows' mean shrinks by it.
        leak = torch.sigmoid(-lse)[:, None]  # 1 / (1 + exp(lse))
        mean = leak * t + (1.0 - leak) * mean
    rows = queue[indices]
    label_mean = reference.label_mean_of(rule, t, lse, mean, confidence, logits, rows)
    return LabelMean(
        label_mean,
        confidence,
        entropy if rule.needs_softmax else None,
        indices if rule.num_neighbors > 0 else None,
    )


def towards(query: Tensor, key: Tensor, label_mean: Tensor, *, normalize: bool) -> Tensor:
    """z . (t - m), (N,): by how much hard labels agree better with the student than labels m do.

    Differentiable in ``query``, through its normalisation where that is asked for.
    """
    dtype = label_mean.dtype
    z, t = query.to(dtype), key.to(dtype)
    if normalize:
        z, _ = reference.unit_rows(query, dtype)
        t, _ = reference.unit_rows(key, dtype)
    return reference.row_dot(z, t - label_mean).to(dtype)
