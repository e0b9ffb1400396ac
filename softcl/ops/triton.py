"""Backend ``triton``: the one-pass operator on GPUs, in two or three launches (see ``kernels/``).

    kernels/stream.py    one visit of the queue: softmax sums, chunk maxima
    kernels/select.py    exact top-k from the chunk maxima; only where neighbours are needed
    kernels/finish.py    merge, label rule, loss, gradient, normalisation; or the bare statistics

Products run on tensor cores, which cut sums off where an addition rounds them, so long sums are
made of short ones: with sums cut off likewise, the gradient of fp32 keeps its 2e-6 and that of
16-bit rows its 1e-3 (tests/test_triton_accuracy.py has a table). A queue in fp16 beside fp16 rows
is multiplied as it is; every tile of one in bf16 is converted first, where two means are asked for.

D is at most 1024: a program holds its sums (rows, D) in registers. Above 512 the rest no longer
stays beside them, and a tile of the queue is read twice (``kernels/stream.py``).

Nothing waits for the device, so a call can be captured in a CUDA graph. Triton is imported at the
first call that can run. With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from softcl.ops.call import Call, LossCall, StatisticsCall, coldest

MOST_NEIGHBORS = 1024
MOST_DIMENSIONS = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)


def unsupported(call: Call) -> str | None:
    """None if this backend runs the call, else one clause that says why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    device, (N, D), K = call.query.device, call.query.shape, call.queue.shape[0]
    if device.type == "cpu":
        if not interpreting():
            return "the tensors are on the CPU"
    elif device.type != "cuda":
        return f"the tensors are on {device.type}"
    elif torch.version.hip is not None:
        from softcl.kernels.tiles import AMD_TARGETS

        name = amd_name(device.index)
        if name not in AMD_TARGETS:
            return f"there are no tiles for {name}: those of gfx942 do not fit its registers"
    elif capability(device.index) < OLDEST_CAPABILITY:
        found = ".".join(map(str, capability(device.index)))
        return f"compute capability {found} is below 8.0"
    for name, rows in (("vectors", call.query), ("queue", call.queue)):
        if rows.dtype not in DTYPES:
            return f"{name} are {str(rows.dtype).removeprefix('torch.')}"
    if D > MOST_DIMENSIONS:
        return f"D={D} is above {MOST_DIMENSIONS}"
    if call.num_neighbors > MOST_NEIGHBORS:
        return f"num_neighbors={call.num_neighbors} is above {MOST_NEIGHBORS}"
    if max(N, K) >= 2**30:
        return f"N={N}, K={K}: more than 2^30 rows"
    return None


@functools.cache
def kernels():
    """The modules of the kernels: looking them up at every call would take a tenth of it."""
    from softcl.kernels import finish, plan, select, stream

    return finish, plan, select, stream


def run(call: Call) -> tuple[Tensor, ...]:
    """The results of the call, as its `empty_results` lists them."""
    with on_device(call.query.device):
        return soft_contrastive(call) if isinstance(call, LossCall) else queue_statistics(call)


def queue_statistics(call: StatisticsCall) -> tuple[Tensor, ...]:
    finish, plan, select, stream = kernels()
    query, queue, k, sums = call.query, call.queue, call.num_neighbors, call.sums
    (N, D), K = query.shape, queue.shape[0]
    work = plan.Work(
        N, K, D, query.dtype, queue.dtype,
        softmax=sums, mean=sums, entropy=sums, num_neighbors=k, coldest=coldest(call),
        excluded=call.excluded is not None,
    )  # fmt: skip
    how = plan.make_plan(work, *target_of(query.device))
    scale = plan.LOG2_E / call.temperature
    streamed = stream.launch(query, None, queue, scale, scale, how, call.excluded)
    neighbors = no_neighbors(query)
    if k > 0:
        neighbors = select.launch(
            query, queue, streamed.maxima, k, 1.0 / call.temperature, how, call.excluded
        )
    if not sums:
        empty = neighbors[0].new_empty
        return empty(0), empty((0, D)), empty(0), *neighbors
    return *finish.finish_statistics(streamed, scale, N, how), *neighbors


def soft_contrastive(call: LossCall) -> tuple[Tensor, ...]:
    finish, plan, select, stream = kernels()
    query, key, queue, rule = call.query, call.key, call.queue, call.rule
    (N, D), K = query.shape, queue.shape[0]
    work = plan.Work(
        N, K, D, query.dtype, queue.dtype,
        has_key=True,
        mean=call.gradient,
        teacher_softmax=rule.needs_softmax,
        teacher_mean=rule.needs_mean,
        num_neighbors=rule.num_neighbors,
        normalize=call.normalize,
        ranks=call.diagnostics,
        excluded=call.excluded is not None,
        coldest=coldest(call),
    )  # fmt: skip
    how = plan.make_plan(work, *target_of(query.device))
    scales = plan.LOG2_E / call.temperature, plan.LOG2_E / call.teacher_temperature
    streamed = stream.launch(query, key, queue, *scales, how, call.excluded)
    z, t = (streamed.unit_rows[:N], streamed.unit_rows[N:]) if call.normalize else (query, key)
    neighbors = no_neighbors(query)
    if rule.num_neighbors > 0:
        neighbors = select.launch(
            t, queue, streamed.maxima, rule.num_neighbors, scales[1], how, call.excluded
        )
    results = finish.finish_loss(
        query, z, t, queue, streamed, *neighbors, rule, call.temperature, scales, how,
        call.excluded,
        positive=call.positive, gradient=call.gradient, diagnostics=call.diagnostics,
    )  # fmt: skip
    return *results, neighbors[1] if call.diagnostics else neighbors[1][:, :0].clone()


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


@functools.cache
def amd_name(index: int | None) -> str:
    """Of an AMD GPU, such as "gfx942"."""
    return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]


def target_of(device: torch.device) -> tuple[str, int]:
    """The architecture's name in the tile table, and the number of multiprocessors."""
    if device.type == "cpu":
        return "interpreter", 4
    return _target_of_index(device.index)


@functools.cache
def _target_of_index(index: int | None) -> tuple[str, int]:
    from softcl.kernels.tiles import target_name

    properties = torch.cuda.get_device_properties(index)
    arch = amd_name(index) if torch.version.hip else capability(index)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", None)
    return target_name(arch, shared_memory), properties.multi_processor_count


def on_device(device: torch.device):
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
