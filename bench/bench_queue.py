"""Enqueueing a batch of keys: normalise, cast, write into the ring.

    pytest bench/bench_queue.py --benchmark-only

The peer is what PyTorch code does: normalise, cast, and write by an index that wraps. It has no
check for keys that are not finite; this project's queue refuses those. The floor is that of the
bytes read and written, at the rate of a copy that is too large for the caches, measured in the run.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from bench.table import Row
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


@pytest.fixture(scope="module")
def copy_rate(device) -> float:
    """Bytes per second, read and written, of a copy of 256 MB."""
    source = torch.empty(1 << 26, device=device).fill_(1.0)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2.0 * source.nbytes / statistics.median(times[2:])


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("batch", BATCHES)
def bench_enqueue(benchmark, report, copy_rate, device, batch, storage, contender):
    dtype = getattr(torch, storage)
    keys = torch.randn(batch, D, generator=torch.Generator().manual_seed(0)).to(device)
    queue = make_queue(contender, dtype, device)
    check(queue, keys)
    group = f"enqueue {batch} keys, {storage} queue {K}x{D}"
    benchmark.group = group
    benchmark.pedantic(queue.enqueue, (keys,), rounds=50, iterations=10, warmup_rounds=2)
    if benchmark.stats is None:
        return
    moved = keys.nbytes + batch * D * dtype.itemsize
    seconds = benchmark.stats.stats.median
    report(Row(group, contender, seconds, floor=moved / copy_rate))
    benchmark.extra_info.update(
        contender=contender,
        bytes=moved,
        bytes_per_second=moved / seconds,
        copy_bytes_per_second=copy_rate,
        percent_of_floor=100 * moved / copy_rate / seconds,
        threads=torch.get_num_threads(),
    )
