"""The search for the k nearest queue rows alone, as the k-NN evaluator and SNCLR's bank need it.

    pytest bench/bench_neighbors.py --benchmark-only [--shapes main] [--peer faiss] ...

The quick shape is searched for every k, the main ones (k-NN evaluation on CIFAR, 512 dimensions,
among them) for k = 200. Each contender is first held to float64 on some rows of the same inputs.

The floor is that of N K D multiply-adds in fp32. The CPU backend can pass below it: it screens rows
in 16-bit fixed point and compares in fp32 only what could be among the nearest (csrc/cpu/screen.h).
"""

from __future__ import annotations

import time

import pytest
import torch

from bench.memory import fresh_process
from bench.neighbor_peers import PEERS, absent, make_search
from bench.shapes import KNN, Shape, cpu_floor, search_cost
from bench.table import Row
from softcl import queue_statistics
from softcl.testing import available_backends, make_problem

QUICK = Shape(1000, 16384, 128)
NEIGHBORS = (1, 5, 30, 64, 200)
MAIN = (Shape(1024, 65536, 128), KNN)
CHECKED_ROWS = 16
NEAR = 1e-6  # similarities closer than that may change places
SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 3.0, 30, 3


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    works = [(QUICK, k) for k in NEIGHBORS]
    if option("--full") or option("--shapes") in ("main", "grid"):
        works = [*(works if option("--full") else ()), *((shape, 200) for shape in MAIN)]
    backends = option("--backend") or available_backends(make_problem(2, 8, 4))
    peers = [p for p in option("--peer") or PEERS if p in (*PEERS, "none")]
    contenders = [x for x in (*backends, *peers) if x not in ("none", "reference")]
    metafunc.parametrize("work", works, ids=lambda w: f"{w[0]}-{w[1]}")
    metafunc.parametrize("contender", contenders)


class Search:
    """One contender's search on the inputs of a shape."""

    def __init__(self, shape: Shape, k: int, contender: str) -> None:
        problem = make_problem(*shape)
        self.vectors, self.bank, self.k = problem.key, problem.queue, k
        self.backend = None if contender in PEERS else contender
        self.search = make_search(contender, self.bank) if contender in PEERS else None

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.search is not None:
            return self.search(self.vectors, self.k)
        got = queue_statistics(
            self.vectors,
            self.bank,
            1.0,
            num_neighbors=self.k,
            sums=False,
            backend=self.backend,
        )
        return got.neighbor_logits, got.neighbor_indices


def check(search: Search) -> None:
    """Every row returned is among the k nearest, in float64, near ties excused."""
    similarities, indices = search()
    some = torch.arange(0, len(indices), max(1, len(indices) // CHECKED_ROWS))
    exact = search.vectors[some].double() @ search.bank.double().T
    chosen = exact.gather(1, indices[some])
    last = exact.topk(search.k, dim=1).values[:, -1:]
    assert bool((chosen >= last - NEAR).all()), "a row is not among the nearest"
    assert bool((indices[some].sort(1).values.diff(dim=1) > 0).all()), "a row occurs twice"
    error = float((similarities[some].double() - chosen).abs().max())
    assert error <= 1e-5, f"similarities are off by {error:.1e}"


_search: Search | None = None  # of the other process


def prepare_elsewhere(*arguments) -> None:
    global _search
    _search = Search(*arguments)
    check(_search)


def search_elsewhere() -> float:
    """Seconds of the search alone: no inputs or results travel between processes."""
    start = time.perf_counter()
    _search()
    return time.perf_counter() - start


def bench_search(benchmark, report, ceilings, work, contender):
    shape, k = work
    group = f"search {shape} k={k}"
    reason = absent(contender) if contender in PEERS else None
    if reason:
        report(Row(group, contender, note=reason))
        pytest.skip(reason)
    cost = search_cost(shape)
    with fresh_process() as pool:
        pool.submit(prepare_elsewhere, shape, k, contender).result()
        once = pool.submit(search_elsewhere).result()

        def step():
            pool.submit(search_elsewhere).result()

        benchmark.group = group
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / once)))
        benchmark.pedantic(step, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable: the check alone
        return
    limits = ceilings(group)
    seconds = benchmark.stats.stats.median
    floor = cpu_floor(cost, limits) if limits else None
    report(Row(group, contender, seconds, cost.flop, floor))
    benchmark.extra_info.update(
        shape=list(shape),
        contender=contender,
        num_neighbors=k,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        flop=cost.flop,
        gflops=cost.flop / seconds / 1e9,
        ceilings=limits,
        floor_seconds=floor,
        percent_of_floor=None if floor is None else 100 * floor / seconds,
    )
