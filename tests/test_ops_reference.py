"""The reference against the literal N x K formulas, finite differences, and identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from softcl import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    HardLabels,
    MixedLabels,
    NeighborLabels,
    RelationalLabels,
    queue_statistics,
    soft_contrastive_loss,
)
from softcl.testing import KINDS, RULES, make_problem

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
SHAPES = [(5, 211, 16), (1, 9, 3), (7, 64, 33), (3, 8, 5)]


def dense_labels(rule, t, queue, teacher_temperature):
    """Labels (N, 1 + K), positive first, straight from the papers' formulas."""
    similarities = t @ queue.T
    q = (similarities / teacher_temperature).softmax(1)
    entropy = -(q * q.clamp(min=1e-300).log()).sum(1, keepdim=True)
    confidence = (1 - entropy / math.log(len(queue))) if len(queue) > 1 else 0 * entropy
    nearest = torch.zeros_like(q)
    if rule.num_neighbors:
        nearest.scatter_(1, similarities.topk(rule.num_neighbors, dim=1).indices, 1.0)
    one = torch.ones(len(t), 1, dtype=t.dtype)
    if isinstance(rule, HardLabels):
        labels = torch.cat([one, 0 * q], 1)
    elif isinstance(rule, RelationalLabels):
        labels = torch.cat([0 * one, q], 1)
    elif isinstance(rule, MixedLabels):
        w = rule.positive_weight
        labels = torch.cat([w * one, (1 - w) * q], 1)
    elif isinstance(rule, AdaptiveSoftLabels):
        soft = (confidence * rule.num_neighbors * q).clamp(max=1.0)
        labels = torch.cat([one, soft], 1)
    elif isinstance(rule, AdaptiveNeighborLabels):
        labels = torch.cat([one, confidence * nearest], 1)
    elif isinstance(rule, NeighborLabels):
        labels = torch.cat([one, nearest], 1)
    return labels / labels.sum(1, keepdim=True)


def dense_loss(query, key, queue, rule, temperature, teacher_temperature, positive=True):
    """Cross-entropy with every N x K matrix written out; rows (N,)."""
    labels = dense_labels(rule, key, queue, teacher_temperature)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / temperature
    denominator = (logits if positive else logits[:, 1:]).logsumexp(1, keepdim=True)
    return -(labels * (logits - denominator)).sum(1)


def rule_name(rule):
    return f"{rule.name}-{rule.num_neighbors}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_loss_and_gradient_equal_the_dense_formula(rule, shape, kind):
    p = make_problem(*shape, kind=kind, dtype=torch.float64)
    for positive in (True, False):
        for tau in (0.1, 0.02):
            ours = p.query.clone().requires_grad_()
            dense = p.query.clone().requires_grad_()
            loss = soft_contrastive_loss(
                ours,
                p.key,
                p.queue,
                rule,
                temperature=tau,
                teacher_temperature=0.05,
                positive=positive,
                reduction="none",
                backend="reference",
            )
            expected = dense_loss(dense, p.key, p.queue, rule, tau, 0.05, positive)
            torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
            weights = torch.linspace(0.5, 2.0, len(loss), dtype=loss.dtype)
            (loss * weights).sum().backward()
            (expected * weights).sum().backward()
            torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-9, atol=1e-10)


def test_clipped_labels_occur_in_these_problems():
    """The clustered problems really exercise min(1, c n q): some labels are clipped."""
    p = make_problem(5, 8, 16, kind="clustered", dtype=torch.float64)
    labels = dense_labels(AdaptiveSoftLabels(7), p.key, p.queue, 0.05)
    assert bool((labels[:, 1:] == labels[:, :1]).any())


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_gradcheck(rule):
    p = make_problem(4, 23, 6, kind="clustered", dtype=torch.float64)
    raw = (
        p.query * torch.tensor([[0.5], [1.0], [3.0], [2.0]], dtype=torch.float64)
    ).requires_grad_()

    def loss(query, normalize):
        return soft_contrastive_loss(
            query,
            p.key,
            p.queue,
            rule,
            temperature=0.2,
            teacher_temperature=0.1,
            normalize=normalize,
            reduction="none",
            backend="reference",
        )

    assert torch.autograd.gradcheck(lambda x: loss(x, True), raw)
    assert torch.autograd.gradcheck(lambda x: loss(x, False), p.query.clone().requires_grad_())


def test_gradcheck_of_queue_statistics():
    p = make_problem(4, 23, 6, dtype=torch.float64)
    vectors = p.query.clone().requires_grad_()

    def statistics(x):
        return queue_statistics(x, p.queue, 0.3, num_neighbors=3, backend="reference")[:4]

    assert torch.autograd.gradcheck(statistics, vectors)
    for i in range(4):
        assert torch.autograd.gradcheck(lambda x, i=i: statistics(x)[i], vectors)


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
    lse, mean, entropy, values, indices = queue_statistics(
        p.query, p.queue, 0.07, num_neighbors=k, backend="reference"
    )
    logits = p.query @ p.queue.T / 0.07
    share = logits.softmax(1)
    torch.testing.assert_close(lse, logits.logsumexp(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, share @ p.queue, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(entropy, -(share * share.log()).sum(1), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(values, logits.topk(k, dim=1).values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.gather(1, indices), values, rtol=1e-12, atol=1e-12)


def test_pieces_do_not_change_the_result(monkeypatch):
    from softcl.ops import reference

    p = make_problem(6, 301, 12, kind="duplicates", dtype=torch.float64)
    arguments = (p.query, p.key, p.queue, AdaptiveSoftLabels(7), 0.1, 0.05)
    options = {"positive": True, "normalize": True, "gradient": True, "diagnostics": True}
    whole = reference.soft_contrastive(*arguments, **options)
    monkeypatch.setattr(reference, "PIECE_ELEMENTS", 6 * 13)
    split = reference.soft_contrastive(*arguments, **options)
    for a, b in zip(whole[:5], split[:5], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_diagnostics():
    p = make_problem(6, 50, 8, kind="clustered", dtype=torch.float64)
    loss, shown = soft_contrastive_loss(
        p.query,
        p.key,
        p.queue,
        AdaptiveSoftLabels(4),
        temperature=0.1,
        teacher_temperature=0.05,
        diagnostics=True,
        backend="reference",
    )
    assert loss.shape == ()
    teacher = (p.key @ p.queue.T / 0.05).softmax(1)
    entropy = -(teacher * teacher.log()).sum(1)
    torch.testing.assert_close(shown.entropy, entropy)
    torch.testing.assert_close(shown.confidence, 1 - entropy / math.log(50))
    better = p.query @ p.queue.T > (p.query * p.key).sum(1, keepdim=True)
    assert torch.equal(shown.positive_rank, better.sum(1))
    top = (p.key @ p.queue.T).topk(4, dim=1).indices
    assert torch.equal(shown.neighbor_indices, top)
    _, plain = soft_contrastive_loss(
        p.query,
        p.key,
        p.queue,
        HardLabels(),
        temperature=0.1,
        teacher_temperature=0.05,
        diagnostics=True,
        backend="reference",
    )
    assert plain.confidence is None and plain.entropy is None and plain.neighbor_indices is None


def test_confidence_at_its_limits():
    """Equal similarities give 0, one overwhelming neighbour gives 1, one row gives 0."""
    key = normalize(torch.ones(1, 4, dtype=torch.float64), dim=1)
    same = key.repeat(10, 1)
    far = torch.cat([key, -key.repeat(9, 1)])
    for queue, expected in ((same, 0.0), (far, 1.0), (key, 0.0)):
        _, shown = soft_contrastive_loss(
            key,
            key,
            queue,
            AdaptiveSoftLabels(1),
            temperature=0.1,
            teacher_temperature=0.05,
            diagnostics=True,
            backend="reference",
        )
        assert shown.confidence.item() == pytest.approx(expected, abs=1e-9)


def test_merging_two_halves_of_the_queue():
    """QueueStatistics over disjoint parts determine those of the whole, as their docstring says."""
    p = make_problem(5, 90, 8, dtype=torch.float64)
    whole = queue_statistics(p.query, p.queue, 0.1, backend="reference")
    a = queue_statistics(p.query, p.queue[:37], 0.1, backend="reference")
    b = queue_statistics(p.query, p.queue[37:], 0.1, backend="reference")
    lse = torch.logaddexp(a.lse, b.lse)
    wa, wb = (a.lse - lse).exp(), (b.lse - lse).exp()
    torch.testing.assert_close(lse, whole.lse)
    torch.testing.assert_close(wa[:, None] * a.mean + wb[:, None] * b.mean, whole.mean)
    expected_logit = wa * (a.lse - a.entropy) + wb * (b.lse - b.entropy)
    torch.testing.assert_close(lse - expected_logit, whole.entropy)
