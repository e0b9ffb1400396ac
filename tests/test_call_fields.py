"""The keyword arguments of the compiled backends: fields by name, and errors that name them.

What the values mean, and which are refused: tests of the backends.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cuda_host import load_host_module

from softcl.testing import make_problem

RULE_FIELDS = [
    "positive", "mean", "confident_mean", "neighbor", "confident_neighbor", "clip",
    "num_neighbors", "teacher_positive",
]  # fmt: skip


def cpu_run():
    return pytest.importorskip("softcl._C", reason="softcl._C is not built").cpu_run


def cuda_run():
    launch = {"device": 0, "stream": 0, "workspace": 0, "workspace_bytes": 0}
    return functools.partial(load_host_module().cuda_run, **launch)


@pytest.fixture(params=[cpu_run, cuda_run], ids=lambda function: function.__name__)
def run(request):
    return request.param()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("queries", 0),  # no field
        ("query", "a tensor"),
        ("loss", -1),
        ("excluded", 1.0),
        ("vector_type", "float32"),
        ("dim", 1 << 70),
        ("num_threads", 1 << 40),
        ("num_queries", True),
        ("temperature", "0.1"),
        ("normalize", 1),
        ("rule", 3),
    ],
)
def test_wrong_keywords_and_types_are_named(run, name, value):
    with pytest.raises(TypeError, match=f"^{name}(=| is not a field of a call)"):
        run(**{name: value})


@pytest.mark.parametrize("name", [*RULE_FIELDS, "weight"])
def test_wrong_fields_of_a_rule_are_named(run, name):
    with pytest.raises(TypeError, match=f"^{name}(=| is not a field of a rule)"):
        run(rule={name: "x"})


def test_every_number_of_a_rule_arrives():
    """Each one changes the loss of a rule that already has all that it acts on."""
    run = cpu_run()
    p = make_problem(4, 30, 8, kind="clustered")
    base = {"positive": 1.0, "mean": 1.0, "confident_mean": 0.5, "num_neighbors": 3}

    def losses(**rule):
        loss = torch.full((4,), torch.nan)
        run(
            query=p.query.data_ptr(), key=p.key.data_ptr(), queue=p.queue.data_ptr(),
            num_queries=4, queue_size=30, dim=8, rule={**base, **rule}, temperature=0.1,
            teacher_temperature=1.0, loss=loss.data_ptr(),
        )  # fmt: skip
        return loss

    # Before and after the change of one field.
    changes = [({}, {name: 0.25}) for name in RULE_FIELDS[:5]]
    changes.append(({"positive": 0.01}, {"positive": 0.01, "clip": True}))
    changes.append(({"neighbor": 0.25}, {"neighbor": 0.25, "num_neighbors": 2}))
    changes += [({}, {"teacher_positive": kind}) for kind in (1, 2)]
    for before, after in changes:
        assert not torch.allclose(losses(**before), losses(**after)), after
