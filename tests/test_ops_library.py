"""The operators as PyTorch operators: opcheck, compile, autocast, autograd."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from softcl import (
    AdaptiveSoftLabels,
    HardLabels,
    NeighborLabels,
    RelationalLabels,
    queue_statistics,
    soft_contrastive_loss,
)
from softcl.testing import available_backends, make_problem

BACKENDS = available_backends(make_problem(2, 3, 4), AdaptiveSoftLabels(1))
TEMPERATURES = {"temperature": 0.1, "teacher_temperature": 0.05}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [("hard", 0), ("adaptive_soft", 3), ("neighbors", 2)])
@pytest.mark.parametrize("diagnostics", [False, True])
def test_opcheck_loss(backend, rule, diagnostics):
    p = make_problem(5, 37, 16)
    query = p.query.requires_grad_()
    for normalize in (False, True):
        arguments = (*rule, 1.0, 0.1, 0.05, True, normalize, True, diagnostics, backend)
        opcheck(torch.ops.softcl.soft_contrastive.default, (query, p.key, p.queue, *arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_statistics(backend):
    p = make_problem(5, 37, 16)
    query = p.query.requires_grad_()
    for num_neighbors, sums in ((0, True), (3, True), (3, False)):
        opcheck(
            torch.ops.softcl.queue_statistics.default,
            (query, p.queue, 0.1, num_neighbors, sums, backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    """fullgraph=True refuses graph breaks; dynamic shapes need one compilation for all sizes."""
    compilations = []
    compiled_once = None

    def counting_backend(graph, example_inputs):
        compilations.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, example_inputs)

    def step(query, key, queue, filled):
        loss, shown = soft_contrastive_loss(
            query,
            key,
            queue,
            AdaptiveSoftLabels(3),
            normalize=True,
            filled=filled,
            diagnostics=True,
            backend=backend,
            **TEMPERATURES,
        )
        statistics = queue_statistics(query, queue, 0.1, num_neighbors=2, backend=backend)
        return loss + statistics.lse.mean() + statistics.mean.sum(), shown.confidence

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting_backend)
    for N, K, filled in ((4, 50, 40), (9, 77, 60), (6, 61, 51)):
        p = make_problem(N, K, 16)
        gradients = []
        for function in (compiled, step):
            query = p.query.clone().requires_grad_()
            loss, confidence = function(query, p.key, p.queue, filled)
            loss.backward()
            gradients.append((loss.detach(), confidence, query.grad))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
        compiled_once = len(compilations) if compiled_once is None else compiled_once
        assert len(compilations) == compiled_once


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    p = make_problem(6, 90, 32)
    plain = soft_contrastive_loss(
        p.query, p.key, p.queue, RelationalLabels(), backend=backend, **TEMPERATURES
    )
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            cast = soft_contrastive_loss(
                p.query, p.key, p.queue, RelationalLabels(), backend=backend, **TEMPERATURES
            )
            lse = queue_statistics(p.query, p.queue, 0.1, backend=backend).lse
        assert torch.equal(plain, cast)
        assert torch.equal(lse, queue_statistics(p.query, p.queue, 0.1, backend=backend).lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_through_a_projector(backend):
    """Low-precision projections from an autocast layer train a float32 weight."""
    p = make_problem(6, 90, 32)
    layer = torch.nn.Linear(32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, key = layer(p.query), layer(p.key).detach()
        assert query.dtype == torch.bfloat16
        loss = soft_contrastive_loss(
            query, key, p.queue, HardLabels(), normalize=True, backend=backend, **TEMPERATURES
        )
    loss.backward()
    assert loss.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32
    assert bool(layer.weight.grad.abs().sum() > 0)


@pytest.mark.parametrize("backend", BACKENDS)
class TestAutograd:
    def test_backward_twice(self, backend):
        p = make_problem(6, 90, 32)
        query = p.query.requires_grad_()
        loss = soft_contrastive_loss(
            query, p.key, p.queue, NeighborLabels(2), backend=backend, **TEMPERATURES
        )
        loss.backward(retain_graph=True)
        once = query.grad.clone()
        (3 * loss).backward()
        torch.testing.assert_close(query.grad, 4 * once)

    def test_gradient_is_scaled_by_what_comes_in(self, backend):
        p = make_problem(6, 90, 32)
        query = p.query.requires_grad_()
        rows = soft_contrastive_loss(
            query,
            p.key,
            p.queue,
            NeighborLabels(2),
            reduction="none",
            backend=backend,
            **TEMPERATURES,
        )
        weights = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 0.0])
        (by_rows,) = torch.autograd.grad(rows, query, weights, retain_graph=True)
        (plain,) = torch.autograd.grad(rows.sum(), query)
        torch.testing.assert_close(by_rows, weights[:, None] * plain)

    def test_no_gradient_when_none_is_wanted(self, backend):
        p = make_problem(6, 90, 32)
        expected = soft_contrastive_loss(
            p.query.requires_grad_(), p.key, p.queue, HardLabels(), backend=backend, **TEMPERATURES
        )
        with torch.no_grad():
            loss = soft_contrastive_loss(
                p.query, p.key, p.queue, HardLabels(), backend=backend, **TEMPERATURES
            )
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach())

    def test_second_derivative_is_refused(self, backend):
        p = make_problem(6, 90, 32)
        query = p.query.requires_grad_()
        loss = soft_contrastive_loss(
            query, p.key, p.queue, HardLabels(), backend=backend, **TEMPERATURES
        )
        with pytest.raises(RuntimeError, match="first derivative only"):
            torch.autograd.grad(loss, query, create_graph=True)

    @pytest.mark.parametrize("name", ["key", "queue"])
    def test_constant_inputs_must_not_require_grad(self, backend, name):
        p = make_problem(6, 90, 32)
        tensors = {"key": p.key, "queue": p.queue}
        tensors[name].requires_grad_()
        with pytest.raises(ValueError, match=f"{name} requires grad.*{name}.detach"):
            soft_contrastive_loss(p.query, **tensors, rule=HardLabels(), **TEMPERATURES)

    def test_statistics_train(self, backend):
        """Every floating statistic has the gradient of its dense formula."""
        p = make_problem(6, 90, 32)
        ours, dense = (p.query.clone().requires_grad_() for _ in range(2))
        got = queue_statistics(ours, p.queue, 0.2, num_neighbors=3, backend=backend)
        logits = dense @ p.queue.T / 0.2
        share = logits.softmax(1)
        probe = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
        total = got.lse.sum() + (got.mean * probe).sum() - 2 * got.entropy.sum()
        total = total + got.neighbor_logits.sum()
        expected = logits.logsumexp(1).sum() + ((share @ p.queue) * probe).sum()
        expected = expected + 2 * (share * share.log()).sum() + logits.topk(3, dim=1).values.sum()
        total.backward()
        expected.backward()
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-4, atol=1e-4)
