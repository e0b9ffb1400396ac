"""Every instruction set that runs here, forced in a process of its own, and the OpenMP runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_C = pytest.importorskip("softcl._C", reason="softcl._C is not built")

CHECK = """
import sys
import torch
sys.path.insert(0, "tests")
from loss_calls import check_loss, check_statistics
from softcl import native
from softcl.ops import cpu
from softcl.testing import RULES, fitting, make_problem
torch.set_num_threads(2)
for i, (N, K, D) in enumerate(((1, 1, 1), (17, 97, 65), (70, 2000, 130), (200, 500, 40))):
    p = make_problem(N, K, D, queue_dtype=torch.bfloat16)
    for j, rule in enumerate(RULES):
        if (i + j) % 2 and K > 1:
            check_loss(cpu, p, fitting(rule, K - 1), excluded=torch.arange(N) % K)
        else:
            check_loss(cpu, p, fitting(rule, K))
    check_statistics(cpu, p.query, p.queue, 0.1, min(K, 100))
print(native.load()[0].isa())
"""

MAPS = """
import {first}
import {second}
import torch
import softcl._C
names = {{line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'iomp' in line}}
torch.ones(1000, 1000).sum()
print(len(names), softcl._C.openmp_threads(), *names)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("isa", _C.available_isas())
def test_forced(isa):
    done = python(CHECK, SOFTCL_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


def test_best_by_default():
    environment = {k: v for k, v in os.environ.items() if k != "SOFTCL_CPU_ISA"}
    code = "import softcl._C as C; print(C.isa(), *C.available_isas())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    chosen, *available = done.stdout.split()
    assert chosen == available[0]
    assert available[-1] == "portable"


def test_unknown_is_refused_with_the_names():
    code = (
        "from softcl import *; from softcl.testing import make_problem; p = make_problem(2, 3, 4);"
        "print(choose_backend(p.query, p.queue).reasons)"
    )
    done = python(code, SOFTCL_CPU_ISA="sse9")
    assert done.returncode == 0, done.stderr
    assert "SOFTCL_CPU_ISA=sse9" in done.stdout
    assert "portable" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("first, second", [("torch", "softcl._C"), ("softcl", "torch")])
def test_one_openmp_runtime(first, second):
    """Two runtimes would keep two pools of threads spinning against each other."""
    done = python(MAPS.format(first=first, second=second), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    count, threads, *names = done.stdout.split()
    assert int(count) <= 1, names
    assert int(threads) in (1, 2)  # 1: built without OpenMP
