"""The CUDA C++ backend: the one-pass operator on NVIDIA GPUs, in two launches (see ``csrc/cuda``).

    csrc/cuda/stream_kernel.h        one visit of the queue: softmax sums, chunk maxima
    csrc/cuda/stream_hopper_kernel.h the same on compute capability 9.0, where D is a multiple of 8
                                     and the temperatures, for bfloat16, are 0.023 or more
    csrc/cuda/soft_contrastive.cu    merge, exact neighbours, label rule, loss and gradient
    csrc/cuda/queue_statistics.cu    merge, exact neighbours

Experimental: it has not yet run on a GPU, and backend="auto" does not choose it. The same sources,
compiled for the CPU by ``csrc/cuda/host``, run in the tests.

Rows and queue are bfloat16 or float16, both alike, with D <= 256. Nothing waits for the device, so
a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from softcl.labels import RULES, LabelRule
from softcl.ops.backends import Call

MOST_NEIGHBORS = 1024
MOST_DIMENSIONS = 256
MOST_ROWS = 1 << 30
OLDEST_CAPABILITY = (8, 0)

# The values of ElementType in csrc/include/softcl/element_type.h.
ELEMENT_TYPES = {torch.bfloat16: 1, torch.float16: 2}

# Rule name -> value of LabelKind in csrc/include/softcl/labels.h.
LABEL_KINDS = {name: kind for kind, name in enumerate(RULES)}


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


def unsupported(call: Call) -> str | None:
    """Why this backend cannot run ``call``, or None."""
    module, reason = _load()
    if module is None:
        return reason
    if call.device.type != "cuda":
        return f"the tensors are on {call.device.type}"
    capability = _capability(_index_of(call.device))
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if call.vector_dtype not in ELEMENT_TYPES:
        return f"the vectors are {call.vector_dtype}, not bfloat16 or float16"
    if call.queue_dtype != call.vector_dtype:
        return f"the vectors are {call.vector_dtype}, the queue {call.queue_dtype}"
    if call.D > MOST_DIMENSIONS:
        return f"D={call.D} is above {MOST_DIMENSIONS}"
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
    (n, d), k = vectors.shape, num_neighbors
    shapes = ((n,), (n, d), (n,)) if sums else ((0,), (0, d), (0,))
    lse, mean, entropy = (vectors.new_empty(shape, dtype=torch.float32) for shape in shapes)
    neighbor_logits = vectors.new_empty((n, k), dtype=torch.float32)
    neighbor_indices = vectors.new_empty((n, k), dtype=torch.int64)
    _run(
        module.cuda_queue_statistics,
        vectors.device,
        vectors=vectors.data_ptr(),
        queue=queue.data_ptr(),
        vector_type=ELEMENT_TYPES[vectors.dtype],
        queue_type=ELEMENT_TYPES[queue.dtype],
        num_vectors=n,
        queue_size=len(queue),
        dim=d,
        num_neighbors=k,
        temperature=temperature,
        # An empty tensor's address is 0: not wanted.
        lse=lse.data_ptr(),
        mean=mean.data_ptr(),
        entropy=entropy.data_ptr(),
        neighbor_logits=neighbor_logits.data_ptr(),
        neighbor_indices=neighbor_indices.data_ptr(),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (N,), dquery (N, D), confidence, entropy, positive_rank (N,), neighbor_indices (N, n).

    What was not asked for, or what the rule does not compute, comes back empty.
    """
    module, _ = _load()
    (n, d), k = query.shape, rule.num_neighbors
    shown = n if diagnostics and rule.needs_softmax else 0
    loss = query.new_empty((n,), dtype=torch.float32)
    dquery = query.new_empty((n, d) if gradient else (0,), dtype=torch.float32)
    confidence = query.new_empty((shown,), dtype=torch.float32)
    entropy = query.new_empty((shown,), dtype=torch.float32)
    positive_rank = query.new_empty((n if diagnostics else 0,), dtype=torch.int64)
    neighbor_indices = query.new_empty((n, k if diagnostics else 0), dtype=torch.int64)
    _run(
        module.cuda_soft_contrastive,
        query.device,
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
        loss=loss.data_ptr(),
        dquery=dquery.data_ptr(),
        confidence=confidence.data_ptr(),
        entropy=entropy.data_ptr(),
        positive_rank=positive_rank.data_ptr(),
        neighbor_indices=neighbor_indices.data_ptr(),
    )
    return loss, dquery, confidence, entropy, positive_rank, neighbor_indices


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
