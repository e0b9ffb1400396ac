"""Peak memory, and a process of its own in which malloc is as it comes.

The benchmarks' process tells malloc to keep its pages. Eager PyTorch on a CPU is up to five times
as fast so, for it no longer pays page faults for every N x K matrix: the honest opponent. What a
user meets who knows nothing of this, and the growth of memory, are measured in the other process.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def fresh_process() -> ProcessPoolExecutor:
    """One worker, started by spawning: nothing of this process is in it."""
    return ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    )


def peak_increase(function: Callable[[], object]) -> int | None:
    """Bytes by which the process grows at most while ``function`` runs; None where unknown.

    Linux alone: the kernel's high-water mark of resident memory, set back before the call.
    """
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists() or not has_glibc():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        clear.write_text("5")
    except OSError:
        return None
    before = _status(status, "VmRSS")
    result = function()
    peak = _status(status, "VmHWM")
    del result
    return max(0, peak - before)


def _status(path: Path, name: str) -> int:
    line = next(x for x in path.read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def available_memory() -> float:
    """Bytes that the machine can still give; infinite where unknown."""
    meminfo = Path("/proc/meminfo")
    return float(_status(meminfo, "MemAvailable")) if meminfo.exists() else float("inf")


def cuda_peak_increase(function: Callable[[], object]) -> int:
    """Bytes by which PyTorch's allocations on the device grow at most while ``function`` runs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
