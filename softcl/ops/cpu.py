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

from softcl.labels import LabelRule
from softcl.ops.backends import Call
from softcl.ops.native import (
    ELEMENT_TYPES,
    addresses,
    loss_arguments,
    loss_results,
    statistics_arguments,
    statistics_results,
)

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
    results = statistics_results(vectors, num_neighbors, sums=sums)
    module.cpu_queue_statistics(
        **statistics_arguments(vectors, queue, temperature, num_neighbors),
        **addresses(results),
        num_threads=torch.get_num_threads(),
        excluded=0 if excluded is None else excluded.data_ptr(),
    )
    return tuple(results.values())


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
    results = loss_results(query, rule, gradient=gradient, diagnostics=diagnostics)
    module.cpu_soft_contrastive(
        **loss_arguments(
            query, key, queue, rule, temperature, teacher_temperature,
            positive=positive, normalize=normalize,
        ),
        **addresses(results),
        num_threads=torch.get_num_threads(),
        excluded=0 if excluded is None else excluded.data_ptr(),
    )  # fmt: skip
    return tuple(results.values())
