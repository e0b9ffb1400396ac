"""Results that are kept between calls must not make the CPU backend take new memory every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import resource
import torch
from softcl import AdaptiveSoftLabels, soft_contrastive_loss
torch.set_num_threads(1)

def unit(rows):
    return torch.nn.functional.normalize(torch.randn(rows, 64), dim=1)

query, key, queue = unit(256).requires_grad_(), unit(256), unit(1024)
kept = []

def steps(count):
    for _ in range(count):
        loss = soft_contrastive_loss(query, key, queue, AdaptiveSoftLabels(5), temperature=0.1,
                                     teacher_temperature=0.05, backend="cpu")
        loss.backward()
        kept.append(loss.detach())

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

steps(10)
before = resident()
steps(200)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_kept_losses_leave_no_holes_in_the_heap():
    """A workspace of malloc's, freed after each call, leaves a hole that the loss then occupies:
    the next call's workspace does not fit there."""
    pytest.importorskip("softcl._C", reason="softcl._C is not built")
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    # The steps' own tensors; a workspace for every step would be 450 MiB.
    assert int(done.stdout) < 32 << 20
