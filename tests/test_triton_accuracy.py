"""What the Triton loss promises, on tensor cores that cut their sums off (tensor_cores.py).

Largest error of the gradient, simulated (N = 4, D = 128 if nothing else is said, sm_90's tiles, two
programs; fp32's promise is 2e-6, the others' 1e-3). Before: the means of all tiles in one sum, of
any length.

    rows and queue        K        random      clustered
    fp32, before          8192     1.5e-5      1.2e-4
    fp32, before          65536    9.8e-5      2.7e-4 and more
    fp32                  8192     4.5e-7      9.8e-7
    fp32                  65536    2.8e-7      7.0e-7
    bf16                  8192     3.2e-5      7.0e-5
    bf16                  65536    3.1e-5      4.0e-4
    fp16                  8192     2.7e-5      7.6e-5
    fp16                  65536    2.5e-5      4.5e-4
    fp32, D = 1024        8192     5.6e-7      1.9e-6
    bf16, D = 1024        8192     2.1e-5      2.0e-4
    fp16, D = 1024        8192     1.6e-5      2.4e-4
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from loss_calls import run_loss, some_long
from tensor_cores import add_products, cut_off_sums

from softcl.labels import HardLabels, RelationalLabels
from softcl.ops import triton
from softcl.testing import assert_loss_close, loss_oracle, make_problem

pytestmark = pytest.mark.usefixtures("triton_device")

F, B, H = torch.float32, torch.bfloat16, torch.float16


def test_sums_are_cut_off():
    """Eight numbers of 1's last place stay, and eight of less than half of it go."""
    last = np.float32(2.0**-23)
    a, b, c = np.ones((1, 8), np.float32), np.full((8, 1), last), np.ones((1, 1), np.float32)
    assert add_products(a, b, c) == 1.0 + 8 * last
    assert add_products(a, 0.49 * b, c) == 1.0
    assert add_products(a, -0.49 * b, -c) == -1.0
    a, b = (np.random.default_rng(0).standard_normal(shape) for shape in ((3, 24), (24, 5)))
    exact = a @ b
    got = add_products(a.astype(np.float32), b.astype(np.float32), np.zeros((3, 5), np.float32))
    assert 1e-8 < float(np.abs(got - exact).max()) < 5e-6


LENGTHS = [(600, 128), (65536, 128), (600, 1024), (8192, 1024)]  # K, D
KINDS = ["clustered", "random"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("length", "kind"),
    some_long(list(itertools.product(LENGTHS, KINDS)), [(LENGTHS[0], KINDS[0])].__contains__),
    ids=str,
)
def test_a_long_queue_keeps_the_promise(triton_device, monkeypatch, length, kind):
    """Of a device whose every program would take as much of the queue as it may."""
    if triton_device == "cuda":
        pytest.skip("GPUs add as they do")
    cut_off_sums(monkeypatch)
    monkeypatch.setattr(triton, "target_of", lambda device: ("sm_90", 1))
    for row_dtype, queue_dtype in ((F, F), (F, B), (B, B), (H, H)):
        p = make_problem(4, *length, kind=kind, dtype=row_dtype, queue_dtype=queue_dtype, seed=3)
        for rule in (HardLabels(), RelationalLabels()):
            got = run_loss(triton, p, rule, diagnostics=False)
            assert_loss_close(got.loss, got.dquery, loss_oracle(p, rule), row_dtype)


def test_splits_are_short():
    """Shorter for fp32; without means there is no need, and of very many rows no room."""
    from softcl.kernels.plan import (
        LONGEST_FP32_SPLIT,
        LONGEST_SPLIT,
        MOST_MEAN_BYTES,
        Work,
        make_plan,
    )

    def plan_of(N, dtype, **more):
        return make_plan(Work(N, 1 << 17, 128, dtype, B, has_key=True, **more), "sm_90", 1)

    def rows(plan):
        return plan.tiles_per_split * plan.config.BLOCK_K

    assert rows(plan_of(64, F)) <= LONGEST_FP32_SPLIT
    assert LONGEST_FP32_SPLIT < rows(plan_of(64, B)) <= LONGEST_SPLIT
    assert rows(plan_of(64, F, mean=False)) > LONGEST_SPLIT
    many = plan_of(1 << 18, F)
    assert many.splits * (1 << 18) * 128 * 4 <= MOST_MEAN_BYTES
