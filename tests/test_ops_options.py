"""The operator's options: each against the formula written out, and the matrix of backends."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import normalize

import softcl
from softcl import (
    AdaptiveSoftLabels,
    HardLabels,
    MixedLabels,
    NeighborLabels,
    label_mean,
    queue_statistics,
    soft_contrastive_loss,
)
from softcl.ops import BACKENDS, UnsupportedBackendError, backends, choose_backend, reference
from softcl.testing import (
    GRADIENT_TOLERANCE,
    KINDS,
    LSE_TOLERANCE,
    RULES,
    Problem,
    available_backends,
    gradient_error,
    loss_oracle,
    make_problem,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
AVAILABLE = available_backends(make_problem(2, 3, 4), AdaptiveSoftLabels(1))
TEMPERATURES = {"temperature": 0.1, "teacher_temperature": 0.05}


def rule_name(rule):
    return f"{rule.name}-{rule.num_neighbors}"


def gradients(loss, *leaves):
    weights = torch.linspace(0.5, 2.0, len(loss), dtype=loss.dtype)
    return torch.autograd.grad((loss * weights).sum(), leaves)


# ---- excluded ----


def without_row(queue: torch.Tensor, row: int) -> torch.Tensor:
    return queue if row < 0 else torch.cat([queue[:row], queue[row + 1 :]])


EXCLUDED = torch.tensor([3, -1, 0, 22, 3, 10])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_excluding_a_row_is_a_queue_without_it(rule, kind, monkeypatch):
    p = make_problem(6, 23, 9, kind=kind, dtype=torch.float64)
    for piece in (reference.PIECE_ELEMENTS, 6 * 5, 6):  # pieces of 5 rows and of one
        monkeypatch.setattr(reference, "PIECE_ELEMENTS", piece)
        query = p.query.clone().requires_grad_()
        loss, shown = soft_contrastive_loss(
            query, p.key, p.queue, rule, reduction="none", excluded=EXCLUDED,
            diagnostics=True, backend="reference", **TEMPERATURES,
        )  # fmt: skip
        (dquery,) = gradients(loss, query)
        for i, row in enumerate(EXCLUDED.tolist()):
            one = Problem(p.query[i : i + 1], p.key[i : i + 1], without_row(p.queue, row))
            oracle = loss_oracle(one, rule)
            torch.testing.assert_close(loss[i], oracle[0][0], rtol=1e-11, atol=1e-11)
            weight = 0.5 + 1.5 * i / 5
            torch.testing.assert_close(dquery[i], weight * oracle[1][0], rtol=1e-9, atol=1e-10)
            assert shown.positive_rank[i] == oracle[4][0]
            if rule.needs_softmax:
                torch.testing.assert_close(shown.confidence[i], oracle[2][0], atol=1e-11, rtol=0)


@pytest.mark.parametrize("piece", [1 << 22, 6 * 5, 6])
def test_statistics_without_the_excluded_row(piece, monkeypatch):
    monkeypatch.setattr(reference, "PIECE_ELEMENTS", piece)
    p = make_problem(6, 23, 9, kind="clustered", dtype=torch.float64)
    query, queue = p.query.clone().requires_grad_(), p.queue.clone().requires_grad_()
    got = queue_statistics(query, queue, 0.1, num_neighbors=4, excluded=EXCLUDED)
    dense_query, dense_queue = p.query.clone().requires_grad_(), p.queue.clone().requires_grad_()
    total = expected_total = 0.0
    for i, row in enumerate(EXCLUDED.tolist()):
        rows = without_row(dense_queue, row)
        logits = dense_query[i] @ rows.T / 0.1
        share = logits.softmax(0)
        entropy = -(share * share.log()).sum()
        best = logits.topk(4).values
        expected = (logits.logsumexp(0), share @ rows, entropy, best)
        actual = (got.lse[i], got.mean[i], got.entropy[i], got.neighbor_logits[i])
        for scale, (a, b) in enumerate(zip(actual, expected, strict=True), start=1):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
            total = total + scale * (a * torch.arange(1.0, a.numel() + 1).to(a)).sum()
            expected_total = (
                expected_total + scale * (b * torch.arange(1.0, b.numel() + 1).to(b)).sum()
            )
        assert row not in got.neighbor_indices[i]
    for a, b in zip(
        torch.autograd.grad(total, (query, queue)),
        torch.autograd.grad(expected_total, (dense_query, dense_queue)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_opcheck_with_an_excluded_row():
    p = make_problem(6, 23, 9)
    query, queue = p.query.requires_grad_(), p.queue.clone().requires_grad_()
    arguments = ("adaptive_soft", 3, 1.0, 0.1, 0.05, True, True, True, True, "reference", EXCLUDED)
    opcheck(torch.ops.softcl.soft_contrastive.default, (query, p.key, p.queue, *arguments))
    for q in (p.queue, queue):
        arguments = (query, q, 0.1, 3, True, "reference", EXCLUDED)
        opcheck(torch.ops.softcl.queue_statistics.default, arguments)


# ---- the queue's gradient ----


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_have_the_queues_gradient(backend, kind):
    p = make_problem(7, 40, 16, kind=kind)
    leaves = [x.clone().requires_grad_() for x in (p.query, p.queue)]
    exact = [x.double().requires_grad_() for x in (p.query, p.queue)]
    lse = queue_statistics(*leaves, 0.1, backend=backend).lse
    expected = (exact[0] @ exact[1].T / 0.1).logsumexp(1)
    assert relative_error(lse, expected) <= LSE_TOLERANCE
    for a, b in zip(gradients(lse, *leaves), gradients(expected, *exact), strict=True):
        assert gradient_error(a, b) <= GRADIENT_TOLERANCE[torch.float32]


def test_gradcheck_to_the_queue():
    p = make_problem(4, 9, 5, dtype=torch.float64)
    inputs = (p.query.clone().requires_grad_(), p.queue.clone().requires_grad_())

    def statistics(query, queue):
        return queue_statistics(query, queue, 0.3, num_neighbors=3, backend="reference")[:4]

    for i in range(4):
        assert torch.autograd.gradcheck(lambda *x, i=i: statistics(*x)[i], inputs)


# ---- several queries for a key, label sums ----


@pytest.mark.parametrize("backend", AVAILABLE)
def test_queries_per_key_is_the_key_repeated(backend):
    p = make_problem(12, 60, 16, kind="clustered")
    key = p.key[:4]
    for normalized in (False, True):
        options = dict(reduction="none", normalize=normalized, backend=backend, **TEMPERATURES)
        a = soft_contrastive_loss(
            p.query, key, p.queue, AdaptiveSoftLabels(5), queries_per_key=3, **options
        )
        for crop in range(3):
            rows = slice(4 * crop, 4 * crop + 4)
            b = soft_contrastive_loss(p.query[rows], key, p.queue, AdaptiveSoftLabels(5), **options)
            torch.testing.assert_close(a[rows], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_labels_that_do_not_sum_to_one(backend):
    """Four labels of one, the positive's and three neighbours': they sum to 4."""
    p = make_problem(6, 40, 16)
    exact = p.double()
    labels = torch.cat([torch.ones(6, 1), torch.zeros(6, 40)], 1).double()
    labels.scatter_(1, 1 + (exact.key @ exact.queue.T).topk(3, dim=1).indices, 1.0)
    for total in (4.0, torch.full((6,), 4.0)):
        query, ours = exact.query.clone().requires_grad_(), p.query.clone().requires_grad_()
        positive = (query * exact.key).sum(1, keepdim=True)
        logits = torch.cat([positive, query @ exact.queue.T], 1) / 0.1
        expected = -(labels * logits.log_softmax(1)).sum(1)
        loss = soft_contrastive_loss(
            ours, p.key, p.queue, NeighborLabels(3), label_sum=total,
            reduction="none", backend=backend, **TEMPERATURES,
        )  # fmt: skip
        assert relative_error(loss, expected) <= LSE_TOLERANCE
        (a,), (b,) = gradients(loss, ours), gradients(expected, query)
        assert gradient_error(a, b, 0.1) <= GRADIENT_TOLERANCE[torch.float32]


# ---- a virtual teacher logit ----


def leaking_loss(z, t, queue, weight, positive=True):
    """SCE as its code has it: the teacher's softmax over [0, d_1 .. d_K] / teacher_temperature."""
    d = torch.cat([torch.zeros(len(t), 1, dtype=t.dtype), t @ queue.T], 1) / 0.05
    own = torch.zeros_like(d)
    own[:, 0] = 1.0
    labels = weight * own + (1 - weight) * d.softmax(1)
    logits = torch.cat([(z * t).sum(1, keepdim=True), z @ queue.T], 1) / 0.1
    total = (logits if positive else logits[:, 1:]).logsumexp(1, keepdim=True)
    return -(labels * (logits - total)).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positive", [True, False])
def test_virtual_logit_equals_the_dense_formula(kind, positive):
    p = make_problem(6, 9, 16, kind=kind, dtype=torch.float64)
    raw = (p.query * torch.linspace(0.5, 3.0, 6, dtype=torch.float64)[:, None]).requires_grad_()
    dense = raw.detach().clone().requires_grad_()
    loss, shown = soft_contrastive_loss(
        raw, 2 * p.key, p.queue, MixedLabels(0.4), normalize=True, positive=positive,
        reduction="none", virtual_logit=True, diagnostics=True, **TEMPERATURES,
    )  # fmt: skip
    expected = leaking_loss(normalize(dense, dim=1), p.key, p.queue, 0.4, positive)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(*gradients(loss, raw), *gradients(expected, dense))
    share = (p.key @ p.queue.T / 0.05).softmax(1)
    torch.testing.assert_close(shown.entropy, -(share * share.log()).sum(1))
    without = soft_contrastive_loss(
        raw, p.key, p.queue, MixedLabels(0.4), normalize=True, reduction="none", **TEMPERATURES
    )
    if kind == "random":
        assert float((loss - without).detach().abs().max()) > 1e-3  # the leak is seen


@pytest.mark.parametrize("backend", AVAILABLE)
def test_virtual_logit_in_every_backend(backend):
    p = make_problem(9, 120, 32, kind="random")
    exact = p.double()
    ours, dense = p.query.requires_grad_(), exact.query.requires_grad_()
    loss = soft_contrastive_loss(
        ours, p.key, p.queue, MixedLabels(0.4), reduction="none", virtual_logit=True,
        backend=backend, **TEMPERATURES,
    )  # fmt: skip
    expected = leaking_loss(dense, exact.key, exact.queue, 0.4)
    assert relative_error(loss, expected) <= LSE_TOLERANCE
    (a,), (b,) = gradients(loss, ours), gradients(expected, dense)
    assert gradient_error(a, b, 0.1) <= GRADIENT_TOLERANCE[torch.float32]


# ---- the label mean alone ----


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_label_mean_is_that_of_the_loss(backend, rule):
    """Through the loss's gradient: dloss/dz = (g - m) / temperature, so m follows from it."""
    p = make_problem(9, 120, 32, kind="clustered")
    got = label_mean(
        rule, 3 * p.key, p.queue, teacher_temperature=0.05, normalize=True, backend=backend
    )
    hard = loss_oracle(p, HardLabels())[1]
    soft = loss_oracle(p, rule)
    expected = 0.1 * (hard - soft[1]) + p.key.double()
    assert float((got.mean - expected).abs().max()) < 3e-6
    if rule.needs_softmax:
        assert relative_error(got.entropy, soft[3]) < 1e-5
        assert relative_error(got.confidence, soft[2]) < 1e-5
    else:
        assert got.entropy is None and got.confidence is None
    assert (got.neighbor_indices is None) == (rule.num_neighbors == 0)
    assert not got.mean.requires_grad


def test_label_mean_within_the_batch():
    """The in-batch use: the queue is the batch itself, each row without its own."""
    t = make_problem(8, 3, 6, kind="clustered", dtype=torch.float64).key
    got = label_mean(
        AdaptiveSoftLabels(3), t, t, teacher_temperature=0.05, excluded=torch.arange(8)
    )
    for i in range(8):
        others = without_row(t, i)
        q = (others @ t[i] / 0.05).softmax(0)
        c = 1 + float((q * q.log()).sum()) / math.log(7)
        y = (3 * c * q).clamp(max=1.0)
        expected = (t[i] + y @ others) / (1 + y.sum())
        torch.testing.assert_close(got.mean[i], expected, rtol=1e-10, atol=1e-11)


# ---- which backend has what, and wrong options ----

MATRIX = {"reference": {"excluded"}, "cpu": {"excluded"}}


@pytest.mark.parametrize("name", BACKENDS)
def test_the_matrix_of_options(name):
    """What `options_of` says is what happens: a backend without the option declines by name."""
    options = softcl.options_of(name)
    assert MATRIX.get(name, set()) <= options <= {"excluded"}
    p = make_problem(4, 10, 8)
    try:
        choose_backend(p.query, p.queue, rule=HardLabels(), backend=name)
    except UnsupportedBackendError:
        return  # not on this machine
    asked = dict(rule=HardLabels(), options=("excluded",))
    if "excluded" in options:
        assert choose_backend(p.query, p.queue, backend=name, **asked).name == name
        return
    reason = "it does not have the option excluded"
    with pytest.raises(UnsupportedBackendError, match=reason):
        choose_backend(p.query, p.queue, backend=name, **asked)
    with pytest.raises(UnsupportedBackendError, match=reason):
        soft_contrastive_loss(
            p.query, p.key, p.queue, HardLabels(), excluded=torch.arange(4), backend=name,
            **TEMPERATURES,
        )  # fmt: skip
    with pytest.raises(UnsupportedBackendError, match=reason):
        queue_statistics(p.query, p.queue, 0.1, excluded=torch.arange(4), backend=name)


def test_auto_moves_on_and_says_why():
    p = make_problem(4, 10, 8)
    choice = choose_backend(p.query, p.queue, rule=HardLabels(), options=("excluded",))
    assert "excluded" in softcl.options_of(choice.name)
    for passed_over, reason in choice.reasons.items():
        if "excluded" not in softcl.options_of(passed_over):
            assert reason == "it does not have the option excluded"
    assert choose_backend(p.query, p.queue, options=("excluded",)).name == choice.name
    soft_contrastive_loss(
        p.query, p.key, p.queue, HardLabels(), excluded=torch.arange(4), **TEMPERATURES
    )


def test_a_backend_without_the_constant_never_sees_an_option(monkeypatch):
    seen = {}

    class Bare:
        @staticmethod
        def unsupported(call):
            return None

        @staticmethod
        def queue_statistics(vectors, queue, temperature, num_neighbors, *, sums):
            seen["called"] = True
            return reference.queue_statistics(vectors, queue, temperature, num_neighbors)

    original = backends.load_backend
    monkeypatch.setattr(
        backends, "load_backend", lambda name: Bare if name == "cpu" else original(name)
    )
    p = make_problem(4, 10, 8)
    assert choose_backend(p.query, p.queue).name == "cpu"
    assert choose_backend(p.query, p.queue, options=("excluded",)).name == "reference"
    assert not seen


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"excluded": [0, 1]}, TypeError, "excluded must be a tensor or None, got list"),
        ({"excluded": torch.zeros(4)}, ValueError, r"excluded must be int64 of shape \(4,\)"),
        ({"excluded": torch.zeros(3).long()}, ValueError, r"of shape \(4,\).*\(3,\)"),
        ({"excluded": torch.full((4,), 10)}, ValueError, "between -1 and 9, got 10"),
        ({"excluded": torch.full((4,), -2)}, ValueError, "between -1 and 9, got -2"),
        ({"excluded": torch.zeros(4).long(), "filled": 1}, ValueError, "at least 2 rows, got 1"),
        (
            {"excluded": torch.zeros(4).long(), "rule": NeighborLabels(10)},
            ValueError,
            "rule.num_neighbors must be between 0 and the queue's 9 rows, got 10",
        ),
        ({"queries_per_key": 0}, ValueError, "queries_per_key must be between 1 and.*got 0"),
        ({"queries_per_key": 2}, ValueError, r"shape \(4, 8\) with 2 queries per key, got \(4, 8"),
        ({"queries_per_key": 1.0}, TypeError, "queries_per_key must be an integer, got 1.0"),
        ({"virtual_logit": True}, ValueError, "virtual_logit needs MixedLabels, got HardLabels"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_wrong_options(change, error, message):
    p = make_problem(4, 10, 8)
    arguments = {"rule": HardLabels(), **TEMPERATURES, **change}
    with pytest.raises(error, match=message):
        soft_contrastive_loss(p.query, p.key, p.queue, **arguments)
