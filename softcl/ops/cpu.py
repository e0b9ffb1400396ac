"""The compiled CPU backend: one fused pass in C++, on AVX2, AVX-512 or portable vectors.

Same arguments, same results as :mod:`softcl.ops.reference`, in float32 whatever the inputs
(float32, bfloat16 or float16 in any mix). The work is O(N K D) and the memory O(N (D + k)) besides
the outputs. Results are the same bits for the same inputs and the same ``torch.get_num_threads()``.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor  # torch first: its OpenMP runtime then serves softcl._C too

from softcl.labels import RULES, LabelRule
from softcl.ops.backends import Call

# The values of ElementType in csrc/include/softcl/element_type.h.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Rule name -> value of LabelKind in csrc/include/softcl/labels.h.
LABEL_KINDS = {name: kind for kind, name in enumerate(RULES)}


OPTIONS = frozenset({"excluded"})


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and why it cannot be used."""
    try:
        from softcl import _C
    except ImportError as error:
        return None, f"softcl._C is not built ({error})"
    try:
        _C.isa()
    except ValueError as error:
        return None, str(error)
    return _C, ""


def unsupported(call: Call) -> str | None:
    """Why this backend cannot run ``call``, or None."""
    if call.device.type != "cpu":
        return f"the tensors are on {call.device.type}"
    for name, dtype in (("vectors", call.vector_dtype), ("queue", call.queue_dtype)):
        if dtype not in ELEMENT_TYPES:
            return f"the {name} are {dtype}, not float32, bfloat16 or float16"
    module, reason = _load()
    return None if module is not None else reason


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

    Without ``sums`` the first three have no rows: a search for neighbours alone, at less than half
    the work.
    """
    module, _ = _load()
    excluded = None if excluded is None else excluded.contiguous()
    (n, d), k = vectors.shape, num_neighbors
    shapes = ((n,), (n, d), (n,)) if sums else ((0,), (0, d), (0,))
    lse, mean, entropy = (vectors.new_empty(shape, dtype=torch.float32) for shape in shapes)
    neighbor_logits = vectors.new_empty((n, k), dtype=torch.float32)
    neighbor_indices = vectors.new_empty((n, k), dtype=torch.int64)
    module.cpu_queue_statistics(
        vectors=vectors.data_ptr(),
        queue=queue.data_ptr(),
        vector_type=ELEMENT_TYPES[vectors.dtype],
        queue_type=ELEMENT_TYPES[queue.dtype],
        num_vectors=n,
        queue_size=len(queue),
        dim=d,
        num_neighbors=k,
        temperature=temperature,
        num_threads=torch.get_num_threads(),
        # An empty tensor's address is 0: not wanted.
        lse=lse.data_ptr(),
        mean=mean.data_ptr(),
        entropy=entropy.data_ptr(),
        neighbor_logits=neighbor_logits.data_ptr(),
        neighbor_indices=neighbor_indices.data_ptr(),
        excluded=0 if excluded is None else excluded.data_ptr(),
    )
    return lse, mean, entropy, neighbor_logits, neighbor_indices


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
    module, _ = _load()
    excluded = None if excluded is None else excluded.contiguous()
    (n, d), k = query.shape, rule.num_neighbors
    shown = n if diagnostics and rule.needs_softmax else 0
    loss = query.new_empty((n,), dtype=torch.float32)
    dquery = query.new_empty((n, d) if gradient else (0,), dtype=torch.float32)
    confidence = query.new_empty((shown,), dtype=torch.float32)
    entropy = query.new_empty((shown,), dtype=torch.float32)
    positive_rank = query.new_empty((n if diagnostics else 0,), dtype=torch.int64)
    neighbor_indices = query.new_empty((n, k if diagnostics else 0), dtype=torch.int64)
    module.cpu_soft_contrastive(
        query=query.data_ptr(),
        key=key.data_ptr(),
        queue=queue.data_ptr(),
        vector_type=ELEMENT_TYPES[query.dtype],
        queue_type=ELEMENT_TYPES[queue.dtype],
        num_queries=n,
        queue_size=len(queue),
        dim=d,
        rule=LABEL_KINDS[rule.name],
        num_neighbors=k,
        positive_weight=rule.positive_weight,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        positive=positive,
        normalize=normalize,
        num_threads=torch.get_num_threads(),
        loss=loss.data_ptr(),
        dquery=dquery.data_ptr(),
        confidence=confidence.data_ptr(),
        entropy=entropy.data_ptr(),
        positive_rank=positive_rank.data_ptr(),
        neighbor_indices=neighbor_indices.data_ptr(),
        excluded=0 if excluded is None else excluded.data_ptr(),
    )
    return loss, dquery, confidence, entropy, positive_rank, neighbor_indices
