"""The compiled CPU loss against the float64 oracle, on shapes around every edge of its tiling."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from loss_calls import check_loss, pairs, run_loss, stretched

from softcl.labels import AdaptiveNeighborLabels, AdaptiveSoftLabels, HardLabels, NeighborLabels
from softcl.testing import (
    KINDS,
    RULES,
    Problem,
    fitting,
    loss_oracle,
    make_problem,
    random_rules,
    rule_name,
)

pytest.importorskip("softcl._C", reason="softcl._C is not built")
from softcl import native
from softcl.ops import cpu  # noqa: E402

# Strips hold 8, 16 or 32 rows, tiles 96, 48 or 24 queue rows (D <= 256, <= 1024, more), sums break
# at 64 and 256 dimensions, and queues from 1536 rows on are split between two threads.
SHAPES = [
    (1, 1, 1),
    (2, 3, 2),
    (16, 96, 64),
    (15, 95, 63),
    (17, 97, 65),
    (7, 191, 255),
    (33, 193, 257),
    (5, 49, 1025),
    (40, 1700, 24),
    (200, 1543, 16),
    (150, 500, 48),
]
F, B, H = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F, F), (F, B), (B, F), (B, B), (H, F), (H, H)]
TEMPERATURES = [(0.1, 0.05), (0.01, 0.01)]

run = functools.partial(run_loss, cpu)
# Half-precision inputs are summed in float32 too: the promise for float32 holds for all.
check = functools.partial(check_loss, cpu)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=lambda n: f"threads-{n}")
def num_threads(request, set_threads):
    set_threads(request.param)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_oracle(set_threads, shape):
    """Every rule at every shape; of all the rest, every two."""
    N, K, D = shape
    choices = RULES, DTYPES, TEMPERATURES, (True, False), (1, 2)
    for rule, dtypes, temperatures, positive, threads in pairs(*choices):
        set_threads(threads)
        p = make_problem(N, K, D, dtype=dtypes[0], queue_dtype=dtypes[1], seed=N + D)
        check(p, fitting(rule, K), *temperatures, positive=positive)


@pytest.mark.parametrize("normalize", [False, True], ids=["unit", "raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_rules_without_a_name(kind, normalize):
    p = make_problem(21, 300, 32, kind=kind)
    p = stretched(p) if normalize else p
    excluded = torch.arange(21) * 3 - 1
    for i, rule in enumerate(random_rules(20, seed=KINDS.index(kind))):
        options = dict(excluded=excluded) if i % 2 else dict(positive=i % 4 > 0)
        # Cosines near 1 and few labels: no averaging takes the rounding of a cosine away.
        check(p, rule, normalize=normalize, scale=2.0, **options)


@pytest.mark.parametrize("kind", ["clustered", "duplicates"])
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_sharp_labels(rule, kind):
    """Few large labels, clipped ones among them, and ties between the nearest rows."""
    check(make_problem(33, 1000, 128, kind=kind), rule, scale=2.0)


@pytest.mark.parametrize("dtype", [F, B, H], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_normalize(rule, dtype):
    """Raw projections give the loss of their rounded unit rows, and the gradient of the chain."""
    check(stretched(make_problem(19, 300, 40, dtype=dtype)), rule, normalize=True)


@pytest.mark.parametrize("length", [1e19, 1e30, 1e-10])
def test_normalize_rows_of_any_norm(length):
    """Squares over- and underflow; the norms do not."""
    p = make_problem(5, 60, 8)
    check(Problem(p.query * length, p.key * length, p.queue), AdaptiveSoftLabels(3), normalize=True)


def test_tiny_rows_have_no_gradient():
    p = make_problem(3, 10, 4)
    p.query[1] = 0.0
    p.query[2] *= 1e-20
    got = check(p, HardLabels(), normalize=True)
    assert not bool(got.dquery[1:].any())


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_same_bits_again_and_with_fewer_results(num_threads, rule):
    p = make_problem(70, 4000, 48)
    first = run(p, rule)
    for x, y in zip(first, run(p, rule), strict=True):
        assert torch.equal(x, y)
    loss, *rest = run(p, rule, gradient=False, diagnostics=False)
    # Dense labels read the teacher's mean, or else one number of it.
    torch.testing.assert_close(loss, first.loss, rtol=1e-6 if rule.needs_mean else 0.0, atol=0.0)
    assert [x.shape for x in rest] == [(0,)] * 4 + [(70, 0)]


def test_any_number_of_threads(set_threads):
    p = make_problem(50, 5000, 16)
    for threads in (1, 2, 3, 5, 8):
        set_threads(threads)
        check(p, AdaptiveSoftLabels(3))


@pytest.mark.parametrize("rule", [AdaptiveSoftLabels(0), NeighborLabels(0)], ids=rule_name)
def test_zero_neighbors_are_hard_labels(rule):
    p = make_problem(9, 100, 8)
    for x, y in zip(run(p, rule), run(p, HardLabels()), strict=True):
        assert torch.equal(x, y)


def test_equal_rows_do_not_outrank_the_positive():
    """A queue row with the bits of the key is not more similar than the positive."""
    p = make_problem(40, 500, 100)
    got = run(Problem(p.query, p.key, torch.cat([p.queue, p.key, p.key])), HardLabels())
    alone = run(p, HardLabels())
    own = p.query.double() @ p.key.double().T
    better = own > own.diagonal()[:, None] + 1e-6
    assert torch.equal(got.positive_rank, alone.positive_rank + 2 * better.sum(1))


@pytest.mark.parametrize("length", [1e-3, 30.0, 3e3])
def test_rows_that_are_not_unit(length):
    """Nothing over- or underflows where the bound on the logits does not hold."""
    p = make_problem(20, 700, 32)
    p = Problem(p.query * length, p.key * length, p.queue)
    for rule in (HardLabels(), AdaptiveSoftLabels(1)):
        got, oracle = run(p, rule), loss_oracle(p, rule)
        # A logit of size x carries a rounding of 6e-8 x, whatever the loss that is left of it; the
        # positive's is up to length^2 / 0.1, the loss is one of their differences.
        error = float((got.loss - oracle.loss).abs().max())
        assert error <= 2e-6 * max(1.0, length**2 / 0.1)
        assert bool(got.dquery.isfinite().all())


@pytest.mark.parametrize("rows", [4, 256])
def test_growing_logits_raise_the_offset(rows):
    """Ascending similarities at a low temperature: the running maximum moves many times."""
    p = make_problem(rows, 3000, 16)
    queue = p.queue[(p.query[0] @ p.queue.T).argsort()].contiguous()
    check(Problem(p.query, p.query.roll(1, 0), queue), AdaptiveSoftLabels(2), 0.005, 0.004)


def test_which_shapes_keep_their_weights():
    """The tests of this file visit both forms of the pass."""
    kept = native.load()[0].cpu_keeps_weights
    for threads in (1, 2):
        assert kept(256, 3000, 16, threads) and kept(256, 4096, 128, threads)
        assert kept(200, 1543, 16, threads) and kept(150, 500, 48, threads)
        assert not kept(4, 3000, 16, threads)  # too few rows for a second visit
        assert not kept(256, 65536, 128, threads)  # 16 MB of weights a strip
    assert not kept(256, 4096, 128, 64)  # threads would idle


@pytest.mark.parametrize(
    "shape", [(3, 2, 4), (9, 23, 9), (40, 769, 8), (150, 500, 48), (5, 2000, 8)], ids=str
)
def test_excluded(set_threads, shape):
    """Any row may be taken out of a query's queue: the first, the last, the nearest, or none."""
    N, K, D = shape
    p = make_problem(N, K, D, kind="clustered")
    excluded = (p.key @ p.queue.T).argmax(1)
    excluded[:3] = torch.tensor([0, K - 1, -1])
    choices = RULES, (0.05, 1e6), (True, False), (1, 2)
    for rule, teacher_temperature, gradient, threads in pairs(*choices):
        set_threads(threads)
        check(
            p, fitting(rule, K - 1), 0.1, teacher_temperature,
            excluded=excluded, gradient=gradient, scale=2.0,
        )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_non_finite_rows(rule, value):
    """A row gives NaN in its own results; a queue row gives NaN in all; indices stay in range."""
    p = make_problem(35, 2000, 20)
    clean = run(p, rule)
    others = torch.arange(35) != 17
    for broken in ("query", "key"):
        rows = getattr(p, broken).clone()
        rows[17, 3] = value
        got = run(Problem(**{**vars(p), broken: rows}), rule)
        for x, y in zip(got[:4], clean[:4], strict=True):
            if x.numel():
                assert bool(x[17].isnan().all())
                assert torch.equal(x[others], y[others])
        assert torch.equal(got.neighbor_indices[others], clean.neighbor_indices[others])
        assert in_range(got.neighbor_indices, 2000)
    p.queue[1999, 19] = value
    got = run(p, rule)
    assert all(bool(x.isnan().all()) for x in got[:4])
    assert in_range(got.neighbor_indices, 2000)


def in_range(indices, K):
    return bool(((indices >= 0) & (indices < K)).all())


def test_long_queue_keeps_its_accuracy():
    """Sums over 2^17 rows: rounding does not pile up."""
    p = make_problem(6, 1 << 17, 16)
    for rule in (AdaptiveSoftLabels(1), AdaptiveNeighborLabels(5)):
        check(p, rule)
