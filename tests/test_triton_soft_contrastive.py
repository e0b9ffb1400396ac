"""The Triton loss against the float64 oracle, in the interpreter or on a GPU (`triton_device`)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from loss_calls import case_id, cosines_of, pairs, some_long, stretched
from triton_calls import check, on, run

from softcl.labels import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    DistillationLabels,
    HardLabels,
    LabelRule,
    MixedLabels,
    NeighborLabels,
)
from softcl.ops import triton
from softcl.testing import (
    KINDS,
    LSE_TOLERANCE,
    RULES,
    Problem,
    fitting,
    gradient_error,
    make_problem,
    random_rules,
    relative_error,
    rule_name,
)

pytestmark = pytest.mark.usefixtures("triton_device")

F, B, H = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F, F), (B, B), (H, H), (B, F), (F, B), (H, B), (B, H), (F, H), (H, F)]
# One row, one column, D below and between the tiles' widths, K below and just above a tile.
SHAPES = [(1, 1, 1), (3, 65, 32), (17, 64, 96), (9, 300, 130)]
TEMPERATURES = [(0.1, 0.05), (0.02, 0.04), (0.07, 0.07)]  # the running maximum below 0.023


ONE_OF_A_KIND = [HardLabels(), AdaptiveNeighborLabels(2), AdaptiveSoftLabels(2)]


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_oracle(triton_device, shape, half):
    """Both halves together: every two of shapes, rules, dtypes, temperatures and the positive."""
    N, K, D = shape
    rows = pairs(SHAPES, RULES, DTYPES, TEMPERATURES, (True, False))
    for _, rule, dtypes, temperatures, positive in [x for x in rows if x[0] == shape][half::2]:
        p = make_problem(N, K, D, dtype=dtypes[0], queue_dtype=dtypes[1], seed=N + D)
        check(on(triton_device, p), fitting(rule, K), *temperatures, positive=positive)


@pytest.mark.parametrize("kind", KINDS)
def test_rules_without_a_name(triton_device, kind):
    p = on(triton_device, make_problem(5, 130, 24, kind=kind))
    excluded = torch.tensor([0, 129, -1, 64, 3], device=triton_device)
    count = 2 if kind == "duplicates" else 6  # ties take the interpreter long
    for i, rule in enumerate(random_rules(count, seed=KINDS.index(kind))):
        options = dict(excluded=excluded) if i % 2 else dict(positive=i % 4 > 0)
        scale = 2.0  # as in test_sharp_labels
        if rule.clip and rule.adds_neighbors:
            # Clipping may take nearly all of a mu away; the rounding of mu stays.
            mass = rule.mean + rule.confident_mean
            scale *= max(1.0, mass / (rule.positive * rule.num_neighbors))
        check(p, rule, scale=scale, **options)


@pytest.mark.parametrize(("entry", "dtype"), [("zero", F), ("self", B)], ids=str)
def test_positive_in_the_teachers_softmax(triton_device, entry, dtype):
    """Its share is half and more in a small queue, and next to nothing in one without it."""
    own = dict(teacher_positive=entry)
    for rule in (
        MixedLabels(0.3, **own),
        LabelRule(positive=0.0, mean=1.0, **own),
        LabelRule(mean=0.5, confident_mean=3.0, clip=True, num_neighbors=3, **own),
        LabelRule(mean=0.5, neighbor=0.2, confident_neighbor=1.0, num_neighbors=2, **own),
    ):
        for K, kind, temperature in ((3, "random", 1.0), (200, "clustered", 0.04)):
            p = on(triton_device, make_problem(4, K, 24, kind=kind, dtype=dtype))
            check(p, rule, 0.1, temperature, scale=2.0)
            check(p, rule, 0.1, 0.01, positive=False, scale=2.0)


@pytest.mark.parametrize("positive", [0.3, 0.7, 3.0])
def test_labels_of_the_positive_alone_are_hard(triton_device, positive):
    """To the bit: without confidence, in a queue of one row, m = t, and t - m takes no part."""
    p = on(triton_device, make_problem(5, 1, 24))
    hard = run(p, HardLabels())
    rule = LabelRule(positive=positive, confident_mean=2.0, clip=True, num_neighbors=1)
    for got in (run(p, LabelRule(positive=positive)), run(p, rule)):
        assert torch.equal(got.loss, hard.loss) and torch.equal(got.dquery, hard.dquery)


TARGETS = ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"]
TILES = list(itertools.product(TARGETS, (F, B, H), ONE_OF_A_KIND))
FEW_TILES = pairs(TARGETS, (F, B, H), ONE_OF_A_KIND)


@pytest.mark.parametrize(
    ("target", "dtype", "rule"),
    some_long(TILES, FEW_TILES.__contains__),
    ids=case_id,
)
def test_tiles_of_every_architecture(triton_device, monkeypatch, target, dtype, rule):
    """The interpreter runs the tiles that each architecture would take."""
    if triton_device == "cuda":
        pytest.skip("other architectures' tiles need not fit here")
    monkeypatch.setattr(triton, "target_of", lambda device: (target, 132))
    D = {F: 40, B: 128, H: 64}[dtype]
    check(make_problem(3, 200, D, dtype=dtype), rule)


IN_PIECES = [(F, F), (B, F), (H, F), (F, H)]


@pytest.mark.parametrize("dtypes", IN_PIECES, ids=str)
@pytest.mark.parametrize("rule", ONE_OF_A_KIND, ids=rule_name)
def test_tiles_in_pieces(triton_device, monkeypatch, dtypes, rule):
    """fp32 at D > 128 on Hopper and Blackwell: two to four pieces, the last not always full.

    Architectures, D, temperatures and excluded rows go round.
    """
    if triton_device == "cuda":
        pytest.skip("other architectures' tiles need not fit here")
    d, r = IN_PIECES.index(dtypes), ONE_OF_A_KIND.index(rule)
    target, D = ("sm_90", "sm_100")[(d + r) % 2], (256, 192, 130)[(d + 2 * r) % 3]
    monkeypatch.setattr(triton, "target_of", lambda device: (target, 132))
    p = make_problem(3, 70, D, dtype=dtypes[0], queue_dtype=dtypes[1])
    excluded = torch.tensor([69, -1, 0]) if (d // 2 + r) % 2 else None
    check(p, rule, *TEMPERATURES[(2 * d + r) % 3], excluded=excluded)


LAYOUTS = [
    ("interpreter", 0.01), ("interpreter", 1e6), ("sm_90", 0.05), ("sm_90", 0.01), ("sm_80", 0.05)
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "rule"),
    some_long(
        list(itertools.product(LAYOUTS, RULES)),
        lambda case: (LAYOUTS.index(case[0]) + RULES.index(case[1])) % 3 == 0,
    ),
    ids=case_id,
)
def test_excluded_row(triton_device, monkeypatch, layout, rule):
    """The nearest row, the last one, none: in every layout of the tiles, in a split of its own."""
    target, temperature = layout
    if triton_device == "cpu":
        monkeypatch.setattr(triton, "target_of", lambda device: (target, 2))
    elif target != "interpreter":
        pytest.skip("other architectures' tiles need not fit here")
    p = make_problem(5, 129, 24, kind="clustered", dtype=B if target == "sm_90" else H)
    excluded = (p.key.double() @ p.queue.double().T).argmax(1)
    excluded[2:4] = torch.tensor([128, -1])
    p, excluded = on(triton_device, p), excluded.to(triton_device)
    check(p, rule, 0.1, temperature, excluded=excluded, scale=2.0)  # as in test_sharp_labels


def test_one_row_left(triton_device):
    """A queue of two rows without one of them says nothing about relations: no confidence."""
    p = on(triton_device, make_problem(3, 2, 8))
    excluded = torch.tensor([0, 1, -1], device=triton_device)
    for rule in (AdaptiveSoftLabels(1), AdaptiveNeighborLabels(1), HardLabels()):
        check(p, rule, excluded=excluded)
    assert run(p, AdaptiveSoftLabels(1), excluded=excluded)[2][:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_split_queue(triton_device, monkeypatch, multiprocessors, temperature):
    """Any number of splits, a short last one too."""
    target, _ = triton.target_of(torch.device(triton_device, 0))
    monkeypatch.setattr(triton, "target_of", lambda device: (target, multiprocessors))
    p = on(triton_device, make_problem(2, 1111, 16))
    check(p, AdaptiveSoftLabels(3), 0.1, temperature)


@pytest.mark.parametrize("kind", ["clustered", "duplicates"])
def test_sharp_labels(triton_device, kind):
    """Few large labels, clipped ones among them, and ties between the nearest rows."""
    p = on(triton_device, make_problem(5, 250, 64, kind=kind))
    for rule in (AdaptiveSoftLabels(7), AdaptiveNeighborLabels(5), NeighborLabels(3)):
        # Cosines near 1 and few labels: no averaging takes the rounding of a cosine away.
        check(p, rule, scale=2.0)


@pytest.mark.parametrize("dtype", [F, B, H], ids=str)
@pytest.mark.parametrize(
    "rule", [HardLabels(), AdaptiveSoftLabels(2), DistillationLabels()], ids=rule_name
)
def test_normalize(triton_device, rule, dtype):
    """Raw projections give the loss of their rounded unit rows, and the gradient of the chain."""
    p = stretched(make_problem(11, 150, 40, dtype=dtype))
    check(on(triton_device, p), rule, normalize=True)


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_same_bits_again_and_with_fewer_results(triton_device, rule):
    p = on(triton_device, make_problem(4, 150, 24))
    first, again = run(p, rule), run(p, rule)
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x, y)
    loss, *rest = run(p, rule, gradient=False, diagnostics=False)
    # Without a gradient the labels' z.mu needs no mean, and other products run: not the same bits.
    assert relative_error(loss, first.loss) <= LSE_TOLERANCE
    assert [x.shape for x in rest] == [(0,)] * 4 + [(4, 0)]


def test_zero_neighbors_are_hard_labels(triton_device):
    p = on(triton_device, make_problem(3, 70, 8))
    hard = run(p, HardLabels())
    for rule in (AdaptiveSoftLabels(0), NeighborLabels(0)):
        got = run(p, rule)
        assert relative_error(got[0], hard[0]) <= LSE_TOLERANCE
        assert gradient_error(got[1], hard[1]) <= LSE_TOLERANCE


@pytest.mark.parametrize("dtype", [F, B], ids=str)
def test_equal_rows_do_not_outrank_the_positive(triton_device, dtype):
    """A queue row with the bits of the key is not more similar than the positive."""
    p = make_problem(20, 100, 100, dtype=dtype)
    queue = torch.cat([p.queue, p.key, p.key])
    p = on(triton_device, Problem(p.query, p.key, queue))
    exact = cosines_of(p.query, p.queue, None)
    own = (p.query.double() * p.key.double()).sum(1, keepdim=True)
    near = (exact - own).abs() < 1e-6
    rank = run(p, HardLabels())[4]
    assert bool((rank == ((exact > own) & ~near).sum(1)).all())
    assert int(near.sum()) >= 40


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_rows(triton_device, value):
    """A row gives NaN in its own results; a queue row gives NaN in all; indices stay in range."""
    rule = AdaptiveSoftLabels(2)
    p = make_problem(6, 140, 20)
    clean = run(on(triton_device, p), rule)
    rows = p.key.clone()
    rows[3, 3] = value
    got = run(on(triton_device, Problem(p.query, rows, p.queue)), rule)
    others = [0, 1, 2, 4, 5]
    for x, y in zip(got[:4], clean[:4], strict=True):
        assert bool(x[3].isnan().all())
        assert torch.equal(x[others], y[others])
    assert bool(((got[5] >= 0) & (got[5] < 140)).all())
    queue = p.queue.clone()
    queue[139, 19] = value
    got = run(on(triton_device, Problem(p.query, p.key, queue)), rule)
    assert all(bool(x.isnan().all()) for x in got[:4])
    assert bool(((got[5] >= 0) & (got[5] < 140)).all())


def test_more_products_than_32_bits_count(triton_device):
    """N K and K D beyond 2^31: rows at both ends of the queue have their say."""
    if triton_device == "cpu":
        pytest.skip("needs a GPU: 5 GB, and 10^13 operations")
    N, K, D = 200, (1 << 24) + 77, 128
    generator = torch.Generator(device="cuda").manual_seed(0)
    queue = torch.empty(K, D, device="cuda", dtype=B)
    for piece in queue.split(1 << 20):
        piece.copy_(torch.randn(piece.shape, generator=generator, device="cuda"))
        piece.copy_(torch.nn.functional.normalize(piece.float(), dim=1))
    p = make_problem(N, 8, D, dtype=B, device="cuda")
    nearest = torch.randint(K - 1000, K, (N,), generator=generator, device="cuda")
    queue[nearest] = p.key
    got = run(Problem(p.query, p.key, queue), AdaptiveSoftLabels(1))
    assert torch.equal(queue[got[5][:, 0]], p.key)
    log_sum = torch.full((N,), -math.inf, device="cuda", dtype=torch.float64)
    for piece in queue.split(1 << 18):
        logits = (p.query.double() @ piece.double().T) / 0.1
        log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
    loss = run(Problem(p.query, p.key, queue), HardLabels())[0]
    positive = (p.query.double() * p.key.double()).sum(1) / 0.1
    assert relative_error(loss, torch.logaddexp(log_sum, positive) - positive) <= LSE_TOLERANCE
