"""ASCL: its module, steps with split batch norm against dense PyTorch, its numbers.

Its losses against the dense formula: test_methods.py.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dense_methods import cross_entropies
from torch import nn
from torch.nn import functional as F

from softcl.labels import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    HardLabels,
    NeighborLabels,
)
from softcl.methods import METHODS, Defaults
from softcl.methods.ascl import ASCL, DEFAULTS, LABELS
from softcl.methods.losses import ASCLLoss
from softcl.nn import MemoryQueue, convert_split_batch_norm, make_teacher
from softcl.ops import soft_contrastive_loss
from softcl.train.step import StepRandom, TrainState, train_step


def unit_rows(count: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1)


def test_confidence_of_the_random_queue_at_the_start():
    """The page says c is about 0.18 for K = 4096, D = 128, random keys."""
    queue = MemoryQueue(4096, 128).rows
    key = MemoryQueue(64, 128, seed=1).rows
    _, diagnostics = soft_contrastive_loss(
        key,
        key,
        queue,
        AdaptiveSoftLabels(1),
        temperature=0.1,
        teacher_temperature=0.05,
        diagnostics=True,
    )
    assert 0.16 < diagnostics.confidence.mean() < 0.20


# ---- the loss module ----


def test_loss_module_takes_a_queue_in_three_ways():
    u, v = unit_rows(6, 8, 1), unit_rows(6, 8, 2)
    queue = MemoryQueue(20, 8)
    before = queue.rows.clone()
    given = ASCLLoss()(u, v, queue)
    assert torch.equal(queue.rows, before) and queue.pointer == 0
    assert torch.equal(ASCLLoss()(u, v, queue.rows), given)
    own = ASCLLoss(queue=queue)
    assert torch.equal(own(u, v), given)
    assert own.queue is queue and "queue.rows" in own.state_dict()
    other = MemoryQueue(20, 8, seed=1)
    assert torch.equal(own(u, v, other), ASCLLoss()(u, v, other))


def test_loss_module_uses_the_filled_rows_alone():
    u, v = unit_rows(6, 8, 1), unit_rows(6, 8, 2)
    queue = MemoryQueue(20, 8, init="empty")
    with pytest.raises(ValueError, match="queue is empty"):
        ASCLLoss()(u, v, queue)
    queue.enqueue(unit_rows(5, 8, 3))
    torch.testing.assert_close(ASCLLoss()(u, v, queue), ASCLLoss()(u, v, queue.rows[:5]))


def test_loss_module_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="queue is missing"):
        ASCLLoss()(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="labels must be one of .* got 'softer'"):
        ASCLLoss("softer")
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        ASCLLoss(temperature=0)


# ---- a whole step ----

SPLITS, N, K, D = 2, 8, 20, 6


def small_student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, D),
    ).double()


def noisy(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A view: something random of the images that depends on the generator."""
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return images.double() / 255 + 0.3 * noise


def dense_forward(parameters: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The student of small_student, its batch norm written out per split."""
    conv, gamma, beta, weight, bias = parameters
    x = F.conv2d(x, conv)
    normalised = torch.empty_like(x)
    for split in range(SPLITS):
        part = x[split::SPLITS]
        mean = part.mean((0, 2, 3), keepdim=True)
        var = ((part - mean) ** 2).mean((0, 2, 3), keepdim=True)
        normalised[split::SPLITS] = (part - mean) / (var + 1e-5).sqrt()
    x = (normalised * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)).relu()
    return F.normalize(x.flatten(1) @ weight.T + bias, dim=1)


def dense_step(step, images, student, teacher, velocity, queue, method, lr) -> torch.Tensor:
    """One step of ASCL, MoCo form, in the order of the paper's code; changes its lists in place."""
    random = StepRandom(0, step, torch.device("cpu"))
    for follower, leader in zip(teacher, student, strict=True):
        follower.copy_(method.momentum * follower + (1 - method.momentum) * leader)
    leaves = [parameter.clone().requires_grad_() for parameter in student]
    z = dense_forward(leaves, noisy(images, random("view query")))
    weak = noisy(images, random("view key"))
    order = torch.randperm(N, generator=random("shuffle key"))
    t = torch.empty(N, D, dtype=torch.float64)
    t[order] = dense_forward(teacher, weak[order])
    loss = cross_entropies(method, z, t, torch.stack(queue)).mean()
    for index, gradient in enumerate(torch.autograd.grad(loss, leaves)):
        velocity[index] = 0.9 * velocity[index] + gradient + 5e-4 * student[index]
        student[index] = student[index] - lr * velocity[index]
    queue += list(t)
    del queue[:N]
    return loss.detach()


@pytest.mark.parametrize("labels", LABELS)
def test_steps_equal_dense_steps(labels):
    method = ASCL(
        labels=labels,
        num_neighbors=3,
        queue_size=K,
        momentum=0.7,
        projection_dim=D,
        num_splits=SPLITS,
    )
    student = convert_split_batch_norm(small_student(), SPLITS)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    # A float64 queue still rounds to fp32 what it is given; 1e-6 below covers that.
    queue = MemoryQueue(K, D).double()
    queues = nn.ModuleDict({"queue": queue})
    state = TrainState(method, student, make_teacher(student), queues, optimizer)

    dense_student = [parameter.detach().clone() for parameter in student.parameters()]
    dense_teacher = [parameter.clone() for parameter in dense_student]
    velocity = [torch.zeros_like(parameter) for parameter in dense_student]
    dense_queue = list(queue.rows.clone())  # oldest first
    start = copy.deepcopy(dense_student)
    generator = torch.Generator().manual_seed(5)
    for step in range(6):  # 48 keys: the ring wraps twice, within a batch
        images = torch.randint(0, 256, (N, 3, 6, 6), generator=generator, dtype=torch.uint8)
        expected = dense_step(
            step, images, dense_student, dense_teacher, velocity, dense_queue, method, 0.1
        )
        measures = train_step(
            state, images, {"query": noisy, "key": noisy}, seed=0, backend="reference"
        )
        assert abs(measures[0] - expected) < 1e-5 * expected
        for actual, wanted in zip(student.parameters(), dense_student, strict=True):
            torch.testing.assert_close(actual.detach(), wanted, rtol=1e-5, atol=1e-6)
        for actual, wanted in zip(state.teacher.parameters(), dense_teacher, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
        oldest_first = queue.rows.roll(-queue.pointer, dims=0)
        torch.testing.assert_close(oldest_first, torch.stack(dense_queue), rtol=0, atol=1e-5)
    assert not torch.allclose(start[0], dense_student[0], atol=1e-2)


# ---- its numbers ----


def test_rules():
    assert ASCL().rule() == AdaptiveSoftLabels(1)
    assert ASCL(labels="ahcl", num_neighbors=2).rule() == AdaptiveNeighborLabels(2)
    assert ASCL(labels="hard", num_neighbors=3).rule() == NeighborLabels(3)
    assert ASCL(labels="normal", num_neighbors=4).rule() == HardLabels()


def test_defaults_are_the_published_ones():
    assert METHODS["ascl"] is ASCL
    cifar = DEFAULTS["cifar10"]
    assert cifar == Defaults(ASCL(), "resnet18", 32, 200, 256, 0.03, 0.9, 5e-4, 5)
    method = cifar.method
    assert (method.queue_size, method.projection_dim, method.momentum) == (4096, 128, 0.99)
    assert (method.temperature, method.teacher_temperature) == (0.1, 0.05)
    assert (method.labels, method.num_neighbors, method.num_splits) == ("soft", 1, 8)
    assert (method.student_view, method.teacher_view) == ("strong", "weak")
    assert DEFAULTS["cifar100"].method.num_neighbors == 5
    assert DEFAULTS["stl10"].image_size == DEFAULTS["tiny-imagenet"].image_size == 64
    imagenet = DEFAULTS["imagenet"]
    assert (imagenet.method.queue_size, imagenet.method.momentum) == (65536, 0.999)
    assert (imagenet.arch, imagenet.image_size, imagenet.weight_decay) == ("resnet50", 224, 1e-4)
    assert set(DEFAULTS) == {
        "cifar10",
        "cifar100",
        "stl10",
        "tiny-imagenet",
        "imagenet",
        "shapes",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "moco"}, "labels must be one of .* got 'moco'"),
        ({"num_neighbors": -1}, r"num_neighbors must be in \[0, queue_size=4096\], got -1"),
        ({"num_neighbors": 9, "queue_size": 8}, r"in \[0, queue_size=8\], got 9"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"teacher_temperature": math.inf}, "teacher_temperature must be .* got inf"),
        ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ({"momentum": 1.1}, r"momentum must be in \[0, 1\], got 1.1"),
        ({"queue_size": 0, "num_neighbors": 0}, "queue_size must be at least 1, got 0"),
        ({"projection_dim": 0}, r"projection_dim must be in \[1, 1048576\], got 0"),
        ({"projector_hidden": -3}, r"projector_hidden must be in \[1, 1048576\], got -3"),
        ({"num_splits": 0}, "num_splits must be at least 1, got 0"),
        ({"form": "simclr"}, "form must be one of .* got 'simclr'"),
        ({"form": "byol", "labels": "ahcl"}, "labels must be soft or normal in the byol form"),
        ({"projector_norm": "some"}, "projector_norm must be one of .* got 'some'"),
        ({"momentum_schedule": "up"}, "momentum_schedule must be one of .* got 'up'"),
    ],
)
def test_wrong_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        ASCL(**arguments)
