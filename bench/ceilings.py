"""What this machine can do with nothing else to do, measured: what floors are made of.

    multiply-adds   on a CPU a loop of nothing else, on a GPU a large bf16 product of random numbers
    exponentials    on a CPU a loop of nothing else, on a GPU the kernel of exponentials.py
    copied bytes    read and written, by a copy far larger than the caches

On a CPU multiply-adds and exponentials take the same units, so their times add; on a GPU tensor
cores and the units of the exponentials work side by side. Memory works beside both.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.shapes import Cost

ROOT = Path(__file__).resolve().parent.parent
# For the instruction set that the backend runs on.
CPU_FLAGS = {
    "avx512": ("-mavx512f", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
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
    """The ceilings, anew for each group of contenders: clocks drift. None without softcl._C
    or a compiler."""
    if device == "cuda":
        has_triton = importlib.util.find_spec("triton") is not None
        exponentials = exponential_rate() if has_triton else float("inf")
        return Ceilings(product_rate(device) / 2.0, exponentials, copy_rate(device), True)
    rates = cpu_rates(torch.get_num_threads(), 0.6)
    return None if rates is None else Ceilings(*rates, copy_rate(device), False)


def cpu_rates(threads: int, seconds: float) -> tuple[float, float] | None:
    """Multiply-adds and exponentials per second of so many threads, measured for about that long
    with the instructions in use; None without softcl._C, which says which, or a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    try:
        from softcl import _C
    except ImportError:
        return None
    if compiler is None:
        return None
    library = ctypes.CDLL(str(cpu_library(compiler, _C.isa())))
    rates = (ctypes.c_double * 2)()
    library.softcl_measure_ceilings(threads, ctypes.c_double(seconds), rates)
    return rates[0], rates[1]


@functools.cache
def cpu_library(compiler: str, isa: str) -> Path:
    """bench/native/ceilings.cpp, compiled for one instruction set; kept in build/."""
    csrc = ROOT / "csrc" / "cpu"
    source = ROOT / "bench" / "native" / "ceilings.cpp"
    command = [compiler, "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", *CPU_FLAGS[isa]]
    # Threads of its own: it must not depend on which OpenMP torch has loaded.
    command += ["-DSOFTCL_STD_THREADS", f"-I{csrc}", str(source)]
    key = hashlib.sha256(" ".join(command).encode())
    for file in (source, csrc / "simd.h", csrc / "parallel.h"):
        key.update(file.read_bytes())
    library = ROOT / "build" / f"ceilings-{isa}-{key.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            subprocess.run([*command, "-o", str(made)], check=True)
            os.replace(made, library)
    return library


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
