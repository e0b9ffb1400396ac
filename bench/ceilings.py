"""What this machine can do with nothing else to do, measured: what floors are made of.

    multiply-adds   on a CPU a loop of nothing else, on a GPU a large bf16 product of random numbers
    exponentials    on a CPU a loop of nothing else, on a GPU the kernel of exponentials.py
    copied bytes    read and written, by a copy far larger than the caches

On a CPU multiply-adds and exponentials take the same units, so their times add; on a GPU tensor
cores and the units of the exponentials work side by side. Memory works beside both.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.shapes import Cost

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # of the source; the largest L2 has 130 MB
PRODUCT_SIZE = {"cpu": 64, "cuda": 8192}


class Ceilings(NamedTuple):
    """Rates per second; infinite where one is not known, so that it never binds."""

    multiply_adds: float
    exponentials: float
    copied_bytes: float
    side_by_side: bool  # multiply-adds and exponentials have units of their own

    def seconds(self, cost: Cost) -> dict[str, float]:
        """What each part of a cost takes at its ceiling."""
        return {
            "products": cost.flop / 2.0 / self.multiply_adds,
            "exponentials": cost.exponentials / self.exponentials,
            "memory": cost.bytes / self.copied_bytes,
        }

    def floor(self, cost: Cost) -> float:
        """Seconds that no implementation can beat: the part that binds."""
        products, exponentials, memory = self.seconds(cost).values()
        if self.side_by_side:
            return max(products, exponentials, memory)
        return max(products + exponentials, memory)

    def information(self, cost: Cost, seconds: float) -> dict:
        """A measured time beside the ceilings, for pytest-benchmark's extra_info."""
        floor = self.floor(cost)
        return {
            "ceilings": self._asdict(),
            "floor_seconds": floor,
            "percent_of_floor": 100.0 * floor / seconds,
            "percent_of_ceiling": {k: 100.0 * t / seconds for k, t in self.seconds(cost).items()},
        }


@functools.lru_cache(maxsize=1)
def measured(group: str, device: str) -> Ceilings | None:
    """The ceilings, anew for each group of contenders: clocks drift. None without softcl._C."""
    if device == "cuda":
        has_triton = importlib.util.find_spec("triton") is not None
        exponentials = exponential_rate() if has_triton else float("inf")
        return Ceilings(product_rate(device) / 2.0, exponentials, copy_rate(device), True)
    try:
        from softcl import _C
    except ImportError:
        return None
    return Ceilings(*_C.cpu_ceilings(torch.get_num_threads(), 0.6), copy_rate(device), False)


def product_rate(device: str) -> float:
    """FLOP/s of a large product in bf16 (on a CPU a small one, to try the caller)."""
    size = PRODUCT_SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / median_seconds(lambda: a @ b, device, rounds=20, warmup=5)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes read and written per second."""
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / median_seconds(lambda: target.copy_(source), device, rounds=7)


def exponential_rate() -> float:
    """Exponentials per second of the GPU."""
    from bench.exponentials import BLOCK, REPEATS, UNROLL, add_exponentials

    programs = 64 * torch.cuda.get_device_properties("cuda").multi_processor_count
    x = torch.rand(programs * BLOCK, device="cuda")
    seconds = median_seconds(lambda: add_exponentials(x, REPEATS), "cuda", rounds=10)
    return x.numel() * REPEATS * UNROLL / seconds


def median_seconds(call: Callable[[], object], device: str, rounds: int, warmup: int = 2) -> float:
    """Of one call, on the device's own clock where it has one."""
    clock = seconds_on_device if device == "cuda" else seconds_on_host
    return statistics.median([clock(call) for _ in range(rounds + warmup)][warmup:])


def seconds_on_host(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_on_device(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3
