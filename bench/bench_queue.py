"""Enqueueing a batch of keys: normalise, cast, write into the ring.

    pytest bench/bench_queue.py --benchmark-only

The peer is what PyTorch code does: normalise, cast, and write by an index that wraps. It has no
check for keys that are not finite; this project's queue refuses those. The floor is that of the
bytes read and written, at the rate of a copy that is too large for the caches, measured in the run.
"""

from __future__ import annotations

import pytest
import torch

from bench.ceilings import copy_rate
from bench.machine import conditions
from bench.table import Row
from bench.timing import measure
from softcl.nn import MemoryQueue

K, D = 65536, 128
BATCHES = (256, 4096)
STORAGE = ("float32", "bfloat16")
CONTENDERS = ("softcl", "eager")


class EagerQueue:
    """The ring in plain PyTorch."""

    def __init__(self, size: int, dim: int, dtype: torch.dtype, device: str) -> None:
        self.rows = torch.zeros(size, dim, dtype=dtype, device=device)
        self.pointer = 0

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        size, count = len(self.rows), len(keys)
        slots = (self.pointer + torch.arange(count, device=keys.device)) % size
        self.rows[slots] = torch.nn.functional.normalize(keys, dim=1).to(self.rows.dtype)
        self.pointer = (self.pointer + count) % size


def make_queue(contender: str, dtype: torch.dtype, device: str):
    if contender == "eager":
        return EagerQueue(K, D, dtype, device)
    return MemoryQueue(K, D, dtype=dtype, device=device)


def check(queue, keys: torch.Tensor) -> None:
    """Two batches lie where they belong, as unit rows."""
    queue.pointer = K - len(keys) // 2  # wraps
    queue.enqueue(keys)
    expected = torch.nn.functional.normalize(keys.double(), dim=1)
    slots = (K - len(keys) // 2 + torch.arange(len(keys), device=keys.device)) % K
    bound = 1e-6 if queue.rows.dtype == torch.float32 else 2**-9
    assert float((queue.rows[slots].double() - expected).abs().max()) <= bound


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("batch", BATCHES)
def bench_enqueue(benchmark, report, device, batch, storage, contender):
    dtype = getattr(torch, storage)
    keys = torch.randn(batch, D, generator=torch.Generator().manual_seed(0)).to(device)

    def prepared(name: str):
        queue = make_queue(name, dtype, device)
        check(queue, keys)
        return lambda: queue.enqueue(keys)

    group = f"enqueue {batch} keys, {storage} queue {K}x{D}"
    benchmark.group = group
    ours = None if contender == CONTENDERS[0] else prepared(CONTENDERS[0])
    timing = measure(
        benchmark, prepared(contender), ours, device=device, seconds=1.0, most=500, least=50
    )
    if timing is None:
        return
    moved = keys.nbytes + batch * D * dtype.itemsize
    floor = moved / copy_rate(device)
    report(Row(group, contender, timing.seconds, floor=floor, over_ours=timing.over_ours))
    benchmark.extra_info.update(
        conditions(device),
        contender=contender,
        bytes=moved,
        bytes_per_second=moved / timing.seconds,
        copy_bytes_per_second=copy_rate(device),
        floor_seconds=floor,
        percent_of_floor=100 * floor / timing.seconds,
        over_ours=timing.over_ours,
    )
