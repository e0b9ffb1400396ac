"""The teacher: its copy, its update and its shuffled forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softcl.nn import (
    Encoder,
    Projector,
    convert_split_batch_norm,
    make_teacher,
    shuffled,
    update_teacher,
)


def student() -> nn.Module:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    )
    return Encoder(backbone, Projector(64, 10, 5))


def images(N: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, 6, 6, generator=generator) * torch.arange(1, N + 1).view(N, 1, 1, 1)


def change(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)


def test_the_teacher_is_a_frozen_copy_in_train_mode():
    model = student().eval()
    teacher = make_teacher(model)
    assert all(module.training for module in teacher.modules()) and not model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    addresses = {tensor.data_ptr() for tensor in model.state_dict().values()}
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert tensor.data_ptr() not in addresses


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.996, 1.0])
def test_update_is_the_moving_average(momentum):
    model = student().double()
    teacher = make_teacher(model)
    change(model)
    before = [parameter.clone() for parameter in teacher.parameters()]
    own = [parameter.detach().clone() for parameter in model.parameters()]
    addresses = [parameter.data_ptr() for parameter in teacher.parameters()]
    update_teacher(teacher, model, momentum)
    for old, new, source in zip(before, teacher.parameters(), own, strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * source)
    assert [parameter.data_ptr() for parameter in teacher.parameters()] == addresses
    for kept, now in zip(own, model.parameters(), strict=True):
        assert torch.equal(kept, now)


def test_update_at_the_ends_is_exact():
    model = student()
    teacher = make_teacher(model)
    change(model)
    before = [parameter.clone() for parameter in teacher.parameters()]
    update_teacher(teacher, model, 1.0)
    assert all(map(torch.equal, before, teacher.parameters()))
    update_teacher(teacher, model, 0.0)
    assert all(map(torch.equal, model.parameters(), teacher.parameters()))


def test_update_leaves_buffers_alone():
    model = student()
    teacher = make_teacher(model)
    model(images())
    change(model)
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    update_teacher(teacher, model, 0.5)
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, before[name]), name
    teacher(images())
    assert not torch.equal(teacher.backbone[1].running_mean, before["backbone.1.running_mean"])
    assert model.backbone[1].num_batches_tracked == teacher.backbone[1].num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_wrong_momentum(momentum):
    model = student()
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got"):
        update_teacher(make_teacher(model), model, momentum)


def test_modules_that_differ():
    with pytest.raises(ValueError, match="same parameters"):
        update_teacher(nn.Linear(2, 3), nn.Linear(3, 2), 0.5)
    with pytest.raises(ValueError, match="same parameters"):
        update_teacher(nn.Linear(2, 3), nn.Linear(2, 3, bias=False), 0.5)


def test_shuffled_without_batch_norm_changes_nothing():
    teacher = make_teacher(nn.Sequential(nn.Flatten(), nn.Linear(108, 5)))
    keys = shuffled(teacher, images(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(keys, teacher(images()))
    assert not keys.requires_grad


def test_shuffled_permutes_the_batch_and_undoes_it():
    seen = []

    class Teacher(nn.Module):
        def forward(self, batch):
            seen.append(batch[:, 0, 0, 0].tolist())
            return batch[:, 0, 0, :1]

    batch = torch.arange(16.0).view(16, 1, 1, 1).expand(16, 3, 2, 2)
    keys = shuffled(Teacher(), batch, torch.Generator().manual_seed(0))
    assert keys.flatten().tolist() == list(range(16))
    assert seen[0] != list(range(16)) and sorted(seen[0]) == list(range(16))
    shuffled(Teacher(), batch, torch.Generator().manual_seed(0))
    shuffled(Teacher(), batch, torch.Generator().manual_seed(1))
    assert seen[1] == seen[0] != seen[2]
    torch.manual_seed(0)
    shuffled(Teacher(), batch)
    assert sorted(seen[3]) == list(range(16))


def test_shuffled_gives_split_batch_norm_other_groups():
    """Image i is normalised with the images that the permutation puts into its split."""
    model = convert_split_batch_norm(student(), 2)
    teacher = make_teacher(model)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    keys = shuffled(teacher, images(), generator)
    assert not torch.allclose(keys, teacher(images()), atol=1e-3)
    plain = make_teacher(convert_split_batch_norm(student(), 1))
    for split in (order[0::2], order[1::2]):
        torch.testing.assert_close(keys[split], plain(images()[split]), rtol=1e-4, atol=1e-5)


def test_projector_is_linear_relu_linear():
    projector = Projector(4, 7, 3)
    assert [type(layer) for layer in projector] == [nn.Linear, nn.ReLU, nn.Linear]
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    hidden = (x @ projector[0].weight.T + projector[0].bias).clamp_min(0)
    torch.testing.assert_close(projector(x), hidden @ projector[2].weight.T + projector[2].bias)
    for arguments, name in (
        ((0, 1, 1), "in_dim"),
        ((1, 0, 1), "hidden_dim"),
        ((1, 1, 0), "out_dim"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Projector(*arguments)


def test_encoder_is_projector_of_features():
    model = student().eval()
    features = model.features(images())
    assert features.shape == (8, 64)
    assert torch.equal(model(images()), model.projector(features))
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "projector"}
