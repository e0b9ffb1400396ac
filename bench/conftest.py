"""Options of the benchmarks, the machine's ceilings, and the table printed at the end.

pytest bench/ --benchmark-only                     the quick shapes, every contender
pytest bench/ --benchmark-only --full              every shape, rule and dtype (hours)
pytest bench/ --benchmark-only --shapes main --rule adaptive_soft --backend cpu --peer eager
pytest bench/ --benchmark-only --device cuda --benchmark-json results.json

On a CUDA device the timer waits for the device before it reads the clock, so times include the
host's share; bench/gpu_table.py replays CUDA graphs and leaves it out.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from pathlib import Path

import pytest
import torch

from bench.table import Row, format_tables

_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    group = parser.getgroup("softcl")
    group.addoption("--full", action="store_true", help="every shape and every rule")
    group.addoption(
        "--shapes", choices=("quick", "main", "grid"), help="named set of shapes (default: quick)"
    )
    for name in ("rule", "backend", "peer"):
        group.addoption(
            f"--{name}", action="append", help=f"only this {name}; may be repeated; 'none' for none"
        )
    group.addoption(
        "--dtype",
        action="append",
        choices=("float32", "bfloat16", "float16"),
        help="of rows and queue; may be repeated (default: float32 on the CPU, bfloat16 on CUDA)",
    )
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to run (default: a CUDA device if there is one)",
    )
    group.addoption("--threads", type=int, help="threads (default: what torch takes)")


def pytest_configure(config):
    config.stash[_ROWS] = []
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def cuda_time() -> float:
    """The clock, read when the device has done everything asked of it."""
    torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cuda":
        return
    for item in items:
        options = {"timer": cuda_time}
        closest = item.get_closest_marker("benchmark")
        if closest is not None:
            options |= closest.kwargs
        item.add_marker(pytest.mark.benchmark(**options))


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a figure depends on, into every file of results."""
    machine_info["softcl"] = {
        "device": config.getoption("--device"),
        "device_name": device_name(config.getoption("--device")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "clocks_mhz": clocks(config.getoption("--device")),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def clocks(device: str) -> float | None:
    """Megahertz now: of the GPU, or the mean of the processor's cores; None where unknown."""
    if device == "cuda":
        try:
            return float(torch.cuda.clock_rate())
        except Exception:  # needs a package of its own
            return None
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return None
    lines = cpuinfo.read_text().splitlines()
    rates = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return statistics.mean(rates) if rates else None


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def report(request):
    """Takes the rows of the table."""
    return request.config.stash[_ROWS].append


@functools.lru_cache(maxsize=1)
def measured_ceilings(group: str, device: str) -> tuple[float, float] | None:
    """Multiply-adds and exponentials per second, measured anew for each group.

    On the CPU of all threads, by loops of nothing else. On a CUDA device those of a large bf16
    product; exponentials then run beside it in units of their own and are not counted.
    """
    if device == "cuda":
        return product_rate() / 2.0, float("inf")
    try:
        from softcl import _C
    except ImportError:
        return None
    return _C.cpu_ceilings(torch.get_num_threads(), 0.6)


def product_rate(size: int = 8192) -> float:
    """FLOP/s of a large product in bf16."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        start = cuda_time()
        a @ b
        times.append(cuda_time() - start)
    return 2.0 * size**3 / statistics.median(times[5:])


@pytest.fixture
def ceilings(device):
    return lambda group: measured_ceilings(group, device)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS]
    if rows:
        terminalreporter.write_line("")
        for line in format_tables(rows):
            terminalreporter.write_line(line)
