"""The operators as PyTorch operators: opcheck, compile, autocast, autograd."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad
from torch.library import opcheck

from softcl import (
    AdaptiveSoftLabels,
    HardLabels,
    LabelRule,
    NeighborLabels,
    RelationalLabels,
    queue_statistics,
    soft_contrastive_loss,
)
from softcl.distributed import ShardedRows, World
from softcl.ops.call import LossCall, StatisticsCall
from softcl.ops.library import pack
from softcl.testing import available_backends, loss_oracle, make_problem, statistics_oracle

BACKENDS = available_backends(make_problem(2, 3, 4), AdaptiveSoftLabels(1))
UNNAMED = LabelRule(positive=0.5, mean=0.25, confident_neighbor=0.5, num_neighbors=4)
TEMPERATURES = {"temperature": 0.1, "teacher_temperature": 0.05}


OWN = torch.tensor([3, -1, 0, 22, 3])


def loss_call(p, rule, backend, **changes):
    call = LossCall(
        p.query, p.key, p.queue, rule, 0.1, 0.05, positive=True, normalize=True, excluded=None,
        gradient=True, diagnostics=True, backend=backend,
    )  # fmt: skip
    return call._replace(**changes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        (HardLabels(), {"normalize": False, "diagnostics": False}),
        (AdaptiveSoftLabels(3), {}),
        (NeighborLabels(2), {"diagnostics": False}),
        (UNNAMED, {"normalize": False, "excluded": OWN}),
    ],
    ids=["hard", "adaptive_soft", "neighbors", "unnamed"],
)
def test_opcheck_loss(backend, rule, changes):
    p = make_problem(5, 37, 16)
    p.query.requires_grad_()
    opcheck(torch.ops.softcl.soft_contrastive.default, pack(loss_call(p, rule, backend, **changes)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_statistics(backend):
    p = make_problem(5, 37, 16)
    query, trained = p.query.requires_grad_(), p.queue.clone().requires_grad_()
    for queue, num_neighbors, sums, excluded in (
        (p.queue, 0, True, None),
        (p.queue, 3, False, None),
        (trained, 3, True, OWN),
    ):
        call = StatisticsCall(query, queue, 0.1, num_neighbors, sums, excluded, backend)
        opcheck(torch.ops.softcl.queue_statistics.default, pack(call))


class Counting:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0
        torch._dynamo.reset()

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)


def compiled_and_plain(function, compiled, p, *arguments):
    """Loss and gradient of both."""
    results = []
    for run in (compiled, function):
        query = p.query.clone().requires_grad_()
        loss = run(query, p.key, p.queue, *arguments)
        loss.backward()
        results.append((loss.detach(), query.grad))
    return results


@pytest.mark.parametrize("rule", [AdaptiveSoftLabels(3), UNNAMED], ids=["named", "unnamed"])
def test_a_temperature_that_changes_every_step_takes_two_graphs(rule):
    def step(query, key, queue, temperature, teacher_temperature):
        return soft_contrastive_loss(
            query, key, queue, rule, temperature=temperature,
            teacher_temperature=teacher_temperature, normalize=True,
        )  # fmt: skip

    p, counting = make_problem(6, 40, 16), Counting()
    compiled = torch.compile(step, fullgraph=True, backend=counting)
    for number in range(20):
        temperatures = 0.1 + 0.01 * number, 0.05 + 0.002 * number
        a, b = compiled_and_plain(step, compiled, p, *temperatures)
        torch.testing.assert_close(a, b)
    assert counting.graphs <= 2
    counting = Counting()
    compiled = torch.compile(step, fullgraph=True, backend=counting)
    for value in (0.1, 0.2, 0.3):
        a, b = compiled_and_plain(step, compiled, p, torch.tensor(value), 0.05)
        torch.testing.assert_close(a, b)
    assert counting.graphs == 1


def test_a_queue_that_fills_takes_three_graphs():
    def sliced(query, key, queue, filled):
        return soft_contrastive_loss(
            query, key, queue[:filled], AdaptiveSoftLabels(2), **TEMPERATURES
        )

    def counted(query, key, queue, filled):
        return soft_contrastive_loss(
            query, key, queue, AdaptiveSoftLabels(2), filled=filled, **TEMPERATURES
        )

    p = make_problem(6, 40, 16)
    for step in (sliced, counted):
        counting = Counting()
        compiled = torch.compile(step, fullgraph=True, backend=counting)
        for filled in range(4, 41, 4):
            a, b = compiled_and_plain(step, compiled, p, filled)
            torch.testing.assert_close(a, b)
        assert counting.graphs <= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    """fullgraph=True refuses graph breaks; dynamic shapes need one compilation for all sizes."""
    compiled_once, counting = None, Counting()

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

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
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
        compiled_once = compiled_once or counting.graphs
        assert counting.graphs == compiled_once


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
        (once,) = torch.autograd.grad(loss, query, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivative only"):
            torch.autograd.grad(once.square().sum(), query)

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
        probe = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))

        def total(s):
            sums = s.lse.sum() + (s.mean * probe).sum() - 2 * s.entropy.sum()
            return sums + s.neighbor_logits.sum()

        got = total(queue_statistics(ours, p.queue, 0.2, num_neighbors=3, backend=backend))
        expected = total(statistics_oracle(dense, p.queue, 0.2, 3))
        got.backward()
        expected.backward()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_torch_func_gives_the_loss_its_derivatives(sharded):
    p = make_problem(6, 40, 16, kind="clustered", dtype=torch.float64)
    oracle = loss_oracle(p, UNNAMED)
    queue = ShardedRows(p.queue, World()) if sharded else p.queue

    def rows(query):
        return soft_contrastive_loss(query, p.key, queue, UNNAMED, reduction="none", **TEMPERATURES)

    def total(query):
        return rows(query).sum()

    func, one = torch.func, torch.tensor(1.0, dtype=torch.float64)
    for gradient in (
        func.grad(total)(p.query),
        func.vjp(total, p.query)[1](one)[0],
        func.jacrev(total)(p.query),
        func.jacrev(rows)(p.query).diagonal(dim1=0, dim2=1).T,
    ):
        torch.testing.assert_close(gradient, oracle.dquery, rtol=1e-9, atol=1e-9)
    tangent = torch.randn_like(p.query)
    expected = (oracle.dquery * tangent).sum(1)
    _, found = func.jvp(rows, (p.query,), (tangent,))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with forward_ad.dual_level():
        dual = rows(forward_ad.make_dual(p.query, tangent))
        found = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for second in (func.hessian(total), func.grad(lambda x: func.grad(total)(x).square().sum())):
        with pytest.raises(RuntimeError, match="first derivative only"):
            second(p.query)
    query = p.query.clone().requires_grad_()
    (once,) = torch.autograd.grad(total(query), query, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(once.square().sum(), query)


@pytest.mark.parametrize("name", ["key", "queue", "temperature", "teacher_temperature"])
def test_constants_have_no_derivative_in_torch_func_either(name):
    p = make_problem(6, 40, 16, dtype=torch.float64)
    given = {"key": p.key, "queue": p.queue}
    given |= {name: torch.tensor(0.1, dtype=torch.float64) for name in TEMPERATURES}

    def loss(value):
        return soft_contrastive_loss(p.query, rule=HardLabels(), **{**given, name: value})

    with pytest.raises(ValueError, match=f"^{name} requires grad.*{name}.detach"):
        torch.func.grad(loss)(given[name])
    with pytest.raises(ValueError, match=f"^{name} .*has a tangent.*{name}.detach"):
        torch.func.jvp(loss, (given[name],), (given[name],))


def test_torch_func_and_the_statistics():
    p = make_problem(6, 40, 16, dtype=torch.float64)

    def lse(query):
        return queue_statistics(query, p.queue, 0.2).lse.sum()

    def dense(query):
        return statistics_oracle(query, p.queue, 0.2).lse.sum()

    for derivative in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(derivative(lse)(p.query), derivative(dense)(p.query))
    with pytest.raises(RuntimeError, match="queue_statistics has no forward-mode derivative"):
        torch.func.jvp(lse, (p.query,), (p.query,))


def test_vmap_is_refused_in_one_line():
    p = make_problem(6, 40, 16)

    def loss(query):
        return soft_contrastive_loss(query, p.key, p.queue, HardLabels(), **TEMPERATURES)

    def lse(query):
        return queue_statistics(query, p.queue, 0.1).lse

    for function in (loss, lse):
        with pytest.raises(RuntimeError, match="has no vmap: its rows are a batch already"):
            torch.func.vmap(function)(p.query.expand(2, 6, 16))
