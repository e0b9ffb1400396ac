"""A long queue, on tensor cores that cut their sums off, as the emulated ones do: splits are as
short as the sums of means ask for.
"""

from __future__ import annotations

import pytest
import torch
from cuda_host import load_host_module
from cuda_parts import check, run

from softcl.labels import AdaptiveSoftLabels, HardLabels, RelationalLabels
from softcl.ops import cuda
from softcl.testing import GRADIENT_TOLERANCE, gradient_error, loss_oracle, make_problem


@pytest.fixture
def host(monkeypatch):
    """The kernels on the CPU: of a device whose every block would take the whole queue."""
    module = load_host_module()
    monkeypatch.setattr(cuda, "_load", lambda: (module, ""))
    module.set_options(seed=0)
    module.set_multiprocessors(1)
    yield module
    module.set_capability(80)
    module.set_multiprocessors(2)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "queue_size"), [(torch.float32, 8192), (torch.bfloat16, 65536)], ids=str
)
def test_a_long_queue_keeps_the_promise(host, capability, dtype, queue_size):
    """Of rows around a few directions: where sums grow. One split would be off by more."""
    host.set_capability(capability)
    p = make_problem(16, queue_size, 128, kind="clustered", dtype=dtype, seed=3)
    for rule in (HardLabels(), RelationalLabels())[dtype is not torch.float32 :]:
        got = run(p, rule, 0.1, 0.05, diagnostics=False)
        oracle = loss_oracle(p, rule, temperature=0.1, teacher_temperature=0.05)
        error = gradient_error(got.dquery, oracle.dquery, 0.1)
        assert error <= GRADIENT_TOLERANCE[dtype], f"{rule}: off by {error:.2e}"


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("queue_size", [1, 2049, 8193, 65536, 131072])
def test_splits_are_short_in_parts(host, queue_size, hopper):
    """Of other types there is no need, and of very many rows no room for so many means."""

    def rows_of(num_rows, kernel_type):
        plan = host.plan(num_rows, queue_size, 128, True, 2, 0, 1, kernel_type, hopper)
        if hopper:
            return plan[1] * host.hopper_shape(128, True, 2, kernel_type)[1]
        return plan[1] * (32 if kernel_type == 0 else 64)

    most = 4096 if hopper else 2048
    assert rows_of(4096, 0) <= most
    if queue_size > most:
        assert min(rows_of(4096, 1), rows_of(1 << 20, 0)) > most


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipped_labels_at_low_temperatures(host, capability, dtype):
    """What clips a label is a sum of the neighbours' own: it fits theirs at any temperature."""
    host.set_capability(capability)
    for kind in ("random", "clustered"):
        p = make_problem(13, 181, 64, kind=kind, dtype=dtype)
        check(p, AdaptiveSoftLabels(7), 0.1, 1e-4)
        # A cosine of 22 bits is 2e-3 of a logit.
        check(p, AdaptiveSoftLabels(7), 1e-4, 1e-4, positive=False, scale=2.0)
