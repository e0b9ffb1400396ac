"""Results that are kept between calls must not make the CPU backend take new memory every time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMON = """
import resource
import torch
from softcl import AdaptiveSoftLabels, soft_contrastive_loss
torch.set_num_threads(1)

def unit(rows, dim):
    return torch.nn.functional.normalize(torch.randn(rows, dim), dim=1)

def loss_of(query, key, queue, num_neighbors):
    return soft_contrastive_loss(query, key, queue, AdaptiveSoftLabels(num_neighbors),
                                 temperature=0.1, teacher_temperature=0.05, backend="cpu")

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
"""

STEPS = """
query, key, queue = unit(256, 64).requires_grad_(), unit(256, 64), unit(1024, 64)
kept = []

def steps(count):
    for _ in range(count):
        loss = loss_of(query, key, queue, 5)
        loss.backward()
        kept.append(loss.detach())

steps(10)
before = resident()
steps(200)
print(resident() - before)
"""

LARGE = """
small = unit(9, 1024)
loss_of(small, small, small, 1)
rows = unit(20_000, 1024)
before = resident()
with torch.no_grad():
    loss_of(rows, rows, small, 1)
print(resident() - before)
"""

# glibc as it is after a while: all from the heap, and what is free at its end stays. At first its
# thresholds move with every call, and with them, as with the hashes, where things lie.
HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "PYTHONHASHSEED": "0",
}

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


def growth(code: str, **environment: str) -> int:
    """Bytes that the process has grown by, as it prints them."""
    pytest.importorskip("softcl._C", reason="softcl._C is not built")
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_kept_losses_leave_no_holes_in_the_heap():
    """A workspace of malloc's, freed after each call, leaves a hole that the loss then occupies:
    the next call's workspace does not fit there."""
    # The steps' own tensors; a workspace for every step would be 400 MiB.
    assert growth(STEPS, **HEAP) < 16 << 20


def test_large_workspace_goes_back():
    """Query and key in strips alone are 156 MiB."""
    assert growth(LARGE) < 64 << 20
