"""Backend ``triton``: the one-pass operator on GPUs, in two or three launches (see ``kernels/``).

    kernels/stream.py    one visit of the queue: softmax sums, chunk maxima
    kernels/select.py    exact top-k from the chunk maxima; only where neighbours are needed
    kernels/finish.py    merge, label rule, loss, gradient, normalisation; or the bare statistics

Nothing waits for the device, so a call can be captured in a CUDA graph. Triton is imported at the
first call that can run. With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from softcl.labels import LabelRule
from softcl.ops.backends import Call

MOST_NEIGHBORS = 1024
MOST_DIMENSIONS = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)
OPTIONS = frozenset({"excluded"})


def unsupported(call: Call) -> str | None:
    """None if this backend runs the call, else one clause that says why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if call.device.type == "cpu":
        if not interpreting():
            return "the tensors are on the CPU"
    elif call.device.type != "cuda":
        return f"the tensors are on {call.device.type}"
    elif torch.version.hip is None and capability(call.device.index) < OLDEST_CAPABILITY:
        found = ".".join(map(str, capability(call.device.index)))
        return f"compute capability {found} is below 8.0"
    for name, dtype in (("vectors", call.vector_dtype), ("queue", call.queue_dtype)):
        if dtype not in DTYPES:
            return f"{name} are {str(dtype).removeprefix('torch.')}"
    if call.D > MOST_DIMENSIONS:
        return f"D={call.D} is above {MOST_DIMENSIONS}"
    if call.num_neighbors > MOST_NEIGHBORS:
        return f"num_neighbors={call.num_neighbors} is above {MOST_NEIGHBORS}"
    if max(call.N, call.K) >= 2**30:
        return f"N={call.N}, K={call.K}: more than 2^30 rows"
    return None


@functools.cache
def kernels():
    """The modules of the kernels: looking them up at every call would take a tenth of it."""
    from softcl.kernels import finish, plan, select, stream

    return finish, plan, select, stream


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

    Without ``sums`` the first three have no rows: a search for neighbours alone.
    """
    finish, plan, select, stream = kernels()
    (N, D), K = vectors.shape, queue.shape[0]
    work = plan.Work(
        N, K, D, vectors.dtype, queue.dtype,
        softmax=sums, mean=sums, entropy=sums, num_neighbors=num_neighbors, coldest=temperature,
        excluded=excluded is not None,
    )  # fmt: skip
    how = plan.make_plan(work, *target_of(vectors.device))
    excluded = None if excluded is None else excluded.contiguous()
    scale = plan.LOG2_E / temperature
    with on_device(vectors.device):
        streamed = stream.launch(vectors, None, queue, scale, scale, how, excluded)
        if num_neighbors > 0:
            neighbors = select.launch(
                vectors, queue, streamed.maxima, num_neighbors, 1.0 / temperature, how, excluded
            )
        else:
            neighbors = no_neighbors(vectors)
        if not sums:
            empty = neighbors[0].new_empty
            return empty(0), empty((0, D)), empty(0), *neighbors
        return *finish.finish_statistics(streamed, scale, N, how), *neighbors


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
    finish, plan, select, stream = kernels()
    (N, D), K = query.shape, queue.shape[0]
    work = plan.Work(
        N, K, D, query.dtype, queue.dtype,
        has_key=True,
        mean=gradient,
        teacher_softmax=rule.needs_softmax,
        teacher_mean=rule.needs_mean,
        num_neighbors=rule.num_neighbors,
        normalize=normalize,
        ranks=diagnostics,
        excluded=excluded is not None,
        coldest=min(temperature, teacher_temperature) if rule.needs_softmax else temperature,
    )  # fmt: skip
    how = plan.make_plan(work, *target_of(query.device))
    excluded = None if excluded is None else excluded.contiguous()
    scales = plan.LOG2_E / temperature, plan.LOG2_E / teacher_temperature
    with on_device(query.device):
        streamed = stream.launch(query, key, queue, *scales, how, excluded)
        z, t = (streamed.unit_rows[:N], streamed.unit_rows[N:]) if normalize else (query, key)
        if rule.num_neighbors > 0:
            neighbors = select.launch(
                t, queue, streamed.maxima, rule.num_neighbors, scales[1], how, excluded
            )
        else:
            neighbors = no_neighbors(query)
        results = finish.finish_loss(
            query, z, t, queue, streamed, *neighbors, rule, temperature, scales, how, excluded,
            positive=positive, gradient=gradient, diagnostics=diagnostics,
        )  # fmt: skip
    return *results, neighbors[1] if diagnostics else neighbors[1][:, :0].clone()


def no_neighbors(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbour logits and indices (N, 0)."""
    shape = (rows.shape[0], 0)
    return (
        torch.empty(shape, device=rows.device, dtype=torch.float32),
        torch.empty(shape, device=rows.device, dtype=torch.int64),
    )


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def target_of(device: torch.device) -> tuple[str, int]:
    """The architecture's name in the tile table, and the number of multiprocessors."""
    if device.type == "cpu":
        return "interpreter", 4
    return _target_of_index(device.index)


@functools.cache
def _target_of_index(index: int | None) -> tuple[str, int]:
    from softcl.kernels.tiles import target_name

    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName if torch.version.hip else capability(index)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", None)
    return target_name(arch, shared_memory), properties.multi_processor_count


def on_device(device: torch.device):
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
