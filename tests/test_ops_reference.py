"""The reference against the dense formula from the labels' definition, and finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import normalize

from softcl import (
    AdaptiveSoftLabels,
    DistillationLabels,
    HardLabels,
    MixedLabels,
    NeighborLabels,
    queue_statistics,
    soft_contrastive_loss,
)
from softcl.ops import algebra, reference
from softcl.ops.call import LossCall
from softcl.testing import (
    KINDS,
    RULES,
    Problem,
    dense_labels,
    fitting,
    loss_oracle,
    make_problem,
    random_rules,
    rule_name,
    statistics_oracle,
)

SHAPES = [(5, 211, 16), (1, 9, 3), (7, 64, 33), (3, 8, 5), (2, 1, 4)]
CASES = list(itertools.product(SHAPES, KINDS))


@pytest.mark.parametrize("rule", [*RULES, *random_rules(5, seed=1)], ids=rule_name)
@pytest.mark.parametrize("normalized", [False, True])
def test_loss_gradient_and_diagnostics_equal_the_dense_formula(rule, normalized):
    for (shape, kind), positive, tau in itertools.product(CASES, (True, False), (0.1, 0.02)):
        case, here = (shape, kind, positive, tau), fitting(rule, shape[1])
        p = make_problem(*shape, kind=kind, dtype=torch.float64)
        p = Problem(p.query * 3.0, p.key * 0.5, p.queue) if normalized else p
        options = dict(temperature=tau, teacher_temperature=0.05, positive=positive)
        query = p.query.clone().requires_grad_()
        loss, shown = soft_contrastive_loss(
            query, p.key, p.queue, here, normalize=normalized, reduction="none", diagnostics=True,
            backend="reference", **options,
        )  # fmt: skip
        oracle = loss_oracle(p, here, normalize=normalized, **options)
        torch.testing.assert_close(loss, oracle.loss, rtol=1e-11, atol=1e-11, msg=f"{case}")
        weights = torch.linspace(0.5, 2.0, len(loss), dtype=loss.dtype)
        (loss * weights).sum().backward()
        expected = weights[:, None] * oracle.dquery
        torch.testing.assert_close(query.grad, expected, rtol=1e-9, atol=1e-10, msg=f"{case}")
        assert torch.equal(shown.positive_rank, oracle.positive_rank), case
        if here.num_neighbors:
            assert torch.equal(shown.neighbor_indices, oracle.neighbor_indices), case
        else:
            assert shown.neighbor_indices is None
        for name in ("confidence", "entropy"):
            found = getattr(shown, name)
            assert (found is not None) == here.needs_softmax
            if found is not None:
                torch.testing.assert_close(found, getattr(oracle, name), rtol=0, atol=1e-11)


def test_the_oracle_reads_as_the_papers_do():
    """ASCL, SCE's code, SEED and ASCL's hard neighbours, written out for one row."""
    p = make_problem(1, 12, 6, kind="clustered", dtype=torch.float64)
    d = (p.key @ p.queue.T / 0.05)[0]
    own = torch.tensor([20.0], dtype=torch.float64)  # 1 / 0.05
    q = d.softmax(0)
    c = 1 + float((q * q.log()).sum()) / math.log(12)
    best = d.topk(3).indices
    ascl = torch.cat([torch.ones(1), (c * 3 * q).clamp(max=1.0)])
    sce = 0.7 * torch.cat([torch.zeros(1), d]).softmax(0)
    sce[0] += 0.3
    hard = torch.zeros(13).double()
    hard[0] = hard[1 + best] = 1.0
    seed = torch.cat([own, d]).softmax(0)
    rules = (
        (AdaptiveSoftLabels(3), ascl),
        (MixedLabels(0.3, teacher_positive="zero"), sce),
        (NeighborLabels(3), hard),
        (DistillationLabels(), seed),
    )
    for rule, expected in rules:
        found = dense_labels(rule, d[None], own[None]).labels[0]
        torch.testing.assert_close(found, (expected / expected.sum()).to(found.dtype))


def test_clipped_labels_occur_in_these_problems():
    """The clustered problems really exercise min(1, c n q): some labels are clipped."""
    p = make_problem(5, 8, 16, kind="clustered", dtype=torch.float64)
    labels = dense_labels(
        AdaptiveSoftLabels(7), p.key @ p.queue.T / 0.05, torch.full((5, 1), 20.0).double()
    ).labels
    assert bool((labels[:, 1:] == labels[:, :1]).any())


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_gradcheck(rule):
    p = make_problem(4, 23, 6, kind="clustered", dtype=torch.float64)
    lengths = torch.tensor([[0.5], [1.0], [3.0], [2.0]], dtype=torch.float64)

    def loss(query):
        return soft_contrastive_loss(
            query, p.key, p.queue, rule, temperature=0.2, teacher_temperature=0.1, normalize=True,
            reduction="none", backend="reference",
        )  # fmt: skip

    raw = (p.query * lengths).requires_grad_()
    assert torch.autograd.gradcheck(loss, raw, check_forward_ad=True)


def test_gradcheck_of_queue_statistics():
    p = make_problem(4, 23, 6, dtype=torch.float64)
    inputs = (p.query.clone().requires_grad_(), p.queue.clone().requires_grad_())

    def statistics(query, queue):
        return queue_statistics(query, queue, 0.3, num_neighbors=3, backend="reference")[:4]

    for place in range(4):
        assert torch.autograd.gradcheck(lambda *x, i=place: statistics(*x)[i], inputs)
        vectors = inputs[0]
        assert torch.autograd.gradcheck(lambda x, i=place: statistics(x, p.queue)[i], vectors)


def test_a_search_without_sums():
    """The same neighbours with the same gradient, and no sums."""
    p = make_problem(4, 23, 6, dtype=torch.float64)
    vectors = p.query.clone().requires_grad_()

    def search(x, sums):
        return queue_statistics(x, p.queue, 0.3, num_neighbors=3, sums=sums, backend="reference")

    alone, full = search(vectors, False), search(vectors, True)
    assert alone.lse.shape == alone.entropy.shape == (0,)
    assert alone.mean.shape == (0, 6)
    assert torch.equal(alone.neighbor_logits, full.neighbor_logits)
    assert torch.equal(alone.neighbor_indices, full.neighbor_indices)
    assert torch.autograd.gradcheck(lambda x: search(x, False).neighbor_logits, vectors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queue_statistics_equal_dense(shape):
    p = make_problem(*shape, kind="clustered", dtype=torch.float64)
    k = min(4, shape[1])
    found = queue_statistics(p.query, p.queue, 0.07, num_neighbors=k, backend="reference")
    want = statistics_oracle(p.query, p.queue, 0.07, k)
    for name in ("lse", "mean", "entropy", "neighbor_logits"):
        torch.testing.assert_close(
            getattr(found, name), getattr(want, name), rtol=1e-11, atol=1e-11
        )
    assert torch.equal(found.neighbor_indices, want.neighbor_indices)


@pytest.mark.parametrize("piece_rows", [13, 1])
def test_pieces_do_not_change_the_result(piece_rows, monkeypatch):
    p = make_problem(6, 301, 12, kind="duplicates", dtype=torch.float64)
    call = LossCall(p.query, p.key, p.queue, AdaptiveSoftLabels(7), 0.1, 0.05, True, True, None,
                    True, True)  # fmt: skip
    oracle = loss_oracle(p, AdaptiveSoftLabels(7), normalize=True)
    monkeypatch.setattr(algebra, "PIECE_ELEMENTS", 6 * piece_rows)
    found = reference.run(call)
    for a, b in zip(found[:4], oracle[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.equal(found[4], oracle.positive_rank)
    # Of equal rows either: a product's last bit depends on its place in a piece.
    assert torch.equal(p.queue[found[5]], p.queue[oracle.neighbor_indices])
    e = torch.eye(32)  # where products are exact, the lowest rows
    nearest = queue_statistics(e[:1], e.repeat(4, 1), 0.1, num_neighbors=6, backend="reference")
    assert nearest.neighbor_indices.tolist() == [[0, 32, 64, 96, 1, 2]]


def test_confidence_at_its_limits():
    """Equal similarities give 0, one overwhelming neighbour gives 1, one row gives 0."""
    key = normalize(torch.ones(1, 4, dtype=torch.float64), dim=1)
    same = key.repeat(10, 1)
    far = torch.cat([key, -key.repeat(9, 1)])
    for queue, expected in ((same, 0.0), (far, 1.0), (key, 0.0)):
        _, shown = soft_contrastive_loss(
            key, key, queue, AdaptiveSoftLabels(1), temperature=0.1, teacher_temperature=0.05,
            diagnostics=True, backend="reference",
        )  # fmt: skip
        assert shown.confidence.item() == pytest.approx(expected, abs=1e-9)
    _, shown = soft_contrastive_loss(
        key, key, same, HardLabels(), temperature=0.1, teacher_temperature=0.05, diagnostics=True
    )
    assert shown.confidence is None and shown.entropy is None and shown.neighbor_indices is None
