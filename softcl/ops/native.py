"""What calls into softcl._C have in common: numbers for types and rules, arguments and results.

A kernel gets addresses and sizes; 0 is the address of an empty tensor, and a result that is not
wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcl.labels import RULES, LabelRule

# The values of ElementType in csrc/include/softcl/element_type.h.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Rule name -> value of LabelKind in csrc/include/softcl/labels.h.
LABEL_KINDS = {name: kind for kind, name in enumerate(RULES)}


def addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def statistics_arguments(
    vectors: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    temperature: float,
    num_neighbors: int,
) -> dict[str, int | float]:
    """Inputs of QueueStatisticsParams in csrc/include/softcl/params.h."""
    n, d = vectors.shape
    return dict(
        vectors=vectors.data_ptr(),
        queue=queue.data_ptr(),
        vector_type=ELEMENT_TYPES[vectors.dtype],
        queue_type=ELEMENT_TYPES[queue.dtype],
        num_vectors=n,
        queue_size=len(queue),
        dim=d,
        num_neighbors=num_neighbors,
        temperature=temperature,
    )


def statistics_results(
    vectors: Tensor,  # (N, D)
    num_neighbors: int,
    *,
    sums: bool,
) -> dict[str, Tensor]:
    """Its results, in the order in which a backend returns them; without ``sums`` the first three
    have no rows."""
    (n, d), k = vectors.shape, num_neighbors
    rows = n if sums else 0
    return dict(
        lse=vectors.new_empty((rows,), dtype=torch.float32),
        mean=vectors.new_empty((rows, d), dtype=torch.float32),
        entropy=vectors.new_empty((rows,), dtype=torch.float32),
        neighbor_logits=vectors.new_empty((n, k), dtype=torch.float32),
        neighbor_indices=vectors.new_empty((n, k), dtype=torch.int64),
    )


def loss_arguments(
    query: Tensor,  # (N, D)
    key: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    rule: LabelRule,
    temperature: float,
    teacher_temperature: float,
    *,
    positive: bool,
    normalize: bool,
) -> dict[str, int | float]:
    """Inputs of SoftContrastiveParams in csrc/include/softcl/params.h."""
    n, d = query.shape
    return dict(
        query=query.data_ptr(),
        key=key.data_ptr(),
        queue=queue.data_ptr(),
        vector_type=ELEMENT_TYPES[query.dtype],
        queue_type=ELEMENT_TYPES[queue.dtype],
        num_queries=n,
        queue_size=len(queue),
        dim=d,
        rule=LABEL_KINDS[rule.name],
        num_neighbors=rule.num_neighbors,
        positive_weight=rule.positive_weight,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        positive=positive,
        normalize=normalize,
    )


def loss_results(
    query: Tensor,  # (N, D)
    rule: LabelRule,
    *,
    gradient: bool,
    diagnostics: bool,
) -> dict[str, Tensor]:
    """Its results, in the order in which a backend returns them. What is not asked for, or what the
    rule does not compute, is empty."""
    (n, d), k = query.shape, rule.num_neighbors
    shown = n if diagnostics and rule.needs_softmax else 0
    return dict(
        loss=query.new_empty((n,), dtype=torch.float32),
        dquery=query.new_empty((n, d) if gradient else (0,), dtype=torch.float32),
        confidence=query.new_empty((shown,), dtype=torch.float32),
        entropy=query.new_empty((shown,), dtype=torch.float32),
        positive_rank=query.new_empty((n if diagnostics else 0,), dtype=torch.int64),
        neighbor_indices=query.new_empty((n, k if diagnostics else 0), dtype=torch.int64),
    )
