"""Every unusable argument gets one error that names the argument and its value."""

from __future__ import annotations

import pytest
import torch

import softcl
from softcl import AdaptiveSoftLabels, HardLabels, queue_statistics, soft_contrastive_loss
from softcl.testing import make_problem


def call(**changes):
    p = make_problem(4, 10, 8)
    arguments = {
        "query": p.query,
        "key": p.key,
        "queue": p.queue,
        "rule": AdaptiveSoftLabels(2),
        "temperature": 0.1,
        "teacher_temperature": 0.05,
    }
    arguments.update(changes)
    return soft_contrastive_loss(**arguments)


BAD_LOSS_ARGUMENTS = [
    ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    ({"query": torch.ones(4)}, ValueError, r"query must be a matrix.*\(4,\)"),
    ({"query": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "query.*torch.int64"),
    ({"query": torch.ones(0, 8)}, ValueError, r"query must not be empty.*\(0, 8\)"),
    ({"key": torch.ones(4, 7)}, ValueError, r"key must have query's dimension D=8.*\(4, 7\)"),
    ({"key": torch.ones(5, 8)}, ValueError, r"key must have query's shape \(4, 8\).*\(5, 8\)"),
    ({"key": torch.ones(4, 8).double()}, TypeError, "key must have query's dtype.*float64"),
    ({"key": torch.ones(4, 8, device="meta")}, ValueError, "key is on meta, but query is on cpu"),
    ({"queue": torch.ones(10, 9)}, ValueError, r"queue must have.*D=8.*\(10, 9\)"),
    ({"queue": torch.ones(0, 8)}, ValueError, r"queue must not be empty.*\(0, 8\)"),
    ({"queue": None}, TypeError, "queue must be a tensor, got NoneType"),
    ({"rule": "ascl"}, TypeError, "rule must be a label rule.*'ascl'"),
    ({"rule": HardLabels}, TypeError, "rule must be a label rule"),
    ({"rule": AdaptiveSoftLabels(11)}, ValueError, "rule.num_neighbors.*10 rows, got 11"),
    ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
    ({"temperature": -0.1}, ValueError, "temperature must be positive.*-0.1"),
    ({"temperature": float("nan")}, ValueError, "temperature must be positive.*nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be positive.*inf"),
    ({"temperature": "0.1"}, TypeError, "temperature must be a number, got '0.1'"),
    ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be positive.*0.0"),
    ({"reduction": "average"}, ValueError, "reduction must be one of.*'average'"),
    ({"filled": 0}, ValueError, "filled must be between 1 and the queue's 10 rows, got 0"),
    ({"filled": 11}, ValueError, "filled must be between 1 and.*got 11"),
    ({"filled": 2.0}, TypeError, "filled must be an integer or None, got 2.0"),
    ({"filled": 1}, ValueError, "rule.num_neighbors.*queue's 1 rows, got 2"),
    ({"backend": "gpu"}, ValueError, "backend must be one of.*'gpu'"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD_LOSS_ARGUMENTS, ids=lambda x: str(x)[:40]
)
def test_bad_loss_argument(change, error, message):
    with pytest.raises(error, match=message):
        call(**change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vectors": torch.ones(2)}, ValueError, "vectors must be a matrix"),
        ({"queue": torch.ones(3, 4)}, ValueError, "queue must have vectors's dimension D=8"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"num_neighbors": -1}, ValueError, "num_neighbors must be between.*got -1"),
        ({"num_neighbors": 11}, ValueError, "num_neighbors must be between 0 and.*got 11"),
        ({"num_neighbors": 1.5}, TypeError, "num_neighbors must be an integer, got 1.5"),
        ({"num_neighbors": True}, TypeError, "num_neighbors must be an integer, got True"),
        ({"backend": ""}, ValueError, "backend must be one of"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_statistics_argument(change, error, message):
    p = make_problem(4, 10, 8)
    arguments = {"vectors": p.query, "queue": p.queue, "temperature": 0.1, **change}
    with pytest.raises(error, match=message):
        queue_statistics(**arguments)


@pytest.mark.parametrize("rule", [softcl.AdaptiveSoftLabels, softcl.NeighborLabels])
@pytest.mark.parametrize("value", [-1, 1.5, "3", True])
def test_bad_rule_numbers(rule, value):
    with pytest.raises(ValueError, match="num_neighbors must be an integer >= 0"):
        rule(value)


@pytest.mark.parametrize("value", [-0.1, 1.1, "a", float("nan")])
def test_bad_positive_weight(value):
    with pytest.raises(ValueError, match="positive_weight must be a number in"):
        softcl.MixedLabels(value)


def test_rows_far_from_unit_norm_are_explained():
    """Where such rows overflow, the error names them; a backend may instead cope."""
    p = make_problem(4, 10, 8)
    query = p.query * torch.tensor(1e38)
    try:
        loss = call(query=query)
    except ValueError as error:
        assert "unit norm" in str(error)
    else:
        assert bool(torch.isfinite(loss))


def test_explicit_backend_that_cannot_run_says_why():
    p = make_problem(4, 10, 8)
    with pytest.raises(softcl.UnsupportedBackendError, match="backend 'triton' cannot run"):
        soft_contrastive_loss(
            p.query.double(),
            p.key.double(),
            p.queue.double(),
            HardLabels(),
            temperature=0.1,
            teacher_temperature=0.1,
            backend="triton",
        )


def test_choice_names_the_backend_and_the_reasons():
    p = make_problem(4, 10, 8, dtype=torch.float64)
    choice = softcl.choose_backend(p.query, p.queue, rule=HardLabels())
    assert choice.name == "reference"
    assert "cpu" in choice.reasons and choice.reasons["cpu"]
    assert "reference (cpu: " in str(choice)


def test_half_precision_and_double_results():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        p = make_problem(4, 10, 8, dtype=dtype)
        loss = soft_contrastive_loss(
            p.query, p.key, p.queue, HardLabels(), temperature=0.1, teacher_temperature=0.1
        )
        assert loss.dtype == expected
