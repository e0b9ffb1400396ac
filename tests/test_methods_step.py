"""One training step of every method equals the same step written with dense N x K PyTorch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dense_methods import CASES, SMALL, D, K, N, dense_loss
from torch import Tensor, nn

from softcl import AdaptiveSoftLabels
from softcl.methods import ASCL, SCE, Batch, Method
from softcl.methods.mixing import MIXES
from softcl.nn import MemoryQueue, make_teacher
from softcl.testing import available_backends, make_problem
from softcl.train.parts import build_heads
from softcl.train.step import MEASURES, StepRandom, TrainState, train_step

BACKENDS = available_backends(make_problem(2, 3, 4), AdaptiveSoftLabels(1))
LR = 0.1


def small_student() -> nn.Module:
    """With batch norm, so that the order and the grouping of the forward passes matter."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, D),
    )


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """A view: something random of the images that depends on the generator."""
    return images.float() / 255 + 0.3 * torch.randn(images.shape, generator=generator)


def make_state(method: Method) -> TrainState:
    torch.manual_seed(0)
    student, heads = small_student(), build_heads(method)
    queues = nn.ModuleDict(
        {name: MemoryQueue(rows, D, seed=len(name)) for name, rows in method.queues().items()}
    )
    trained = [*student.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=0.9, weight_decay=5e-4)
    return TrainState(method, student, make_teacher(student), queues, optimizer, heads)


def batch_of(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (N, 3, 6, 6), generator=generator, dtype=torch.uint8)


class DenseRun:
    """The same training in PyTorch alone: EMA, SGD and the queues by hand, dense losses."""

    def __init__(self, state: TrainState) -> None:
        self.method = state.method
        self.student, self.heads = copy.deepcopy(state.student), copy.deepcopy(state.heads)
        self.teacher = copy.deepcopy(state.teacher)
        self.queues = {name: list(queue.rows.clone()) for name, queue in state.queues.items()}
        self.velocity = [torch.zeros_like(p) for p in self.parameters()]

    def parameters(self) -> list[Tensor]:
        return [*self.student.parameters(), *self.heads.parameters()]

    @torch.no_grad()
    def follow(self) -> None:
        m = self.method.momentum
        for a, b in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            a.copy_(m * a + (1 - m) * b)

    def enqueue(self, name: str, keys: Tensor) -> None:
        rows = self.queues[name]
        rows += list(nn.functional.normalize(keys.detach(), dim=1))
        del rows[: len(keys)]

    def forward(self, images: Tensor, number: int) -> Batch:
        random, method = StepRandom(0, number, torch.device("cpu")), self.method
        views = {name: noisy(images, random(f"view {name}")) for name in method.views()}
        notes = {}
        if "mixed" in method.student_sees():
            generator = random("mix")
            order = torch.randperm(N, generator=generator)
            mix = MIXES[method.mix]
            views["mixed"], share = mix(views["query"], views["key"][order], generator)
            notes = {"order": order, "share": share}
        student = {name: self.student(views[name]) for name in method.student_sees()}
        predicted = student
        if "predictor" in self.heads:
            predicted = {name: self.heads["predictor"](z) for name, z in student.items()}
        with torch.no_grad():
            teacher = {name: self.teacher(views[name]) for name in method.teacher_sees()}
        return Batch(student, predicted, teacher, {}, self.heads, notes)

    def new_keys(self, batch: Batch) -> dict[str, Tensor]:
        """What enters the queues, as the sources say."""
        name, symmetric = type(self.method).__name__, getattr(self.method, "symmetric", False)
        if name == "NNCLR":
            return {"queue": batch.student["query"]}
        if name == "SNCLR":
            return {"queue": batch.teacher["second"]}
        if name == "SEED":
            return {"queue": batch.teacher["query"]}
        keys = {"queue": batch.teacher["key"]}
        if symmetric:
            keys["queue"] = torch.cat([batch.teacher["key"], batch.teacher["query"]])
        if name == "ReCo":
            keys["weak queue"] = batch.teacher["weak"]
        return {queue: rows for queue, rows in keys.items() if queue in self.queues}

    def step(self, images: Tensor, number: int) -> float:
        name = type(self.method).__name__
        if name not in ("SCE", "NNCLR", "SEED"):
            self.follow()
        batch = self.forward(images, number)
        if name == "MSF":
            for queue, keys in self.new_keys(batch).items():
                self.enqueue(queue, keys)
        for queue, rows in self.queues.items():
            batch.queues[queue] = torch.stack(rows)
        loss = dense_loss(self.method, batch).mean()
        parameters = self.parameters()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for v, p, g in zip(self.velocity, parameters, gradients, strict=True):
                v.mul_(0.9).add_(g + 5e-4 * p)
                p.sub_(LR * v)
        if name == "SCE":
            self.follow()
        if name != "MSF":
            for queue, keys in self.new_keys(batch).items():
                self.enqueue(queue, keys)
        return loss.item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_the_dense_step(name, backend):
    """Every parameter after each of two steps of a run, within 1e-6, and the queues."""
    method = CASES[name]
    state = make_state(method)
    dense = DenseRun(state)
    start = copy.deepcopy(list(state.student.parameters()))
    for number in range(2):
        images = batch_of(number)
        views = {view: noisy for view in method.views()}
        measures = train_step(state, images, views, seed=0, backend=backend)
        expected = dense.step(images, number)
        assert float(measures[0]) == pytest.approx(expected, rel=1e-5)
        trained = [*state.student.parameters(), *state.heads.parameters()]
        for actual, wanted in zip(trained, dense.parameters(), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
        for actual, wanted in zip(
            state.teacher.parameters(), dense.teacher.parameters(), strict=True
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
        for queue, rows in dense.queues.items():
            ring = state.queues[queue]
            oldest_first = ring.rows.roll(-ring.pointer, dims=0)
            torch.testing.assert_close(oldest_first, torch.stack(rows), rtol=0, atol=2e-6)
    assert not torch.allclose(start[0], state.student[0].weight, atol=1e-4)


def test_split_batch_norm_shuffles_the_teachers_batch_alone(monkeypatch):
    calls = []
    from softcl.train import step as module

    original = module.shuffled
    monkeypatch.setattr(module, "shuffled", lambda *a: calls.append(1) or original(*a))
    for method, count in (
        (ASCL(**{**SMALL, "num_splits": 2}), 1),
        (ASCL(symmetric=True, **{**SMALL, "num_splits": 2}), 2),
        (ASCL(form="byol", **{**SMALL, "num_splits": 2}), 0),
        (ASCL(**SMALL), 0),
    ):
        calls.clear()
        views = {view: noisy for view in method.views()}
        train_step(make_state(method), batch_of(0), views, seed=0, backend="auto")
        assert len(calls) == count


@pytest.mark.parametrize("name", ["snclr paper", "reco", "msf", "ressl 3 crops"])
def test_accumulated_parts_run(name):
    """In parts, a batch's relations are those of the parts; keys of all parts enter the queue."""
    method = CASES[name]
    state = make_state(method)
    views = {view: noisy for view in method.views()}
    measures = train_step(state, batch_of(0), views, seed=0, backend="auto", accumulate=2)
    assert math.isfinite(measures[0]) and len(measures) == len(MEASURES)
    assert state.queues["queue"].pointer == N % K and state.step == 1


def test_the_teacher_follows_after_the_step_in_sce():
    state = make_state(SCE(momentum=0.0, **SMALL))
    train_step(state, batch_of(0), {"query": noisy, "key": noisy}, seed=0, backend="auto")
    for a, b in zip(state.teacher.parameters(), state.student.parameters(), strict=True):
        assert torch.equal(a, b)
