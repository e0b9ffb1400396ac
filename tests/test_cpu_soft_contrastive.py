"""The compiled CPU loss against the float64 oracle, on shapes around every edge of its tiling."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from loss_calls import (
    check_loss,
    exact_cosines,
    exact_statistics,
    normalized_oracle,
    pairs,
    rounded_units,
    run_loss,
    run_statistics,
    scale_at,
    stretched,
)

from softcl.labels import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    HardLabels,
    LabelRule,
    MixedLabels,
    NeighborLabels,
)
from softcl.testing import (
    LSE_TOLERANCE,
    RULES,
    Problem,
    assert_loss_close,
    fitting,
    gradient_error,
    loss_oracle,
    make_problem,
    random_rules,
    relative_error,
    rule_name,
)

pytest.importorskip("softcl._C", reason="softcl._C is not built")
from softcl.ops import cpu, native  # noqa: E402

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
ALL_RULES = [*RULES, MixedLabels(0.3, teacher_positive="zero"), *random_rules(6, seed=11)]
CASES = pairs(
    rule=ALL_RULES,
    shape=SHAPES,
    dtypes=[(F, F), (F, B), (B, F), (B, B), (H, F), (B, H)],
    temperatures=[(0.1, 0.05), (0.01, 0.01), (0.2, 1e6)],
    positive=[True, False],
    normalize=[False, True],
    excludes=[False, True],
    threads=[1, 2],
)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


run = functools.partial(run_loss, cpu)


def excluded_rows(p: Problem) -> torch.Tensor:
    """Any row may be taken out of a query's queue: the nearest, the first, the last, or none."""
    excluded = exact_cosines(p.key, p.queue).argmax(1)
    for n, row in enumerate((0, len(p.queue) - 1, -1)[: len(p.key)]):
        excluded[n] = row
    return excluded


@pytest.mark.parametrize("place", range(len(CASES)), ids=lambda i: rule_name(CASES[i]["rule"]))
def test_against_oracle(set_threads, place):
    case = CASES[place]
    N, K, D = case["shape"]
    row_dtype, queue_dtype = case["dtypes"]
    excludes = case["excludes"] and K > 1
    rule = fitting(case["rule"], K - excludes)
    set_threads(case["threads"])
    p = make_problem(N, K, D, dtype=row_dtype, queue_dtype=queue_dtype, seed=N + D)
    excluded = excluded_rows(p) if excludes else None
    options = dict(positive=case["positive"], excluded=excluded)
    temperature, teacher_temperature = case["temperatures"]
    numbers = dict(temperature=temperature, teacher_temperature=teacher_temperature)
    if case["normalize"]:
        raw = stretched(p)
        p = rounded_units(raw)
        oracle = normalized_oracle(raw, rule, **numbers, **options)
        got = run(raw, rule, **numbers, normalize=True, **options)
        norm = raw.query.double().norm(dim=1, keepdim=True)
        got = got._replace(dquery=got.dquery * norm)
    else:
        oracle = loss_oracle(p, rule, **numbers, **options)
        got = run(p, rule, **numbers, **options)
    # Half-precision inputs are summed in float32 too: the promise for float32 holds.
    scale = scale_at(temperature, teacher_temperature)
    check_loss(got, oracle, p, rule, F, temperature=temperature, excluded=excluded, scale=scale)
    loss, dquery, *rest = run(
        raw if case["normalize"] else p, rule, **numbers, **options,
        normalize=case["normalize"], gradient=False, diagnostics=False,
    )  # fmt: skip
    # Dense labels read the teacher's mean, or else one number of it.
    assert relative_error(loss, got.loss) <= (LSE_TOLERANCE * scale if rule.needs_mean else 0.0)
    assert [x.numel() for x in (dquery, *rest)] == [0] * 5


@pytest.mark.parametrize("kind", ["clustered", "duplicates"])
@pytest.mark.parametrize("rule", ALL_RULES, ids=rule_name)
def test_sharp_labels(rule, kind):
    """Few large labels, clipped ones among them, and ties between the nearest rows."""
    p = make_problem(33, 1000, 128, kind=kind)
    got, oracle = run(p, rule), loss_oracle(p, rule)
    # Cosines near 1 and few labels: no averaging takes the rounding of a cosine away.
    assert_loss_close(got.loss, got.dquery, oracle, F, scale=2.0)


def test_rows_of_extreme_lengths():
    """Squares that overflow float32; and rows without a direction, which have no gradient."""
    p = make_problem(6, 10, 4)
    lengths = torch.tensor([1e30, 1e-9, 1e19, 1.0, 0.0, 1e-20])[:, None]
    raw = Problem(p.query * lengths, p.key * lengths.flip(0), p.queue)
    for rule in (HardLabels(), AdaptiveSoftLabels(3)):
        got, oracle = run(raw, rule, normalize=True), loss_oracle(raw, rule, normalize=True)
        assert relative_error(got.loss, oracle.loss) <= LSE_TOLERANCE
        scaled = (got.dquery.double() * lengths)[:4], (oracle.dquery * lengths)[:4]
        assert gradient_error(*scaled, 0.1) <= 5e-6
        assert not bool(got.dquery[4:].any())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(70, 4000, 48), (150, 500, 48)], ids=str)
def test_same_bits_again(set_threads, shape, threads):
    set_threads(threads)
    p = make_problem(*shape)
    for rule in (HardLabels(), AdaptiveSoftLabels(7), AdaptiveNeighborLabels(5)):
        first = run(p, rule)
        for again in (run(p, rule), run(p, rule)):
            for x, y in zip(first, again, strict=True):
                assert torch.equal(x, y)


def test_any_number_of_threads(set_threads):
    p = make_problem(50, 5000, 16)
    rule = AdaptiveSoftLabels(3)
    oracle = loss_oracle(p, rule)
    for threads in (1, 2, 3, 5, 8):
        set_threads(threads)
        check_loss(run(p, rule), oracle, p, rule, F)


@pytest.mark.parametrize(
    "rule", [AdaptiveSoftLabels(0), NeighborLabels(0), LabelRule(neighbor=2.0), MixedLabels(1.0)]
)
def test_rules_without_a_second_term_are_hard_labels(rule):
    p = make_problem(9, 100, 8)
    for x, y in zip(run(p, rule), run(p, HardLabels()), strict=True):
        assert torch.equal(x, y)


def test_equal_rows_do_not_outrank_the_positive():
    """A queue row with the bits of the key is not more similar than the positive."""
    p = make_problem(40, 500, 100)
    got = run(Problem(p.query, p.key, torch.cat([p.queue, p.key, p.key])), HardLabels())
    own = exact_cosines(p.query, p.key)
    others = own > own.diagonal()[:, None] + 1e-6
    expected = run(p, HardLabels()).positive_rank + 2 * others.sum(1)
    assert torch.equal(got.positive_rank, expected)


@pytest.mark.parametrize("length", [1e-3, 30.0, 3e3])
def test_rows_that_are_not_unit(length):
    """Nothing over- or underflows where the bound on the logits does not hold."""
    p = make_problem(20, 700, 32)
    p = Problem(p.query * length, p.key * length, p.queue)
    for rule in (HardLabels(), AdaptiveSoftLabels(1), RULES[-1]):
        got, oracle = run(p, rule), loss_oracle(p, rule)
        # A logit of size x carries a rounding of 6e-8 x, whatever the loss that is left of it; the
        # positive's is up to length^2 / 0.1, the loss is one of their differences.
        assert float((got.loss - oracle.loss).abs().max()) <= 2e-6 * max(1.0, length**2 / 0.1)
        assert bool(got.dquery.isfinite().all())


@pytest.mark.parametrize("rows", [4, 256])
def test_growing_logits_raise_the_offset(rows):
    """Ascending similarities at a low temperature: the running maximum moves many times."""
    p = make_problem(rows, 3000, 16)
    queue = p.queue[(p.query[0] @ p.queue.T).argsort()].contiguous()
    p, rule = Problem(p.query, p.query.roll(1, 0), queue), AdaptiveSoftLabels(2)
    got = run(p, rule, 0.005, 0.004)
    oracle = loss_oracle(p, rule, temperature=0.005, teacher_temperature=0.004)
    assert_loss_close(got.loss, got.dquery, oracle, F, temperature=0.005, scale=scale_at(0.004))


def test_which_shapes_keep_their_weights():
    """The tests of this file visit both forms of the pass."""
    kept = native.load()[0].cpu_keeps_weights
    for threads in (1, 2):
        assert kept(256, 3000, 16, threads) and kept(256, 4096, 128, threads)
        assert kept(200, 1543, 16, threads) and kept(150, 500, 48, threads)
        assert not kept(4, 3000, 16, threads)  # too few rows for a second visit
        assert not kept(256, 65536, 128, threads)  # 16 MB of weights a strip
    assert not kept(256, 4096, 128, 64)  # threads would idle


@pytest.mark.parametrize("temperatures", [(0.1, 0.05), (1e6, 1e6)], ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 4), (9, 23, 9), (40, 769, 8), (5, 2000, 8)], ids=str)
def test_excluded_rows(set_threads, shape, temperatures):
    """The nearest row of each, in clusters, where leaving it in would show."""
    set_threads(1 + (shape[1] > 1536))
    N, K, D = shape
    p = make_problem(N, K, D, kind="clustered")
    excluded = excluded_rows(p)
    numbers = dict(temperature=temperatures[0], teacher_temperature=temperatures[1])
    for rule in ALL_RULES:
        rule = fitting(rule, K - 1)
        oracle = loss_oracle(p, rule, excluded=excluded, **numbers)
        got = run(p, rule, excluded=excluded, **numbers)
        check_loss(
            got, oracle, p, rule, F, temperature=temperatures[0], excluded=excluded, scale=2.0
        )


@pytest.mark.parametrize("threads", [1, 2])
def test_statistics_with_excluded_rows(set_threads, threads):
    set_threads(threads)
    for N, K, D, k in ((3, 2, 4, 1), (40, 700, 8, 90), (5, 1537, 8, 3)):
        p = make_problem(N, K, D, kind="duplicates")
        excluded = (p.query @ p.queue.T).argmax(1)
        excluded[0] = K - 1
        expected = exact_statistics(p.query, p.queue, 0.1, k, excluded=excluded)
        for sums in (True, False):
            got = run_statistics(cpu, p.query, p.queue, 0.1, k, sums=sums, excluded=excluded)
            assert not bool((got.neighbor_indices == excluded[:, None]).any())
            for x, y in zip(got[0 if sums else 3 : 4], expected[0 if sums else 3 : 4], strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [*RULES, MixedLabels(0.3, teacher_positive="zero")], ids=rule_name)
def test_rows_that_are_not_finite(set_threads, rule, value):
    """A row gives NaN in its own results; a queue row gives NaN in all; indices stay in range."""
    set_threads(1 + RULES.index(rule) % 2 if rule in RULES else 1)
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
        assert torch.equal(got.neighbor_indices[others], clean.neighbor_indices[others])
        assert bool(((got.neighbor_indices >= 0) & (got.neighbor_indices < 2000)).all())
    queue = p.queue.clone()
    queue[1999, 19] = value
    got = run(Problem(p.query, p.key, queue), rule)
    for x in got[:4]:
        assert bool(x.isnan().all())
    assert bool(((got.neighbor_indices >= 0) & (got.neighbor_indices < 2000)).all())


def test_long_queue_keeps_its_accuracy():
    """Sums over 2^17 rows: rounding does not pile up."""
    p = make_problem(6, 1 << 17, 16)
    for rule in (AdaptiveSoftLabels(1), AdaptiveNeighborLabels(5)):
        check_loss(run(p, rule), loss_oracle(p, rule), p, rule, F)
