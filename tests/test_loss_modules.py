"""Loss modules: numbers as attributes, and the module of any method."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dense_methods import CASES, SMALL, D, K, N, dense_loss
from test_methods import make_batch
from torch import Tensor, nn
from torch.nn.functional import normalize

from softcl.methods import ASCL, METHODS, NNCLR, Batch, Method, MoCo, Result
from softcl.methods.losses import (
    ASCLLoss,
    MethodLoss,
    MoCoLoss,
    MSFLoss,
    ReSSLLoss,
    SCELoss,
    SNCLRLoss,
)
from softcl.nn import MemoryQueue

ROWS = torch.randn(6, N, D, generator=torch.Generator().manual_seed(0))
U, V, W, X, Y, Z = ROWS
QUEUE = normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(1)), dim=1)


# ---- numbers as attributes ----


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (MoCoLoss, "temperature", 0.3),
        (ASCLLoss, "teacher_temperature", 0.2),
        (ASCLLoss, "num_neighbors", 4),
        (ASCLLoss, "labels", "hard"),
        (SCELoss, "positive_weight", 0.9),
        (ReSSLLoss, "teacher_temperature", 0.5),
        (ReSSLLoss, "use_keys", True),
        (MSFLoss, "num_neighbors", 2),
    ],
)
def test_a_number_set_later_is_one_set_at_first(kind: type, name: str, value):
    criterion = kind()
    before = criterion(U, V, QUEUE)
    setattr(criterion, name, value)
    assert getattr(criterion, name) == getattr(criterion.method, name) == value
    changed = criterion(U, V, QUEUE)
    assert torch.equal(changed, kind(**{name: value})(U, V, QUEUE))
    assert not torch.equal(changed, before)


def test_a_schedule_of_the_temperature_gives_each_steps_loss():
    criterion = ASCLLoss(num_neighbors=3)
    batches = [(U, V), (W, X), (Y, Z)]
    for step, (query, key) in enumerate(batches):
        criterion.temperature = 0.2 - 0.1 * step / len(batches)
        expected = ASCLLoss(num_neighbors=3, temperature=0.2 - 0.1 * step / 3)
        assert torch.equal(criterion(query, key, QUEUE), expected(query, key, QUEUE))


@pytest.mark.parametrize(
    ("criterion", "name", "value", "error", "message"),
    [
        (MoCoLoss(), "temperature", 0.0, ValueError, "temperature must be positive and finite"),
        (MoCoLoss(), "temperature", True, TypeError, "temperature must be a number, got True"),
        (ASCLLoss(), "num_neighbors", -1, ValueError, "num_neighbors must be in .* got -1"),
        (ASCLLoss(), "num_neighbors", 2.5, TypeError, "num_neighbors must be an integer, got 2.5"),
        (ASCLLoss("hard"), "form", "byol", ValueError, "labels must be soft or normal"),
        (SCELoss(), "form", "exact", ValueError, "form must be one of .* got 'exact'"),
        (SNCLRLoss(), "projection_dim", 6, ValueError, "projection_dim=6 changes the trained maps"),
        (SNCLRLoss(), "form", "code", ValueError, "form='code' changes the trained maps in heads"),
        (SNCLRLoss(form="code"), "form", "paper", ValueError, "form='paper' changes the trained"),
        (MoCoLoss(), "reduction", "average", ValueError, "reduction must be one of .*'average'"),
        (MoCoLoss(), "method", ASCL(), TypeError, "method must be one of MoCo, got ASCL"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_and_changes_nothing(criterion, name, value, error, message):
    before, reduction = criterion.method, criterion.reduction
    with pytest.raises(error, match=message) as refusal:
        setattr(criterion, name, value)
    assert "\n" not in str(refusal.value)
    assert criterion.method is before and criterion.reduction == reduction


def test_numbers_that_only_fit_together_change_together():
    criterion = ASCLLoss("hard", num_neighbors=2)
    criterion.method = dataclasses.replace(criterion.method, labels="soft", form="byol")
    assert criterion.form == "byol"
    torch.testing.assert_close(
        criterion(U, V), ASCLLoss("soft", num_neighbors=2, form="byol")(U, V)
    )


def test_the_dimension_may_change_where_nothing_is_trained_with_it():
    criterion = SNCLRLoss(form="code")
    criterion.projection_dim = 6
    criterion.temperature = 0.3
    assert criterion.projection_dim == 6
    paper = SNCLRLoss(projection_dim=D)
    attention, random = paper.attention, torch.get_rng_state()
    paper.temperature = 0.3
    assert paper.attention is attention and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("threshold", 0.1, r"MoCoLoss has no 'threshold' \(a number of SNCLR\)"),
        ("num_neighbors", None, r"no 'num_neighbors' \(a number of ASCL, SNCLR, NNCLR, MSF\)"),
        ("temprature", 0.1, "no 'temprature'; did you mean 'temperature'"),
        ("reductions", "sum", "no 'reductions'; did you mean 'reduction'"),
        ("tau", np.float32(0.1), "MoCoLoss has no 'tau'"),
        ("symetric", True, "no 'symetric'; did you mean 'symmetric'"),
        ("temp", torch.tensor(0.1), "MoCoLoss has no 'temp'"),
    ],
)
def test_an_attribute_that_nothing_reads_is_refused(name: str, value, message: str):
    criterion = MoCoLoss()
    with pytest.raises(AttributeError, match=message):
        setattr(criterion, name, value)
    assert not hasattr(criterion, name)
    if value is not None:
        with pytest.raises(TypeError, match=message):
            MoCoLoss(**{name: value})


def test_what_a_module_has_of_its_own_goes_on_working():
    class Scaled(MoCoLoss):
        scale = 1.0

        def forward(self, *given):
            return self.scale * super().forward(*given)

    criterion, seen = Scaled(), []
    criterion.scale = 3.0
    torch.testing.assert_close(criterion(U, V, QUEUE), 3.0 * MoCoLoss()(U, V, QUEUE))
    assert criterion.eval().training is False and criterion.train().training
    hook = criterion.register_forward_hook(lambda *_: seen.append(1))
    criterion(U, V, QUEUE)
    hook.remove()
    assert seen == [1]
    criterion.register_buffer("count", torch.zeros(()))
    criterion.count = torch.ones(())
    criterion.extra = nn.Linear(2, 2)
    criterion.weights = nn.Parameter(torch.ones(3))
    criterion.callback = print
    criterion._note = 3
    assert set(criterion.state_dict()) == {"count", "weights", "extra.weight", "extra.bias"}
    assert criterion.double().count.dtype == torch.float64
    criterion.queue = MemoryQueue(K, D)
    criterion.reduction, criterion.backend = "sum", "reference"
    assert "queue.rows" in criterion.state_dict()
    with pytest.raises(AttributeError, match="'Scaled' object has no attribute 'temprature'"):
        _ = criterion.temprature


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_numbers_of_their_own(copied: Callable):
    criterion = SNCLRLoss(projection_dim=D, num_neighbors=3)
    criterion.temperature = 0.3
    other = copied(criterion)
    other.temperature = 0.7
    assert (criterion.temperature, other.temperature) == (0.3, 0.7)
    assert torch.equal(other.attention["f1"].weight, criterion.attention["f1"].weight)
    assert repr(other).startswith(
        "SNCLRLoss(\n  temperature=0.7, projection_dim=6, num_neighbors=3\n"
    )


def test_a_compiled_module_follows_its_temperature():
    """With no break in the graph, and two compilations for any number of temperatures."""
    for criterion, vectors in (
        (MoCoLoss(), (U, V)),
        (SNCLRLoss(projection_dim=D), ((U, V), (W, X), (Y, Z))),
    ):
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []

        def counting(graph: torch.fx.GraphModule, _: list, graphs: list = graphs) -> Callable:
            graphs.append(graph)
            return graph.forward

        compiled, found = torch.compile(criterion, fullgraph=True, backend=counting), []
        for step in range(12):
            criterion.temperature = 0.1 + 0.02 * step
            found.append(compiled(*vectors, QUEUE))
            torch.testing.assert_close(found[-1], criterion(*vectors, QUEUE))
        assert len({round(loss.item(), 5) for loss in found}) == 12
        assert len(graphs) <= 2


# ---- the module of any method ----


def by_view(vectors: dict[str, Tensor], method: Method) -> Tensor | tuple[Tensor, ...] | None:
    """As the module takes them: in the order of the views."""
    order = [view for view in method.views() if view in vectors]
    order += [view for view in vectors if view not in order]
    if len(order) < 2:
        return vectors[order[0]] if order else None
    return tuple(vectors[view] for view in order)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_method_makes_its_module(name: str, named: bool):
    method = CASES[name]
    batch, _ = make_batch(method, "clustered")
    criterion = MethodLoss(method, reduction="none", backend="reference").double()
    criterion.heads.load_state_dict(batch.heads.state_dict())
    arranged = (lambda vectors, _: vectors) if named else by_view
    queues = batch.queues if named or len(batch.queues) > 1 else batch.queues.get("queue")
    found = criterion(
        arranged(batch.student, method),
        arranged(batch.teacher, method),
        queues,
        predicted=arranged(batch.predicted, method),
        notes=batch.notes,
    )
    torch.testing.assert_close(found, dense_loss(method, batch), rtol=1e-10, atol=1e-11)


@dataclasses.dataclass(frozen=True)
class Pulled(Method):
    """No label rule: a trained map of the query is pulled to the key, the queue's mean pushes."""

    push: float = 0.5

    def queues(self) -> dict[str, int]:
        return {"past": self.queue_size}

    def heads(self) -> dict[str, nn.Module]:
        return {"map": nn.Linear(self.projection_dim, self.projection_dim)}

    def loss(self, batch: Batch) -> Result:
        z = normalize(batch.heads["map"](batch.predicted["query"]), dim=1)
        t = normalize(batch.teacher["key"], dim=1)
        return Result(self.push * (z * batch.rows("past").mean(0)).sum(1) - (z * t).sum(1))


def test_a_method_without_a_rule_has_its_module():
    torch.manual_seed(0)
    criterion = MethodLoss(Pulled, push=0.25, projection_dim=D, queue={"past": MemoryQueue(K, D)})
    query, key = U.clone().requires_grad_(), V.clone().requires_grad_()
    loss = criterion(query, key)
    loss.backward()
    linear, past = criterion.heads["map"], criterion.queue["past"].rows
    z, t = normalize(linear(U), dim=1), normalize(V, dim=1)
    torch.testing.assert_close(loss, (0.25 * z @ past.mean(0) - (z * t).sum(1)).mean())
    assert key.grad is None and query.grad is not None and linear.weight.grad is not None
    assert torch.equal(criterion(query, key, past), criterion(query, key, {"past": past}))
    criterion.push = 0.75
    torch.testing.assert_close(criterion(U, V), (0.75 * z @ past.mean(0) - (z * t).sum(1)).mean())
    with pytest.raises(ValueError, match="projection_dim=3 changes the trained maps"):
        criterion.projection_dim = 3
    with pytest.raises(ValueError, match="past is missing"):
        MethodLoss(Pulled, projection_dim=D)(U, V)
    assert repr(criterion).startswith("MethodLoss(\n  Pulled, projection_dim=6, push=0.75")
    assert "Pulled" not in {kind.__name__ for kind in METHODS.values()}


def test_the_general_module_names_what_does_not_fit():
    with pytest.raises(TypeError, match="method must be a softcl.methods.Method, got <class 'int'"):
        MethodLoss(int)
    with pytest.raises(TypeError, match="MethodLoss has no 'push'"):
        MethodLoss(MoCo, push=1.0)
    with pytest.raises(ValueError, match="teacher must be None: NNCLR sees no view there"):
        MethodLoss(NNCLR(**SMALL))((U, V), (W, X), QUEUE)
    with pytest.raises(ValueError, match="student must be of the views query, got kwery"):
        MethodLoss(MoCo)({"kwery": U}, V, QUEUE)

    @dataclasses.dataclass(frozen=True)
    class Clash(MoCo):
        backend: float = 1.0

    with pytest.raises(ValueError, match="Clash.backend must have another name"):
        MethodLoss(Clash)
