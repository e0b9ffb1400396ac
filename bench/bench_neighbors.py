"""The search for the k nearest queue rows alone, as the k-NN evaluator and SNCLR's bank need it.

    pytest bench/bench_neighbors.py --benchmark-only [--shapes main] [--peer faiss] ...

The quick shape is searched for every k, the main ones (k-NN evaluation on CIFAR, 512 dimensions,
among them) for k = 200. Each contender is first held to float64 on some rows of the same inputs,
then timed in turn with ours. On a CPU each has a process of its own: faiss and scikit-learn bring
OpenMP runtimes of theirs.

The floor is that of N K D multiply-adds in fp32. The CPU backend can pass below it: it screens rows
in 16-bit fixed point and compares in fp32 only what could be among the nearest (search/screen.h in
csrc/cpu).
"""

from __future__ import annotations

import functools
from contextlib import ExitStack

import pytest
import torch

from bench.machine import conditions
from bench.memory import fresh_process
from bench.neighbor_peers import PEERS, absent, make_search
from bench.shapes import KNN, Shape, search_cost
from bench.table import OURS, Row
from bench.timing import measure
from softcl import queue_statistics
from softcl.testing import available_backends, make_problem

QUICK = Shape(1000, 16384, 128)
NEIGHBORS = (1, 5, 30, 64, 200)
MAIN = (Shape(1024, 65536, 128), KNN)
CHECKED_ROWS = 16
NEAR = 1e-6  # similarities closer than that may change places
SECONDS = 1.5  # of a contender and ours together


def chosen_backends(option) -> list[str]:
    chosen = option("--backend") or available_backends(
        make_problem(2, 8, 4, device=option("--device"))
    )
    return [x for x in chosen if x in OURS]


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    works = [(QUICK, k) for k in NEIGHBORS]
    if option("--full") or option("--shapes") in ("main", "grid"):
        works = [*(works if option("--full") else ()), *((shape, 200) for shape in MAIN)]
    peers = [p for p in option("--peer") or PEERS if p in PEERS]
    contenders = [*chosen_backends(option), *peers]
    metafunc.parametrize("work", works, ids=lambda w: f"{w[0]}-{w[1]}")
    metafunc.parametrize("contender", contenders)


class Search:
    """One contender's search on the inputs of a shape."""

    def __init__(self, shape: Shape, k: int, contender: str, device: str) -> None:
        problem = make_problem(*shape, device=device)
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
    some = torch.arange(
        0, len(indices), max(1, len(indices) // CHECKED_ROWS), device=indices.device
    )
    exact = search.vectors[some].double() @ search.bank.double().T
    chosen = exact.gather(1, indices[some])
    last = exact.topk(search.k, dim=1).values[:, -1:]
    assert bool((chosen >= last - NEAR).all()), "a row is not among the nearest"
    assert bool((indices[some].sort(1).values.diff(dim=1) > 0).all()), "a row occurs twice"
    error = float((similarities[some].double() - chosen).abs().max())
    assert error <= 1e-5, f"similarities are off by {error:.1e}"


_search: tuple[tuple, Search] | None = None  # of the other process


def prepare_elsewhere(*arguments) -> None:
    """In the other process: make and check a search, if it is not the last one."""
    global _search
    if _search is None or _search[0] != arguments:
        _search = arguments, Search(*arguments)
        check(_search[1])


def search_elsewhere() -> None:
    """The search alone: no inputs or results travel between processes."""
    _search[1]()


@pytest.fixture(scope="module")
def processes():
    """contender -> its process, kept for the next search."""
    with ExitStack() as stack:
        yield functools.cache(lambda contender: stack.enter_context(fresh_process()))


def bench_search(benchmark, report, ceilings, processes, request, device, work, contender):
    shape, k = work
    group = f"search {shape} k={k}"
    reason = absent(contender, device) if contender in PEERS else None
    if reason:
        report(Row(group, contender, note=reason))
        pytest.skip(reason)

    def prepared(name: str):
        if device == "cuda":
            search = Search(shape, k, name, device)
            check(search)
            return search
        process = processes(name)
        process.submit(prepare_elsewhere, shape, k, name, device).result()
        return lambda: process.submit(search_elsewhere).result()

    ours = next((b for b in OURS if b in chosen_backends(request.config.getoption)), None)
    benchmark.group = group
    timing = measure(
        benchmark,
        prepared(contender),
        None if ours in (None, contender) else prepared(ours),
        device=device,
        seconds=SECONDS,
        other_process=device == "cpu",
    )
    if timing is None:  # --benchmark-disable: the check alone
        return
    limits, cost = ceilings(group), search_cost(shape, k)
    seconds = timing.seconds
    floor = limits and limits.floor(cost)
    report(Row(group, contender, seconds, cost.flop, floor, over_ours=timing.over_ours))
    benchmark.extra_info.update(
        conditions(device),
        shape=list(shape),
        contender=contender,
        num_neighbors=k,
        flop=cost.flop,
        bytes=cost.bytes,
        gflops=cost.flop / seconds / 1e9,
        over_ours=timing.over_ours,
        **(limits.information(cost, seconds) if limits else {}),
    )
