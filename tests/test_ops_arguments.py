"""Every unusable argument gets one error that names the argument and its value."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import softcl
from softcl import AdaptiveSoftLabels, HardLabels, queue_statistics, soft_contrastive_loss
from softcl.distributed import ShardedRows, World
from softcl.ops import BACKENDS
from softcl.testing import make_problem

ROOT = Path(__file__).resolve().parent.parent


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


def short(parameter) -> str:
    """An id that is the same in every process: no addresses."""
    return re.sub(r" at 0x\w+", "", str(parameter))[:40]


BAD_LOSS_ARGUMENTS = [
    ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    ({"query": torch.ones(4)}, ValueError, r"query must be a matrix.*\(4,\)"),
    ({"query": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "query.*torch.int64"),
    ({"query": torch.ones(0, 8)}, ValueError, r"query must not be empty.*\(0, 8\)"),
    ({"key": torch.ones(4, 7)}, ValueError, r"key must have query's dimension D=8.*\(4, 7\)"),
    ({"key": torch.ones(5, 8)}, ValueError, r"key must have query's shape \(4, 8\).*\(5, 8\)"),
    ({"key": torch.ones(4, 8, device="meta")}, ValueError, "key is on meta, but query is on cpu"),
    ({"queue": torch.ones(10, 9)}, ValueError, r"queue must have.*D=8.*\(10, 9\)"),
    ({"queue": torch.ones(0, 8)}, ValueError, r"queue must not be empty.*\(0, 8\)"),
    ({"queue": None}, TypeError, "queue must be a tensor, got NoneType"),
    ({"rule": "ascl"}, TypeError, "rule must be a softcl.LabelRule.*'ascl'"),
    ({"rule": HardLabels}, TypeError, "rule must be a softcl.LabelRule"),
    ({"rule": AdaptiveSoftLabels(11)}, ValueError, "rule.num_neighbors.*10 rows, got 11"),
    ({"temperature": 0}, ValueError, "temperature must be positive and finite.*got 0"),
    ({"temperature": -0.1}, ValueError, "temperature must be positive.*-0.1"),
    ({"temperature": float("nan")}, ValueError, "temperature must be positive.*nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be positive.*inf"),
    ({"temperature": 1e-10}, ValueError, r"temperature must be.*\[1e-06, 1e\+06\], got 1e-10"),
    ({"temperature": 1e30}, ValueError, r"temperature must be.*got 1e\+30"),
    ({"temperature": torch.tensor(0.0)}, ValueError, "temperature must be positive.*got 0.0"),
    ({"temperature": torch.ones(2)}, TypeError, r"temperature must be.*0-dim tensor.*\(2,\)"),
    (
        {"temperature": torch.tensor(0.1, requires_grad=True)},
        ValueError,
        "temperature requires grad.*temperature.detach",
    ),
    ({"temperature": True}, TypeError, "temperature must be a number, got True"),
    ({"temperature": "0.1"}, TypeError, "temperature must be a number, got '0.1'"),
    ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be positive.*0.0"),
    ({"reduction": "average"}, ValueError, "reduction must be one of.*'average'"),
    ({"filled": 0}, ValueError, "filled must be between 1 and the queue's 10 rows, got 0"),
    ({"filled": 11}, ValueError, "filled must be between 1 and.*got 11"),
    ({"filled": 2.0}, TypeError, "filled must be an integer, got 2.0"),
    ({"filled": 1}, ValueError, "rule.num_neighbors.*queue's 1 rows, got 2"),
    ({"backend": "gpu"}, ValueError, "backend must be one of.*'gpu'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LOSS_ARGUMENTS, ids=short)
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
    ids=short,
)
def test_bad_statistics_argument(change, error, message):
    p = make_problem(4, 10, 8)
    arguments = {"vectors": p.query, "queue": p.queue, "temperature": 0.1, **change}
    with pytest.raises(error, match=message):
        queue_statistics(**arguments)


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"positive": -0.1}, ValueError, "positive must be at least 0 and finite, got -0.1"),
        ({"mean": float("nan")}, ValueError, "mean must be at least 0 and finite, got nan"),
        ({"confident_mean": "3"}, TypeError, "confident_mean must be a number, got '3'"),
        ({"neighbor": True}, TypeError, "neighbor must be a number, got True"),
        ({"confident_neighbor": float("inf")}, ValueError, "confident_neighbor.*got inf"),
        ({"num_neighbors": -1}, ValueError, "num_neighbors must be an integer >= 0, got -1"),
        ({"num_neighbors": 1.5}, TypeError, "num_neighbors must be an integer, got 1.5"),
        ({"num_neighbors": True}, TypeError, "num_neighbors must be an integer, got True"),
        ({"clip": 1}, TypeError, "clip must be True or False, got 1"),
        ({"clip": True, "positive": 0.0, "mean": 1.0}, ValueError, "clip=True needs a positive"),
        ({"clip": True, "neighbor": 1.0}, ValueError, "clip=True takes the place of neighbor"),
        ({"teacher_positive": "self"}, ValueError, "teacher_positive shares the mass of mean"),
        ({"teacher_positive": "one"}, ValueError, "teacher_positive must be None.*'one'"),
        ({"positive": 0.0}, ValueError, "positive \\+ mean \\+ neighbor.*above 0"),
    ],
    ids=short,
)
def test_unusable_numbers_of_a_rule(numbers, error, message):
    with pytest.raises(error, match=message) as told:
        softcl.LabelRule(**numbers)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("value", [-0.1, 1.1, "a", float("nan")])
def test_bad_positive_weight(value):
    with pytest.raises((TypeError, ValueError), match="positive_weight must be"):
        softcl.MixedLabels(value)


def test_rules_are_data():
    rule = softcl.LabelRule(positive=0.5, mean=0.25, confident_neighbor=0.5, num_neighbors=4)
    assert rule == softcl.LabelRule.from_numbers(rule.to_numbers())
    assert hash(rule) == hash(softcl.LabelRule.from_numbers(rule.to_numbers()))
    assert eval(repr(rule), {"LabelRule": softcl.LabelRule}) == rule
    assert softcl.AdaptiveSoftLabels(0).needs_softmax is False
    with pytest.raises(TypeError):
        softcl.LabelRule(0.5)


def test_numbers_of_any_type():
    """NumPy's and 0-dim tensors, wherever a number is asked for."""
    plain = call(rule=AdaptiveSoftLabels(2), temperature=0.25, teacher_temperature=0.5, filled=8)
    for real, integer in (
        (np.float32, np.int64),
        (np.float64, np.int32),
        (torch.tensor, torch.tensor),
        (Fraction, int),
    ):
        rule = AdaptiveSoftLabels(integer(2))
        found = call(
            rule=rule, temperature=real(0.25), teacher_temperature=real(0.5), filled=integer(8)
        )
        assert torch.equal(found, plain)
        assert softcl.LabelRule(mean=real(0.5)) == softcl.LabelRule(mean=0.5)
        assert softcl.MixedLabels(real(0.25)) == softcl.MixedLabels(0.25)
    p = make_problem(4, 10, 8)
    found = queue_statistics(p.query, p.queue, np.float32(0.25), num_neighbors=np.int64(3))
    assert found.neighbor_indices.shape == (4, 3)


def test_the_loss_takes_at_most_thirteen_arguments():
    assert len(inspect.signature(soft_contrastive_loss).parameters) <= 13


def test_importing_the_library_loads_the_operator_alone():
    """Nor does a call load more."""
    code = """
import sys, softcl
from softcl.testing import make_problem
p = make_problem(4, 10, 8)
softcl.soft_contrastive_loss(p.query, p.key, p.queue, softcl.HardLabels(), temperature=0.1,
                             teacher_temperature=0.1)
loaded = [name for name in ("softcl.nn", "softcl.distributed", "softcl.methods", "triton", "timm")
          if name in sys.modules]
import torch
assert not torch.distributed.is_initialized()
sys.exit(", ".join(loaded) or 0)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr


def test_no_module_of_ops_imports_a_backend():
    """Backends are chosen by name; the reference is the specification and serves nobody."""
    for file in (ROOT / "softcl" / "ops").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = set()
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names} | set(node.module.split("."))
            elif isinstance(node, ast.Import):
                names = {part for alias in node.names for part in alias.name.split(".")[1:]}
            assert not names & set(BACKENDS), file.name


@pytest.mark.parametrize("value", [torch.ones(1), torch.tensor(True), np.bool_(True), [0.5]])
def test_what_is_no_number_is_no_number_of_a_rule(value):
    with pytest.raises(TypeError, match="^mean must be a number"):
        softcl.LabelRule(mean=value)


@pytest.mark.parametrize("value", [0.0, float("nan"), 1e30])
def test_a_temperature_in_a_tensor_is_refused_by_its_own_name(value):
    p, value = make_problem(4, 10, 8), torch.tensor(value)
    for queue in (p.queue, ShardedRows(p.queue, World())):
        for name in ("temperature", "teacher_temperature"):
            with pytest.raises(ValueError, match=f"^{name} must be positive and finite"):
                call(queue=queue, **{name: value})
        with pytest.raises(ValueError, match="^teacher_temperature must be"):
            softcl.label_mean(AdaptiveSoftLabels(2), p.key, queue, teacher_temperature=value)


@pytest.mark.parametrize(
    ("num_neighbors", "error", "message"),
    [
        (-1, ValueError, "num_neighbors must be between 0 and the parts' 6 together, got -1"),
        (7, ValueError, "num_neighbors must be between 0 and the parts' 6 together, got 7"),
        (1.5, TypeError, "num_neighbors must be an integer, got 1.5"),
    ],
)
def test_bad_merges(num_neighbors, error, message):
    p = make_problem(4, 10, 8)
    part = queue_statistics(p.query, p.queue, 0.1, num_neighbors=3)
    with pytest.raises(error, match=message):
        softcl.merge_statistics([part, part], num_neighbors=num_neighbors)
    with pytest.raises(ValueError, match="parts must not be empty"):
        softcl.merge_statistics([])


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
