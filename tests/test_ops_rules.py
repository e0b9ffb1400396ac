"""Label rules that nobody named: one line of numbers, right in every backend and in every use.

Named ones, shapes and dtypes: the tests of each backend. Sharded over several processes:
distributed_cases.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cuda_host import load_host_module
from torch import Tensor

from softcl import LabelRule, label_mean, soft_contrastive_loss
from softcl.distributed import ShardedRows, World
from softcl.ops import cpu, cuda, reference, triton
from softcl.ops.call import LossCall
from softcl.testing import (
    ENTROPY_TOLERANCE,
    KINDS,
    Problem,
    assert_loss_close,
    dense_labels,
    fitting,
    loss_oracle,
    make_problem,
    random_rules,
    relative_error,
    rule_name,
)

UNNAMED = LabelRule(positive=0.5, mean=0.25, confident_neighbor=0.5, num_neighbors=4)
# More labels may be above p than there are neighbours to clip.
CLIPPED = LabelRule(positive=0.2, mean=2.0, confident_mean=1.0, clip=True, num_neighbors=2)
RULES = [UNNAMED, CLIPPED, *random_rules(5, seed=39)]
SHAPES = [(3, 5, 7), (9, 130, 32), (6, 200, 64)]
OPTIONS = [{"normalize": True}, {"positive": False, "excluded": True}, {}]
TEMPERATURES = {"temperature": 0.1, "teacher_temperature": 0.05}
every_rule = pytest.mark.parametrize("rule", RULES, ids=rule_name)


def test_the_rules_drawn_use_every_number():
    for field in dataclasses.fields(LabelRule):
        values = {getattr(rule, field.name) for rule in RULES}
        assert len(values) > 1, field.name
    assert {rule.teacher_positive for rule in RULES} == {None, "zero", "self"}
    assert any(rule.clip and rule.adds_neighbors for rule in RULES)


@every_rule
def test_reference_equals_the_dense_formula(rule):
    for problem, here, options in problems(rule, torch.float64, "cpu"):
        found, oracle = run(reference, problem, here, options), expected(problem, here, options)
        torch.testing.assert_close(found["loss"], oracle.loss, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found["dquery"], oracle.dquery, rtol=1e-10, atol=1e-10)
        if here.needs_softmax:
            for name in ("confidence", "entropy"):
                want = getattr(oracle, name)
                torch.testing.assert_close(found[name], want, rtol=1e-11, atol=1e-11)


@every_rule
def test_cpu_keeps_its_promise(rule):
    pytest.importorskip("softcl._C", reason="softcl._C is not built")
    check(cpu, rule, torch.float32, "cpu")


@every_rule
def test_triton_keeps_its_promise(triton_device, rule):
    """On a GPU, and in the interpreter from test_triton_interpreted.py."""
    check(triton, rule, torch.float32, triton_device)


@every_rule
def test_cuda_keeps_its_promise(monkeypatch, rule):
    """The kernels' own code on the CPU, as in test_cuda_host.py."""
    module = load_host_module()
    monkeypatch.setattr(cuda, "_load", lambda: (module, ""))
    module.set_options(seed=0)
    check(cuda, rule, torch.bfloat16, "cpu", excludes=False)


def check(backend, rule: LabelRule, dtype: torch.dtype, device: str, excludes: bool = True) -> None:
    """A backend's results against the dense formula, within the operator's bounds."""
    for problem, here, options in problems(rule, dtype, device, excludes):
        found, oracle = run(backend, problem, here, options), expected(problem, here, options)
        # As for rules with names: on clustered rows one cosine's rounding is not averaged out.
        assert_loss_close(found["loss"], found["dquery"], oracle, dtype, scale=2.0)
        if here.needs_softmax:
            for name in ("confidence", "entropy"):
                assert relative_error(found[name], getattr(oracle, name)) <= 2 * ENTROPY_TOLERANCE


def problems(rule: LabelRule, dtype: torch.dtype, device: str, excludes: bool = True):
    """Problem, rule and options of three calls: every option, and every kind of rows."""
    for (N, K, D), kind, options in zip(SHAPES, KINDS, OPTIONS, strict=True):
        p = make_problem(N, K, D, kind=kind, dtype=dtype, device=device, seed=N)
        if "excluded" in options:
            own = torch.arange(N, device=device)
            own[1] = -1
            options = {**options, "excluded": own if excludes else None}
        if "normalize" in options:
            if dtype == torch.bfloat16:  # its unit rows are rounded: test_ops_backends.py
                options = {}
            else:
                lengths = torch.linspace(0.5, 3.0, N, device=device, dtype=dtype)[:, None]
                p = Problem(p.query * lengths, p.key * lengths.flip(0), p.queue)
        yield p, fitting(rule, K), options


def run(backend, p: Problem, rule: LabelRule, options: dict) -> dict[str, Tensor]:
    options = {"positive": True, "normalize": False, "excluded": None, **options}
    call = LossCall(
        p.query, p.key, p.queue, rule, **TEMPERATURES, **options, gradient=True, diagnostics=True
    )
    return dict(zip(call.empty_results(), backend.run(call), strict=True))


def expected(p: Problem, rule: LabelRule, options: dict):
    return loss_oracle(p, rule, **TEMPERATURES, **options)


@every_rule
def test_label_mean_is_that_of_the_dense_labels(rule):
    p = make_problem(6, 40, 16, kind="clustered", dtype=torch.float64)
    own = (p.key * p.key).sum(1, keepdim=True) / 0.05
    made = dense_labels(rule, p.key @ p.queue.T / 0.05, own)
    want = made.labels[:, :1] * p.key + made.labels[:, 1:] @ p.queue
    found = label_mean(rule, p.key, p.queue, teacher_temperature=0.05)
    torch.testing.assert_close(found.mean, want, rtol=1e-11, atol=1e-11)


def loss_and_gradient(p: Problem, rule: LabelRule, queue=None, function=soft_contrastive_loss):
    query = p.query.clone().requires_grad_()
    queue = p.queue if queue is None else queue
    loss = function(query, p.key, queue, rule, reduction="none", normalize=True, **TEMPERATURES)
    weights = torch.linspace(0.5, 2.0, len(loss), dtype=loss.dtype)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), query)
    return loss.detach(), gradient


@every_rule
def test_compiled(rule):
    torch._dynamo.reset()
    p = make_problem(6, 40, 16, kind="clustered")
    compiled = torch.compile(soft_contrastive_loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        loss_and_gradient(p, rule, function=compiled), loss_and_gradient(p, rule), strict=True
    ):
        assert torch.equal(a, b)


@every_rule
def test_under_autocast(rule):
    p = make_problem(6, 40, 16, kind="clustered")
    plain = loss_and_gradient(p, rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss_and_gradient(p, rule)
    for a, b in zip(cast, plain, strict=True):
        assert torch.equal(a, b)


@every_rule
def test_sharded_over_one_process(rule):
    p = make_problem(6, 40, 16, kind="clustered", dtype=torch.float64)
    oracle = loss_oracle(p, rule, normalize=True, **TEMPERATURES)
    loss, gradient = loss_and_gradient(p, rule, ShardedRows(p.queue, World()))
    weights = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss, oracle.loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient, weights * oracle.dquery, rtol=1e-10, atol=1e-10)
