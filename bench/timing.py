"""How a contender is timed: as many rounds as fit, and ours in turn with it.

The clocks of a machine drift while the contenders of a group run one after the other. So one call
of ours goes before each round of another one, outside its time: their ratio is that of neighbours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# Threads of OpenMP wait for more work for some ms, awake: so long another process is disturbed.
REST = 0.03


class Timing(NamedTuple):
    seconds: float  # median
    over_ours: float | None  # median of a round over ours just before it; None without ours


def cuda_time() -> float:
    """The clock, read when the device has done everything asked of it."""
    torch.cuda.synchronize()
    return time.perf_counter()


def time_once(call: Callable[[], object], device: str = "cpu") -> float:
    clock = cuda_time if device == "cuda" else time.perf_counter
    start = clock()
    call()
    return clock() - start


def measure(
    benchmark,
    step: Callable[[], object],
    ours: Callable[[], object] | None = None,
    *,
    device: str = "cpu",
    seconds: float,
    most: int = 30,
    least: int = 3,
    other_process: bool = False,
) -> Timing | None:
    """Time ``step``, about ``seconds`` long, through pytest-benchmark's fixture.

    ``ours`` may be the fused call on the same inputs; it shares the seconds. ``other_process``:
    the two do not run in the same one. None under --benchmark-disable, where each runs once.
    """
    own: list[float] = []

    def before() -> None:
        rest = REST if other_process else 0.0
        time.sleep(rest)
        own.append(time_once(ours, device))
        time.sleep(rest)

    once = time_once(step, device) + (time_once(ours, device) if ours else 0.0)
    rounds = max(least, min(most, int(seconds / once)))
    benchmark.pedantic(step, setup=before if ours else None, rounds=rounds)
    if benchmark.stats is None:
        return None
    taken = benchmark.stats.stats.data
    ratios = [t / o for t, o in zip(taken, own, strict=False)]
    return Timing(statistics.median(taken), statistics.median(ratios) if ratios else None)
