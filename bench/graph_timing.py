"""How gpu_table.py times a step: a CUDA graph of many calls, by the device's own clock.

A graph leaves the host's share out. A call of more than 5 ms, or one that no graph can hold, is
launched by the host; on the CPU, for a dry run, its wall time counts.
"""

from __future__ import annotations

import math
import time

import torch

from softcl.testing import Problem

CALLS = 20  # in one graph


def capture(call):
    """The results of ``call`` and a CUDA graph that computes them again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return out, graph


def timer_of(step, problems: list[Problem], device: str):
    """A function that returns microseconds per call, and how it calls: "graph" or "host"."""
    if device == "cpu":
        return lambda: timed_on_host(step, problems[0]), "host"

    def calls():
        for i in range(CALLS):
            step(problems[i % len(problems)])

    for p in problems:
        step(p)
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(problems[0])
    torch.cuda.synchronize()
    slow = time.perf_counter() - start > 5e-3
    if slow:  # a graph would save nothing, and 20 calls would hold 20 calls' memory
        return lambda: timed_by_events(lambda: step(problems[0]), 1), "host"
    try:
        _, graph = capture(calls)
    except RuntimeError:
        torch.cuda.synchronize()
        return lambda: timed_by_events(calls, CALLS), "host"
    return lambda: timed_by_events(graph.replay, CALLS), "graph"


def timed_on_host(step, p: Problem) -> float:
    start = time.perf_counter()
    step(p)
    return (time.perf_counter() - start) * 1e6


def timed_by_events(call, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def python_time(step, p: Problem, device: str, calls: int = 50) -> float:
    """Microseconds of host time per call; the device must be the faster one for it to mean it."""
    if device == "cpu":
        return math.nan
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step(p)
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent * 1e6 / calls
