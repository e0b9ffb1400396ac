"""Peak memory of the loss with its gradient, as the queue grows.

    pytest bench/bench_memory.py --benchmark-only [--full]

Rows stay, the queue grows: what makes an N x K matrix grows with it, the fused pass does not. On a
CPU the growth of one call is measured in a process of its own (memory.py); its time is that of one
call there, page faults included, and is not what bench_soft_contrastive.py reports. On a GPU
PyTorch's allocator counts.
"""

from __future__ import annotations

import pytest

from bench.bench_soft_contrastive import Step, check, prepare_elsewhere, step_elsewhere
from bench.machine import conditions
from bench.memory import available_memory, cuda_peak_increase, fresh_process
from bench.peers import AS_IT_COMES
from bench.shapes import DENSE, Shape, eager_bytes, name_of
from bench.table import OURS, Row
from softcl.testing import available_backends, make_problem

QUICK = tuple(Shape(256, K, 128) for K in (4096, 16384, 65536))
FULL = tuple(Shape(1024, K, 128) for K in (4096, 16384, 65536, 131072))

PEERS = {"cpu": (AS_IT_COMES, "chunked", "attention"), "cuda": ("eager", "chunked", "attention")}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    device = option("--device")
    shapes = FULL if option("--full") or option("--shapes") in ("main", "grid") else QUICK
    smallest = make_problem(2, 8, 4, device=device)
    ours = [b for b in available_backends(smallest, DENSE) if b in OURS]
    peers = [p for p in PEERS[device] if p in (option("--peer") or PEERS[device])]
    contenders = [*(option("--backend") or ours), *peers]
    metafunc.parametrize("shape", shapes, ids=str)
    metafunc.parametrize("contender", contenders, ids=lambda x: x.replace(" ", "-"))


@pytest.fixture
def process():
    with fresh_process() as pool:
        yield pool


def bench_peak_memory(benchmark, report, process, device, shape, contender):
    group = f"memory {shape} {name_of(DENSE)}"
    needed, free = eager_bytes(shape, DENSE), available_memory()
    if contender == AS_IT_COMES and needed > 0.7 * free:
        note = f"not run: needs about {needed / 1e9:.0f} GB"
        report(Row(group, contender, note=note))
        pytest.skip(note)
    work = shape, DENSE, contender, DTYPES[device], device
    if device == "cuda":
        step = Step(*work)
        check(step, step())
        peak = cuda_peak_increase(step)
    else:
        peak = process.submit(prepare_elsewhere, *work).result()

        def step():
            process.submit(step_elsewhere).result()

    benchmark.group = group
    benchmark.pedantic(step, rounds=1)
    if benchmark.stats is None:
        return
    report(Row(group, contender, benchmark.stats.stats.median, peak_bytes=peak))
    matrix = 4 * shape.N * shape.K
    benchmark.extra_info.update(
        conditions(device),
        shape=list(shape),
        contender=contender,
        peak_bytes=peak,
        matrix_bytes=matrix,
        matrices=None if peak is None else peak / matrix,
    )
