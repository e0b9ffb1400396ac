"""The CUDA C++ backend: the one-pass operator on NVIDIA GPUs, in two launches (see ``csrc/cuda``).

    csrc/cuda/stream_kernel.h        one visit of the queue: softmax sums, chunk maxima
    csrc/cuda/stream_hopper_kernel.h the same on compute capability 9.0, where D is a multiple of 8,
                                     and for bfloat16 temperatures are 0.023 or more, for float32
                                     and mixed types D <= 128
    csrc/cuda/soft_contrastive.cu    merge, exact neighbours, label rule, loss and gradient
    csrc/cuda/queue_statistics.cu    merge, exact neighbours

Experimental: it has not yet run on a GPU, and backend="auto" does not choose it. The same sources,
compiled for the CPU by ``csrc/cuda/host``, run in the tests.

Rows and queue are bfloat16, float16 or float32, in any mix, with D <= 256. Where both are of one
16-bit type their own products are made; otherwise every number is taken in two 16-bit parts, at
three products for one. Nothing waits for the device, so a call can be captured in
a CUDA graph.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

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

MOST_NEIGHBORS = 1024
MOST_ROWS = 1 << 30
OLDEST_CAPABILITY = (8, 0)


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module with its CUDA part, or None and why it cannot be used."""
    try:
        from softcl import _C
    except ImportError as error:
        return None, f"softcl._C is not built ({error})"
    if not _C.has_cuda():
        return None, "softcl._C is built without CUDA"
    if _C.cuda_device_count() == 0:
        return None, f"no CUDA device ({_C.cuda_no_device_reason()})"
    return _C, ""


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    module, _ = _load()
    return module.cuda_compute_capability(index)


@functools.cache
def _most_dimensions(vector_dtype: torch.dtype, queue_dtype: torch.dtype, index: int) -> int:
    """The largest D that fits into the device's shared memory."""
    module, _ = _load()
    types = (ELEMENT_TYPES[vector_dtype], ELEMENT_TYPES[queue_dtype])
    return module.cuda_most_dimensions(*types, index)


def unsupported(call: Call) -> str | None:
    """Why this backend cannot run ``call``, or None."""
    module, reason = _load()
    if module is None:
        return reason
    if call.device.type != "cuda":
        return f"the tensors are on {call.device.type}"
    index = _index_of(call.device)
    capability = _capability(index)
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    for name, dtype in (("vectors", call.vector_dtype), ("queue", call.queue_dtype)):
        if dtype not in ELEMENT_TYPES:
            return f"the {name} are {dtype}, not float32, bfloat16 or float16"
    most = _most_dimensions(call.vector_dtype, call.queue_dtype, index)
    if call.D > most:
        return f"D={call.D} is above {most}"
    if call.num_neighbors > MOST_NEIGHBORS:
        return f"num_neighbors={call.num_neighbors} is above {MOST_NEIGHBORS}"
    if max(call.N, call.K) > MOST_ROWS:
        return f"N={call.N}, K={call.K}: more than 2^30 rows"
    return None


def queue_statistics(
    vectors: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    temperature: float,
    num_neighbors: int,
    *,
    sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse (N,), mean (N, D), entropy (N,), neighbor_logits (N, k), neighbor_indices (N, k).

    Without ``sums`` the first three come back empty: a search for neighbours alone, at half the
    products.
    """
    module, _ = _load()
    results = statistics_results(vectors, num_neighbors, sums=sums)
    _run(
        module.cuda_queue_statistics,
        vectors.device,
        **statistics_arguments(vectors, queue, temperature, num_neighbors),
        **addresses(results),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (N,), dquery (N, D), confidence, entropy, positive_rank (N,), neighbor_indices (N, n).

    What was not asked for, or what the rule does not compute, comes back empty.
    """
    module, _ = _load()
    results = loss_results(query, rule, gradient=gradient, diagnostics=diagnostics)
    _run(
        module.cuda_soft_contrastive,
        query.device,
        **loss_arguments(
            query, key, queue, rule, temperature, teacher_temperature,
            positive=positive, normalize=normalize,
        ),
        **addresses(results),
    )  # fmt: skip
    return tuple(results.values())


def _run(launch, device: torch.device, **arguments) -> None:
    """Ask for the size of the workspace, take it from torch's allocator, launch."""
    where = {"device": _index_of(device), "stream": _stream_of(device)}
    size = launch(**arguments, **where, workspace=0, workspace_bytes=0)
    # Its memory may be handed out again at once: whatever uses it next on this stream runs later.
    workspace = torch.empty(size, device=device, dtype=torch.uint8)
    launch(**arguments, **where, workspace=workspace.data_ptr(), workspace_bytes=size)


def _index_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
