"""The CUDA C++ backend: the one-pass operator on NVIDIA GPUs, in two launches (see ``csrc/cuda``).

    csrc/cuda/stream_kernel.h        one visit of the queue: softmax sums, chunk maxima
    csrc/cuda/stream_hopper_kernel.h the same on compute capability 9.0, where D is a multiple of 8,
                                     and for float32 D <= 128
    csrc/cuda/soft_contrastive.cu    merge, exact neighbours, label rule, loss and gradient
    csrc/cuda/queue_statistics.cu    merge, exact neighbours

Experimental: it has not yet run on a GPU, and backend="auto" does not choose it. The same sources,
compiled for the CPU by ``tests/native/cuda``, run in the tests.

Rows and queue are bfloat16, float16 or float32, in any mix, with D <= 256. Numbers of 16 bits are
multiplied as they are; bfloat16 is taken as float16 where labels are dense, the queue short or a
temperature below 0.023, each tile in place, which a float16 queue saves. Where rows or queue are
float32, every number is taken in two 16-bit parts, at three products for one, with sums that are
kept short, for tensor cores cut them off: in the emulation the gradient of float32 is off by at
most 2e-6 (6e-6 where labels are clipped) for queues of up to 131,072 rows, beyond by a part that
grows as the root of K. Nothing waits for the device, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from softcl import native
from softcl.ops.call import Call, fields_of, unsupported_types

MOST_NEIGHBORS = 1024
MOST_ROWS = 1 << 30
OLDEST_CAPABILITY = (8, 0)


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module with its CUDA part, or None and why it cannot be used."""
    module, reason = native.load()
    if module is None:
        return None, reason
    if not module.has_cuda():
        return None, "softcl._C is built without CUDA"
    return module, ""


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    module, _ = _load()
    return module.cuda_compute_capability(index)


@functools.cache
def _most_dimensions(vector_dtype: torch.dtype, queue_dtype: torch.dtype, index: int) -> int:
    """The largest D that fits into the device's shared memory."""
    module, _ = _load()
    types = (native.ELEMENT_TYPES[vector_dtype], native.ELEMENT_TYPES[queue_dtype])
    return module.cuda_most_dimensions(*types, index)


def unsupported(call: Call) -> str | None:
    """Why this backend cannot run ``call``, or None."""
    module, reason = _load()
    if module is None:
        return reason
    device, (N, D), K = call.query.device, call.query.shape, call.queue.shape[0]
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    # Not before: this asks the driver, and a process forked after that cannot use CUDA. Of tensors
    # on a device torch has asked it already.
    if module.cuda_device_count() == 0:
        return f"no CUDA device ({module.cuda_no_device_reason()})"
    index = _index_of(device)
    capability = _capability(index)
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if call.excluded is not None:
        return "its kernels do not know excluded rows"
    reason = unsupported_types(call)
    if reason is not None:
        return reason
    most = _most_dimensions(call.query.dtype, call.queue.dtype, index)
    if D > most:
        return f"D={D} is above {most}"
    if call.num_neighbors > MOST_NEIGHBORS:
        return f"num_neighbors={call.num_neighbors} is above {MOST_NEIGHBORS}"
    if max(N, K) > MOST_ROWS:
        return f"N={N}, K={K}: more than 2^30 rows"
    return None


def run(call: Call) -> tuple[Tensor, ...]:
    """The results of the call, as its `empty_results` lists them."""
    module, _ = _load()
    device = call.query.device
    results = call.empty_results()
    fields = fields_of(call, results)
    where = {"device": _index_of(device), "stream": _stream_of(device)}
    # The first call only tells the size of the workspace, which is taken from torch's allocator.
    size = module.cuda_run(**fields, **where, workspace=0, workspace_bytes=0)
    # Its memory may be handed out again at once: whatever uses it next on this stream runs later.
    workspace = torch.empty(size, device=device, dtype=torch.uint8)
    module.cuda_run(**fields, **where, workspace=workspace.data_ptr(), workspace_bytes=size)
    return tuple(results.values())


def _index_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
