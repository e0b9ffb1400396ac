"""The compiled CPU loss against the float64 oracle, on shapes around every edge of its tiling."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from loss_calls import assert_ranks_close, fitting, name, run_loss

from softcl.labels import AdaptiveNeighborLabels, AdaptiveSoftLabels, HardLabels, NeighborLabels
from softcl.testing import (
    ENTROPY_TOLERANCE,
    LSE_TOLERANCE,
    RULES,
    Problem,
    assert_loss_close,
    gradient_error,
    loss_oracle,
    make_problem,
    relative_error,
)

pytest.importorskip("softcl._C", reason="softcl._C is not built")
from softcl.ops import cpu, reference  # noqa: E402

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
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


@pytest.fixture(params=[1, 2], ids=lambda n: f"threads-{n}")
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


run = functools.partial(run_loss, cpu)


@pytest.mark.parametrize("temperatures", [(0.1, 0.05), (0.01, 0.01)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_against_oracle(num_threads, rule, shape, temperatures):
    N, K, D = shape
    rule = fitting(rule, K)
    # One rounding of a cosine, 6e-8, moves a logit by 6e-8 / temperature; the promises are for
    # temperatures in use, and below them that rounding is all that is left.
    scale = max(1.0, 0.05 / min(temperatures))
    for i, (dtype, queue_dtype) in enumerate(DTYPES):
        p = make_problem(N, K, D, dtype=dtype, queue_dtype=queue_dtype, seed=N + D)
        for positive in (True, False) if i == 0 else (i % 2 == 0,):
            oracle = loss_oracle(
                p,
                rule,
                temperature=temperatures[0],
                teacher_temperature=temperatures[1],
                positive=positive,
            )
            got = run(p, rule, *temperatures, positive=positive)
            # Half-precision inputs are summed in float32 too: the promise for float32 holds.
            assert_loss_close(
                got[0],
                got[1],
                oracle,
                torch.float32,
                temperature=temperatures[0],
                scale=scale,
            )
            if rule.needs_softmax:
                assert relative_error(got[2], oracle[2]) <= scale * ENTROPY_TOLERANCE
                assert relative_error(got[3], oracle[3]) <= scale * ENTROPY_TOLERANCE
            else:
                assert got[2].shape == got[3].shape == (0,)
            assert torch.equal(got[5].sort(1).values, oracle[5].sort(1).values)
            assert_ranks_close(got[4], p)


@pytest.mark.parametrize("kind", ["clustered", "duplicates"])
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_sharp_labels(rule, kind):
    """Few large labels, clipped ones among them, and ties between the nearest rows."""
    p = make_problem(33, 1000, 128, kind=kind)
    got, oracle = run(p, rule), loss_oracle(p, rule)
    # Cosines near 1 and few labels: no averaging takes the rounding of a cosine away.
    assert_loss_close(got[0], got[1], oracle, torch.float32, scale=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_normalize(rule, dtype):
    """Raw projections give the loss of their rounded unit rows, and the gradient of the chain."""
    generator = torch.Generator().manual_seed(3)
    raw = make_problem(19, 300, 40, dtype=dtype)
    lengths = torch.rand(19, 1, generator=generator) * 50 + 0.01
    raw = Problem((raw.query * lengths).to(dtype), (raw.key * lengths.flip(0)).to(dtype), raw.queue)
    got = run(raw, rule, normalize=True)

    norm = raw.query.double().norm(dim=1, keepdim=True)
    unit = Problem(
        (raw.query.double() / norm).float().to(dtype),
        torch.nn.functional.normalize(raw.key.double(), dim=1).float().to(dtype),
        raw.queue,
    )
    loss, dz, *_ = loss_oracle(unit, rule)
    z = unit.query.double()
    du = (dz - z * (z * dz).sum(1, keepdim=True)) / norm
    assert relative_error(got[0], loss) <= LSE_TOLERANCE
    # Rows differ in length, and so do their gradients: each is judged by its own.
    for row in range(19):
        assert gradient_error(got[1][row : row + 1] * norm[row], du[row : row + 1] * norm[row]) <= (
            5e-6
        )


def test_tiny_rows_are_divided_by_the_floor():
    p = make_problem(3, 10, 4)
    query = p.query.clone()
    query[1] = 0.0
    query[2] *= 1e-20
    p = Problem(query, p.key, p.queue)
    got = run(p, HardLabels(), normalize=True)
    oracle = loss_oracle(p, HardLabels(), normalize=True)
    assert relative_error(got[0], oracle[0]) <= LSE_TOLERANCE
    assert gradient_error(got[1][:1], oracle[1][:1]) <= 5e-6
    assert not bool(got[1][1:].any())  # no direction, no gradient


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_same_bits_again_and_with_fewer_results(num_threads, rule):
    p = make_problem(70, 4000, 48)
    first = run(p, rule)
    for again in (run(p, rule), run(p, rule)):
        for x, y in zip(first, again, strict=True):
            assert torch.equal(x, y)
    loss, dquery, confidence, entropy, rank, neighbors = run(
        p, rule, gradient=False, diagnostics=False
    )
    # Dense labels read the teacher's mean, or else one number of it.
    torch.testing.assert_close(loss, first[0], rtol=1e-6 if rule.needs_mean else 0.0, atol=0.0)
    assert dquery.shape == confidence.shape == entropy.shape == rank.shape == (0,)
    assert neighbors.shape == (70, 0)


def test_any_number_of_threads():
    p = make_problem(50, 5000, 16)
    rule = AdaptiveSoftLabels(3)
    oracle = loss_oracle(p, rule)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            got = run(p, rule)
            assert_loss_close(got[0], got[1], oracle, torch.float32)
            assert torch.equal(got[5], oracle[5])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rule", [HardLabels(), AdaptiveSoftLabels(0), NeighborLabels(0)], ids=name)
def test_zero_neighbors_are_hard_labels(rule):
    p = make_problem(9, 100, 8)
    got, hard = run(p, rule), run(p, HardLabels())
    assert torch.equal(got[0], hard[0])
    assert torch.equal(got[1], hard[1])
    if rule.needs_softmax:
        entropy = loss_oracle(p, rule)[3]
        assert relative_error(got[3], entropy) <= ENTROPY_TOLERANCE


def test_equal_rows_do_not_outrank_the_positive():
    """A queue row with the bits of the key is not more similar than the positive."""
    p = make_problem(40, 500, 100)
    queue = torch.cat([p.queue, p.key, p.key])
    got = run(Problem(p.query, p.key, queue), HardLabels())
    alone = run(p, HardLabels())
    own = torch.stack(
        [
            (p.query.double() @ p.key.double().T)[i] > (p.query[i] @ p.key[i]) + 1e-6
            for i in range(40)
        ]
    )
    own.fill_diagonal_(False)
    assert torch.equal(got[4], alone[4] + 2 * own.sum(1))


@pytest.mark.parametrize("length", [1e-3, 30.0, 3e3])
def test_rows_that_are_not_unit(length):
    """Nothing over- or underflows where the bound on the logits does not hold."""
    p = make_problem(20, 700, 32)
    p = Problem(p.query * length, p.key * length, p.queue)
    for rule in (HardLabels(), AdaptiveSoftLabels(1)):
        got, oracle = run(p, rule), loss_oracle(p, rule)
        # A logit of size x carries a rounding of 6e-8 x, whatever the loss that is left of it; the
        # positive's is up to length^2 / 0.1, the loss is one of their differences.
        assert float((got[0] - oracle[0]).abs().max()) <= 2e-6 * max(1.0, length**2 / 0.1)
        assert bool(got[1].isfinite().all())


@pytest.mark.parametrize("rows", [4, 256])
def test_growing_logits_raise_the_offset(rows):
    """Ascending similarities at a low temperature: the running maximum moves many times."""
    p = make_problem(rows, 3000, 16)
    queue = p.queue[(p.query[0] @ p.queue.T).argsort()].contiguous()
    p = Problem(p.query, p.query.roll(1, 0), queue)
    got = run(p, AdaptiveSoftLabels(2), 0.005, 0.004)
    oracle = loss_oracle(p, AdaptiveSoftLabels(2), temperature=0.005, teacher_temperature=0.004)
    assert_loss_close(got[0], got[1], oracle, torch.float32, temperature=0.005, scale=12.5)


def test_which_shapes_keep_their_weights():
    """The tests of this file visit both forms of the pass."""
    kept = cpu._load()[0].cpu_keeps_weights
    for threads in (1, 2):
        assert kept(256, 3000, 16, threads) and kept(256, 4096, 128, threads)
        assert kept(200, 1543, 16, threads) and kept(150, 500, 48, threads)
        assert not kept(4, 3000, 16, threads)  # too few rows for a second visit
        assert not kept(256, 65536, 128, threads)  # 16 MB of weights a strip
    assert not kept(256, 4096, 128, 64)  # threads would idle


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
@pytest.mark.parametrize(
    "shape", [(3, 2, 4), (9, 23, 9), (40, 769, 8), (150, 500, 48), (5, 2000, 8)]
)
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_excluded(num_threads, rule, shape, gradient):
    """Any row may be taken out of a query's queue: the first, the last, the nearest, or none."""
    N, K, D = shape
    rule = fitting(rule, K - 1)
    p = make_problem(N, K, D, kind="clustered")
    excluded = (p.key @ p.queue.T).argmax(1)
    excluded[0], excluded[1], excluded[2] = 0, K - 1, -1
    oracle = loss_oracle(p, rule, excluded=excluded)
    got = run(p, rule, excluded=excluded, gradient=gradient)
    assert_loss_close(
        got[0], got[1] if gradient else None, oracle, torch.float32, temperature=0.1, scale=2.0
    )
    if rule.needs_softmax:
        assert relative_error(got[2], oracle[2]) <= ENTROPY_TOLERANCE
        assert relative_error(got[3], oracle[3]) <= ENTROPY_TOLERANCE
    assert torch.equal(got[5].sort(1).values, oracle[5].sort(1).values)
    assert not bool((got[5] == excluded[:, None]).any())
    assert_ranks_close(got[4], p, excluded)


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "search"])
def test_statistics_with_excluded_rows(num_threads, sums):
    for N, K, D, k in ((3, 2, 4, 1), (40, 700, 8, 90), (5, 1537, 8, 3)):
        p = make_problem(N, K, D, kind="duplicates")
        excluded = (p.query @ p.queue.T).argmax(1)
        excluded[0] = K - 1
        expected = reference.queue_statistics(
            p.query.double(), p.queue.double(), 0.1, k, excluded=excluded
        )
        got = cpu.queue_statistics(p.query, p.queue, 0.1, k, sums=sums, excluded=excluded)
        assert not bool((got[4] == excluded[:, None]).any())
        torch.testing.assert_close(got[3].double(), expected[3], rtol=1e-5, atol=1e-5)
        if sums:
            for x, y in zip(got[:3], expected[:3], strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_non_finite_rows(num_threads, rule, value):
    """A row gives NaN in its own results; a queue row gives NaN in all; indices stay in range."""
    p = make_problem(35, 2000, 20)
    clean = run(p, rule)
    for broken in ("query", "key"):
        rows = getattr(p, broken).clone()
        rows[17, 3] = value
        got = run(Problem(**{**p.__dict__, broken: rows}), rule)
        others = torch.arange(35) != 17
        for x, y in zip(got[:4], clean[:4], strict=True):
            if x.numel():
                assert bool(x[17].isnan().all())
                assert torch.equal(x[others], y[others])
        assert torch.equal(got[5][others], clean[5][others])
        assert bool(((got[5] >= 0) & (got[5] < 2000)).all())
    queue = p.queue.clone()
    queue[1999, 19] = value
    got = run(Problem(p.query, p.key, queue), rule)
    for x in got[:4]:
        assert bool(x.isnan().all())
    assert bool(((got[5] >= 0) & (got[5] < 2000)).all())


def test_long_queue_keeps_its_accuracy():
    """Sums over 2^17 rows: rounding does not pile up."""
    p = make_problem(6, 1 << 17, 16)
    for rule in (AdaptiveSoftLabels(1), AdaptiveNeighborLabels(5)):
        got, oracle = run(p, rule), loss_oracle(p, rule)
        assert_loss_close(got[0], got[1], oracle, torch.float32)
        assert relative_error(got[3], oracle[3]) <= ENTROPY_TOLERANCE
