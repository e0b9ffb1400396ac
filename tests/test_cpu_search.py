"""The search without sums: a screen in fixed point, then an exact comparison, and the way back."""

from __future__ import annotations

import math

import pytest
import torch
from loss_calls import run_statistics
from torch.nn.functional import normalize

from softcl.ops import cpu
from softcl.testing import KINDS, assert_neighbors_close, make_problem

pytest.importorskip("softcl._C", reason="softcl._C is not built")

# N, K, D, k: padded strips, odd D, a queue in splits, D beyond one block of the strip, k = 1.
SHAPES = [
    (1, 400, 16, 1),
    (33, 5000, 129, 7),
    (70, 3000, 64, 30),
    (5, 9001, 130, 200),
    (300, 3100, 515, 200),
]


def search(vectors, queue, k, temperature=0.1):
    return run_statistics(cpu, vectors, queue, temperature, k, sums=False)[3:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finds_the_nearest_rows(shape, kind, nan_filled_memory):
    N, K, D, k = shape
    p = make_problem(N, K, D, kind=kind)
    logits, indices = search(p.query, p.queue, k)
    assert_neighbors_close(logits, indices, p.query, p.queue, 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    p = make_problem(40, 4000, 96, dtype=dtype)
    logits, indices = search(p.query, p.queue, 50)
    assert_neighbors_close(logits, indices, p.query, p.queue, 0.1)
    wide = search(p.query.float(), p.queue.float(), 50)
    assert torch.equal(wide[0], logits)
    assert torch.equal(wide[1], indices)


def test_equal_rows_go_by_lowest_index():
    p = make_problem(20, 1000, 64)
    queue = p.queue.repeat(4, 1)  # every row four times
    logits, indices = search(p.query, queue, 40)
    assert_neighbors_close(logits, indices, p.query, queue, 0.1)
    groups = indices.view(20, 10, 4)
    assert torch.equal(groups % 1000, groups[..., :1].expand(-1, -1, 4) % 1000)
    assert torch.equal(groups // 1000, torch.arange(4).expand(20, 10, 4))
    assert bool((logits.view(20, 10, 4) == logits.view(20, 10, 4)[..., :1]).all())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads):
    p = make_problem(130, 6000, 48)
    before = torch.get_num_threads()
    expected = search(p.query, p.queue, 9)
    try:
        torch.set_num_threads(threads)
        got = search(p.query, p.queue, 9)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_vectors_of_any_length():
    """Only the queue's rows must be of unit norm: the vectors are divided by their norms."""
    p = make_problem(40, 3000, 64)
    lengths = torch.logspace(-6, 6, 40)[:, None]
    logits, indices = search(p.query * lengths, p.queue, 20)
    expected = search(p.query, p.queue, 20)
    torch.testing.assert_close(logits / lengths, expected[0], rtol=1e-5, atol=0)
    assert float((indices == expected[1]).float().mean()) > 0.999


@pytest.mark.parametrize(
    "queue",
    [
        normalize(torch.ones(3000, 64), dim=1),  # all equal: nothing can be told apart
        3.0 * make_problem(1, 3000, 64).queue,  # longer than the bound on the error allows
        normalize(torch.ones(3000, 64) + 1e-5 * torch.rand(3000, 64), dim=1),
    ],
    ids=["equal", "long", "close"],
)
def test_gives_way_to_the_exact_pass(queue):
    p = make_problem(40, 10, 64)
    logits, indices = search(p.query, queue, 20)
    exact = run_statistics(cpu, p.query, queue, 0.1, 20)[3:]
    assert torch.equal(logits, exact[0])
    assert torch.equal(indices, exact[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite(value):
    p = make_problem(40, 3000, 64)
    p.query[7, 3] = value
    p.query[9] = 0.0
    logits, indices = search(p.query, p.queue, 5)
    assert bool(logits[7].isnan().all())
    assert indices[7].tolist() == indices[9].tolist() == [0, 1, 2, 3, 4]
    assert logits[9].tolist() == [0.0] * 5
    rest = [i for i in range(40) if i not in (7, 9)]
    assert_neighbors_close(logits[rest], indices[rest], p.query[rest], p.queue, 0.1)
    p.queue[2000, 1] = value
    assert bool(search(p.query, p.queue, 5)[0].isnan().all())
