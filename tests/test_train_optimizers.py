"""Optimisers, what decays, the teacher's momentum over time, accumulation and clipping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from softcl.data import ImageSet
from softcl.methods import ASCL
from softcl.nn import MemoryQueue, build_backbone, make_teacher
from softcl.train.config import TrainConfig
from softcl.train.defaults import fill
from softcl.train.optim import build_optimizer, parameter_groups
from softcl.train.step import MEASURES, TrainState, query_spread, teacher_momentum, train_step


class Small(nn.Sequential):
    """Two linear layers around a norm, without dependence between the rows of a batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(48, 16), nn.LayerNorm(16), nn.Linear(16, 6))


def settings(**given):
    images = torch.zeros(512, 3, 32, 32, dtype=torch.uint8)
    third = (0.5, 0.5, 0.5)
    return fill(TrainConfig.of(**given), ImageSet(images, None, [], third, third, "none"), 32)[0]


def test_biases_and_norms_can_be_spared_from_decay():
    module = Small()
    names = {id(p): name for name, p in module.named_parameters()}
    (everything,) = parameter_groups(module, 0.1, decay_norms=True)
    assert [names[id(p)] for p in everything["params"]] == list(names.values())
    assert everything["weight_decay"] == 0.1
    decaying, spared = parameter_groups(module, 0.1, decay_norms=False)
    assert [names[id(p)] for p in decaying["params"]] == ["1.weight", "3.weight"]
    assert [names[id(p)] for p in spared["params"]] == ["1.bias", "2.weight", "2.bias", "3.bias"]
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    # A backbone's own exceptions are kept.
    encoder = nn.ModuleDict({"backbone": build_backbone("vit_tiny", 32)})
    names = {id(p): name for name, p in encoder.named_parameters()}
    decaying, spared = parameter_groups(encoder, 0.1, decay_norms=False)
    assert "backbone.pos_embed" in {names[id(p)] for p in spared["params"]}
    assert all(p.ndim > 1 for p in decaying["params"])
    assert len(decaying["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize("decay", [0.01, 0.0])
def test_lars_is_the_published_update(decay: float):
    """v <- m v + q (g + d w), w <- w - lr v, where q = 0.001 |w| / (|g| + d |w|)."""
    module = nn.Linear(7, 5).double()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = build_optimizer(
        module, "lars", lr=2.0, weight_decay=decay, momentum=0.9, decay_norms=False
    )
    velocity, (weight, bias) = torch.zeros_like(before[0]), before
    bias_velocity = torch.zeros_like(bias)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(p.shape, generator=generator).double() for p in before]
        for p, g in zip(module.parameters(), gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        update = gradients[0] + decay * weight
        trust = 0.001 * weight.norm() / (gradients[0].norm() + decay * weight.norm())
        velocity = 0.9 * velocity + trust * update
        bias_velocity = 0.9 * bias_velocity + gradients[1]
        weight, bias = weight - 2.0 * velocity, bias - 2.0 * bias_velocity
    torch.testing.assert_close(module.weight.detach(), weight)
    torch.testing.assert_close(module.bias.detach(), bias)


@pytest.mark.parametrize("decay_norms", [True, False])
def test_adamw_decays_what_it_should(decay_norms: bool):
    module = Small()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = build_optimizer(
        module, "adamw", lr=0.1, weight_decay=0.5, momentum=0.0, decay_norms=decay_norms
    )
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in module.named_parameters():
        factor = 0.95 if decay_norms or p.ndim > 1 else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name])


def test_settings_of_another_optimizer_are_its_own():
    own = settings()
    assert (own.optimizer, own.lr, own.decay_norms) == ("sgd", 0.03, True)
    adam = settings(optimizer="adamw", batch_size=512)
    assert adam.lr == pytest.approx(3e-4) and adam.weight_decay == 0.1
    assert adam.decay_norms is False and adam.sgd_momentum is None
    lars = settings(optimizer="lars", lr=1.5)
    assert (lars.lr, lars.weight_decay, lars.sgd_momentum) == (1.5, 1e-6, 0.9)
    assert settings(optimizer="sgd", decay_norms=False).decay_norms is False


def test_momentum_goes_to_one_along_a_half_cosine():
    options = dict(start=0.9, schedule="cosine", total_steps=100)
    values = [teacher_momentum(step, **options) for step in range(101)]
    assert values[0] == pytest.approx(0.9) and values[50] == pytest.approx(0.95)
    assert values[100] == 1.0 and values == sorted(values)
    assert teacher_momentum(70, start=0.9, schedule="constant", total_steps=100) == 0.9
    with pytest.raises(ValueError, match="schedule must be one of constant, cosine"):
        teacher_momentum(0, start=0.9, schedule="linear", total_steps=1)


# ------------------------------------------------------------------------------------- the step


def make_state(lr: float = 0.1) -> TrainState:
    student = Small()
    queue = MemoryQueue(24, 6)
    method = ASCL(queue_size=24, projection_dim=6, num_splits=1, momentum=0.5, num_neighbors=3)
    optimizer = torch.optim.SGD(student.parameters(), lr=lr)
    queues = nn.ModuleDict({"queue": queue})
    return TrainState(method, student, make_teacher(student), queues, optimizer)


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    return images.float() / 64 - 2 + 0.1 * torch.randn(images.shape, generator=generator)


def take_step(state: TrainState, **options) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (12, 3, 4, 4), generator=generator, dtype=torch.uint8)
    views = {"query": view, "key": view}
    return train_step(state, images, views, seed=7, backend="reference", **options)


def test_parts_of_a_batch_add_up_to_the_batch():
    whole, split, parts = make_state(), make_state(), 3
    calls = []
    split.student.register_forward_hook(lambda *arguments: calls.append(len(arguments[2])))
    for number in range(3):
        measures = take_step(whole), take_step(split, accumulate=parts)
        # The spread of a part's directions is not that of the batch.
        torch.testing.assert_close(measures[0][:4], measures[1][:4])
        for a, b in zip(whole.student.parameters(), split.student.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(whole.queues["queue"].rows, split.queues["queue"].rows)
        assert (
            split.step == number + 1
            and split.queues["queue"].pointer == whole.queues["queue"].pointer
        )
    assert calls == [12 // parts] * parts * 3


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_clipping_limits_the_gradients_norm(factor: float):
    free, clipped = make_state(), make_state()
    before = nn.utils.parameters_to_vector(free.student.parameters()).detach()
    take_step(free)
    change = nn.utils.parameters_to_vector(free.student.parameters()).detach() - before
    norm = float(change.norm()) / 0.1  # of the gradient
    take_step(clipped, clip_norm=factor * norm)
    limited = nn.utils.parameters_to_vector(clipped.student.parameters()).detach() - before
    torch.testing.assert_close(limited, min(factor, 1.0) * change, rtol=1e-4, atol=1e-7)


def test_the_steps_momentum_replaces_the_methods():
    state = make_state()
    take_step(state)
    frozen = [p.clone() for p in state.teacher.parameters()]
    take_step(state, momentum=1.0)
    assert all(map(torch.equal, frozen, state.teacher.parameters()))
    take_step(state)
    assert not any(map(torch.equal, frozen, state.teacher.parameters()))


def test_spread_tells_collapse_from_a_full_sphere():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 32, generator=generator)
    assert float(query_spread(rows)) == pytest.approx(1.0, abs=0.02)
    assert float(query_spread(rows[:1].expand(50, -1) * torch.rand(50, 1))) < 1e-6
    line = torch.randn(2000, 1, generator=generator) * rows[:1]  # two opposite directions
    assert 0.1 < float(query_spread(line)) < 0.95
    assert MEASURES[4] == "query_spread"
