"""Excluded rows, the batch as its own queue, and which backend runs what."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from softcl import AdaptiveSoftLabels, HardLabels, queue_statistics, soft_contrastive_loss
from softcl.ops import (
    UnsupportedBackendError,
    algebra,
    backends,
    choose_backend,
    label_mean,
    reference,
)
from softcl.testing import (
    KINDS,
    RULES,
    Problem,
    dense_labels,
    loss_oracle,
    make_problem,
    rule_name,
    statistics_oracle,
)

TEMPERATURES = {"temperature": 0.1, "teacher_temperature": 0.05}
EXCLUDED = torch.tensor([3, -1, 0, 22, 3, 10])


def without_row(queue: torch.Tensor, row: int) -> torch.Tensor:
    return queue if row < 0 else torch.cat([queue[:row], queue[row + 1 :]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_excluding_a_row_is_a_queue_without_it(rule, kind, monkeypatch):
    p = make_problem(6, 23, 9, kind=kind, dtype=torch.float64)
    for piece in (algebra.PIECE_ELEMENTS, 6 * 5, 6):  # pieces of 5 rows and of one
        monkeypatch.setattr(algebra, "PIECE_ELEMENTS", piece)
        query = p.query.clone().requires_grad_()
        loss, shown = soft_contrastive_loss(
            query, p.key, p.queue, rule, reduction="none", excluded=EXCLUDED,
            diagnostics=True, backend="reference", **TEMPERATURES,
        )  # fmt: skip
        (dquery,) = torch.autograd.grad(loss.sum(), query)
        whole = loss_oracle(p, rule, excluded=EXCLUDED)
        torch.testing.assert_close(loss, whole.loss, rtol=1e-11, atol=1e-11)
        for i, row in enumerate(EXCLUDED.tolist()):
            one = Problem(p.query[i : i + 1], p.key[i : i + 1], without_row(p.queue, row))
            oracle = loss_oracle(one, rule)
            torch.testing.assert_close(loss[i], oracle.loss[0], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(dquery[i], oracle.dquery[0], rtol=1e-9, atol=1e-10)
            assert shown.positive_rank[i] == oracle.positive_rank[0]
            if rule.needs_softmax:
                found = shown.confidence[i]
                torch.testing.assert_close(found, oracle.confidence[0], atol=1e-11, rtol=0)


def test_one_row_that_is_left_says_nothing_of_relations():
    p = make_problem(3, 2, 5, dtype=torch.float64)
    excluded, rule = torch.tensor([0, 1, -1]), AdaptiveSoftLabels(1)
    loss, shown = soft_contrastive_loss(
        p.query, p.key, p.queue, rule, reduction="none", excluded=excluded, diagnostics=True,
        backend="reference", **TEMPERATURES,
    )  # fmt: skip
    oracle = loss_oracle(p, rule, excluded=excluded)
    assert shown.confidence[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(shown.confidence, oracle.confidence)
    torch.testing.assert_close(loss, oracle.loss)


@pytest.mark.parametrize("piece", [1 << 22, 6 * 5, 6])
def test_statistics_without_the_excluded_row(piece, monkeypatch):
    """Values, and the gradient in vectors and queue of a function of them all."""
    monkeypatch.setattr(algebra, "PIECE_ELEMENTS", piece)
    p = make_problem(6, 23, 9, kind="clustered", dtype=torch.float64)
    leaves, exact = ([x.clone().requires_grad_() for x in (p.query, p.queue)] for _ in range(2))
    got = queue_statistics(*leaves, 0.1, num_neighbors=4, excluded=EXCLUDED, backend="reference")
    want = statistics_oracle(*exact, 0.1, 4, excluded=EXCLUDED)
    assert torch.equal(got.neighbor_indices, want.neighbor_indices)
    assert not bool((got.neighbor_indices == EXCLUDED[:, None]).any())
    totals = [0.0, 0.0]
    for place, (a, b) in enumerate(zip(got[:4], want[:4], strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        weights = torch.linspace(1.0, 2.0 + place, a.numel(), dtype=torch.float64).view_as(a)
        totals = [total + (x * weights).sum() for total, x in zip(totals, (a, b), strict=True)]
    for a, b in zip(
        torch.autograd.grad(totals[0], leaves), torch.autograd.grad(totals[1], exact), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_label_mean_within_the_batch():
    """The in-batch use: the queue is the batch itself, each row without its own."""
    t, own = make_problem(8, 3, 6, kind="clustered", dtype=torch.float64).key, torch.arange(8)
    got = label_mean(AdaptiveSoftLabels(3), t, t, teacher_temperature=0.05, excluded=own)
    logits = (t @ t.T / 0.05).fill_diagonal_(-torch.inf)
    made = dense_labels(AdaptiveSoftLabels(3), logits, torch.full((8, 1), 20.0).double())
    expected = made.labels[:, :1] * t + made.labels[:, 1:] @ t
    torch.testing.assert_close(got.mean, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(got.confidence, made.confidence, rtol=1e-10, atol=1e-11)


def test_a_backend_is_one_file_and_one_line(monkeypatch):
    """A stand-in is chosen, gets the whole call, and may decline anything it sees there."""
    calls = []

    def unsupported(call):
        return None if call.excluded is None else "it does not know excluded rows"

    def run(call):
        calls.append(call)
        return reference.run(call)

    module = SimpleNamespace(unsupported=unsupported, run=run)
    original = backends.load_backend
    monkeypatch.setattr(
        backends, "load_backend", lambda name: module if name == "mine" else original(name)
    )
    monkeypatch.setattr(backends, "BACKENDS", {"mine": ("cpu",), **backends.BACKENDS})
    p = make_problem(4, 10, 8)
    arguments = (p.query, p.key, p.queue, HardLabels())
    soft_contrastive_loss(*arguments, normalize=True, **TEMPERATURES)
    queue_statistics(p.query, p.queue, 0.1, num_neighbors=3)
    loss, statistics = calls
    assert loss.rule == HardLabels() and loss.normalize and loss.temperature == 0.1
    assert statistics.num_neighbors == 3 and statistics.sums
    assert choose_backend(p.query, p.queue, rule=HardLabels()).name == "mine"
    own = torch.arange(4)
    choice = choose_backend(p.query, p.queue, rule=HardLabels(), excluded=own)
    assert choice.name != "mine"
    assert choice.reasons["mine"] == "it does not know excluded rows"
    soft_contrastive_loss(*arguments, excluded=own, **TEMPERATURES)
    assert len(calls) == 2
    with pytest.raises(UnsupportedBackendError, match="'mine' cannot run.*excluded rows"):
        queue_statistics(p.query, p.queue, 0.1, excluded=own, backend="mine")


def test_cuda_declines_excluded_rows(monkeypatch):
    from softcl.ops import cuda
    from softcl.ops.call import StatisticsCall

    module = SimpleNamespace(cuda_device_count=lambda: 1)
    monkeypatch.setattr(cuda, "_load", lambda: (module, ""))
    monkeypatch.setattr(cuda, "_capability", lambda index: (9, 0))
    on_gpu = SimpleNamespace(device=torch.device("cuda:0"), shape=(4, 8), dtype=torch.float32)
    call = StatisticsCall(on_gpu, on_gpu, 0.1, 0, True, torch.arange(4))
    assert "excluded" in cuda.unsupported(call)


def test_cuda_does_not_start_the_driver_for_tensors_on_the_cpu(monkeypatch):
    """Asked by every call under "auto"; a process forked after that could not use CUDA."""
    from softcl import native
    from softcl.ops import cuda

    def asked():
        raise AssertionError("the driver was started")

    module = SimpleNamespace(has_cuda=lambda: True, cuda_device_count=asked)
    monkeypatch.setattr(native, "load", lambda: (module, ""))
    monkeypatch.setattr(cuda, "_load", functools.cache(cuda._load.__wrapped__))
    p = make_problem(2, 5, 4)
    with pytest.raises(UnsupportedBackendError, match="the tensors are on cpu"):
        queue_statistics(p.query, p.queue, 0.1, backend="cuda")


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
            {"excluded": torch.zeros(4).long(), "rule": AdaptiveSoftLabels(10)},
            ValueError,
            "rule.num_neighbors must be between 0 and the queue's 9 rows, got 10",
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_wrong_options(change, error, message):
    p = make_problem(4, 10, 8)
    rule = change.pop("rule", HardLabels())
    with pytest.raises(error, match=message):
        soft_contrastive_loss(p.query, p.key, p.queue, rule, **{**TEMPERATURES, **change})
