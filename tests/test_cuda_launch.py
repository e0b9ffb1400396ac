"""How the CUDA kernels are launched, seen on the CPU: early or not, on which device, in how much
memory. tests/test_cuda_build.py looks at nvcc's code.
"""

from __future__ import annotations

import pytest
import torch
from cuda_host import load_host_module
from cuda_parts import check, run, statistics
from loss_calls import check_statistics

from softcl.labels import AdaptiveSoftLabels, HardLabels
from softcl.ops import cuda
from softcl.testing import GRADIENT_TOLERANCE, make_problem


@pytest.fixture
def host(monkeypatch):
    """The module of the kernels on the CPU, behind softcl.ops.cuda."""
    module = load_host_module()
    monkeypatch.setattr(cuda, "_load", lambda: (module, ""))
    module.set_options(seed=0)
    yield module
    module.set_capability(80)
    module.set_multiprocessors(2)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_no_kernel_is_launched_early_that_does_not_wait(host, capability):
    """Only the code for 9.0 waits for the grid before; what goes on without that is reported."""
    host.set_capability(capability)
    p = make_problem(5, 97, 40, dtype=torch.bfloat16)
    check(p, AdaptiveSoftLabels(3))
    check_statistics(
        cuda, p.query, p.queue, 0.1, 3, mean_tolerance=GRADIENT_TOLERANCE[torch.bfloat16]
    )


def test_no_device_is_set_that_is_current(host):
    """Setting one makes a context on it, and a process of many would have one on every GPU."""
    p = make_problem(2, 10, 8, dtype=torch.bfloat16)
    before = host.count_devices_set()
    run(p, HardLabels())
    statistics(p.query, p.queue, 0.1, 2)
    assert host.count_devices_set() == before


@pytest.mark.parametrize("queue_size", [65536, 1 << 20, 8_400_000, 1 << 30])
def test_workspace_of_a_large_search(host, queue_size):
    """On a whole GPU: the candidates of the rows in flight stay within 512 MiB, beside the chunk
    maxima of every row and its sums; no memory is read."""
    host.set_capability(90)
    host.set_multiprocessors(132)
    N = 4096
    size = host.cuda_run(
        query=1 << 20, queue=1 << 20, neighbor_logits=1 << 20, neighbor_indices=1 << 20,
        vector_type=1, queue_type=1, num_queries=N, queue_size=queue_size, dim=128,
        rule={"num_neighbors": 1024}, temperature=0.1, device=0, stream=0, workspace=0,
        workspace_bytes=0,
    )  # fmt: skip
    assert size <= (512 << 20) + N * (8192 + 64) * 4 + N * 2048
