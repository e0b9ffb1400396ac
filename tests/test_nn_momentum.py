"""The teacher: its copy, its update and its shuffled forward pass."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from softcl.nn import (
    Encoder,
    Projector,
    build_head,
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


@pytest.mark.parametrize(
    "number", [np.float32, np.float64, torch.tensor, lambda x: torch.tensor(x, requires_grad=True)]
)
def test_momentum_of_numpy_and_of_tensors(number):
    model = student()
    one, two = make_teacher(model), make_teacher(model)
    change(model)
    update_teacher(one, model, number(0.75))
    update_teacher(two, model, 0.75)
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    update_teacher(one, model, np.int64(0))
    assert all(map(torch.equal, one.parameters(), model.parameters()))


@pytest.mark.parametrize(
    "momentum",
    [True, np.True_, torch.tensor(True), "0.9", None, 0.9j, torch.tensor([0.9]),
     torch.tensor(0.9, device="meta"), np.array([0.9])],
)  # fmt: skip
def test_momentum_that_is_no_number(momentum):
    model = student()
    with pytest.raises(TypeError, match="momentum must be a number .* got "):
        update_teacher(make_teacher(model), model, momentum)


def test_a_teacher_of_float32_follows_over_thousands_of_steps():
    """The student may be in half precision: what it holds is exact in float32."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = nn.Linear(4, 4).to(dtype)
        teacher = make_teacher(model).float()
        start = torch.cat([p.flatten() for p in teacher.parameters()])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1.0
        goal = torch.cat([p.flatten() for p in model.parameters()]).float()
        for _ in range(2000):
            update_teacher(teacher, model, 0.999)
        now = torch.cat([p.flatten() for p in teacher.parameters()])
        left = (goal - now) / (goal - start)
        torch.testing.assert_close(left, torch.full_like(left, 0.999**2000), rtol=1e-3, atol=0)


def test_a_student_in_half_precision_is_widened_exactly():
    model = student()
    change(model)
    model.half()
    one, two = make_teacher(model).float(), make_teacher(model).float()
    change(one)
    two.load_state_dict(one.state_dict())
    update_teacher(one, model, 0.9)
    update_teacher(two, copy.deepcopy(model).float(), 0.9)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_would_stand_still(dtype):
    model = student().to(dtype)
    teacher = make_teacher(model)
    message = rf"'backbone.0.weight' is {dtype}, .*make_teacher\(student\).float\(\)"
    with pytest.raises(TypeError, match=message) as caught:
        update_teacher(teacher, model, 0.999)
    assert "\n" not in str(caught.value)


def test_a_student_wider_than_the_teacher_is_refused():
    model = student()
    teacher = make_teacher(model)
    model.projector.double()
    message = "'projector.0.weight' is torch.float32 in the teacher and torch.float64 in the stud"
    with pytest.raises(TypeError, match=message):
        update_teacher(teacher, model, 0.5)


def test_the_student_is_no_teacher():
    model = student()
    tied = make_teacher(model)
    tied.projector[2] = model.projector[2]
    assigned = make_teacher(model)  # other parameters, the same memory
    assigned.load_state_dict(model.state_dict(), assign=True)
    for teacher, first in (
        (model, "backbone.0.weight"),
        (copy.copy(model), "backbone.0.weight"),
        (assigned, "backbone.0.weight"),
        (tied, "projector.2.weight"),
    ):
        before = [parameter.clone() for parameter in teacher.parameters()]
        with pytest.raises(ValueError, match=f"share the parameter '{first}'"):
            update_teacher(teacher, model, 0.5)
        assert all(map(torch.equal, before, teacher.parameters()))


class Named(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def test_modules_that_differ():
    """All the parameters are compared before one is changed; the first that differs is named."""
    a, b = (nn.Linear(2, 2) for _ in range(2))
    cases = [
        (nn.Linear(2, 3), nn.Linear(3, 2), r"'weight' is \(3, 2\) on cpu in the teacher, \(2, 3\)"),
        (nn.Linear(2, 3), nn.Linear(2, 3, bias=False), "has 'bias', the student no more"),
        (nn.Linear(2, 3, bias=False), nn.Linear(2, 3), "has no more, the student 'bias'"),
        (Named(a=a, b=b), Named(a=nn.Linear(2, 2), c=b), "has 'b.weight', the student 'c.weight'"),
        (Named(a=a, b=b), Named(b=b, a=a), "has 'a.weight', the student 'b.weight'"),
        (nn.Linear(2, 3), nn.Linear(2, 3, device="meta"), "on cpu in the teacher, .* on meta"),
    ]
    for teacher, model, message in cases:
        before = [parameter.clone() for parameter in teacher.parameters()]
        with pytest.raises(
            ValueError, match=f"same parameters.*the first that differs: .*{message}"
        ):
            update_teacher(teacher, model, 0.5)
        assert all(map(torch.equal, before, teacher.parameters()))
    for arguments, name in (((None, a), "teacher"), ((a, [a]), "student")):
        with pytest.raises(TypeError, match=f"{name} must be a module, got"):
            update_teacher(*arguments, 0.5)
    with pytest.raises(TypeError, match="student must be a module, got None"):
        make_teacher(None)


def test_a_student_in_wrappers_has_the_same_names():
    """torch.compile and DDP put words into them."""
    model = student()
    expected = make_teacher(model)
    teachers = [make_teacher(model) for _ in range(2)]
    change(model)
    update_teacher(expected, model, 0.5)
    model.backbone = torch.compile(model.backbone)
    for teacher, wrapped in zip(teachers, (model, Named(module=model)), strict=True):
        update_teacher(teacher, wrapped, 0.5)
        assert all(map(torch.equal, teacher.parameters(), expected.parameters()))


def test_update_compiles_without_a_graph_break():
    model = student()
    one, two = make_teacher(model), make_teacher(model)
    change(model)
    torch._dynamo.reset()
    update = torch.compile(update_teacher, fullgraph=True, backend="aot_eager")
    for momentum in (0.5, 0.75, 0.875):
        update(one, model, momentum)
        update_teacher(two, model, momentum)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "images must be a tensor, got list"),
        ((torch.tensor(1.0),), ValueError, r"images must have shape \(N, C, H, W\), got \(\)"),
        ((torch.ones(2, 3), 7), TypeError, "generator must be a torch.Generator or None, got 7"),
    ],
)
def test_wrong_arguments_of_shuffled(arguments, error, message):
    with pytest.raises(error, match=message):
        shuffled(nn.Identity(), *arguments)


def test_a_teacher_that_gives_no_row_per_image():
    for module, found in ((nn.Flatten(0), r"\(6,\)"), (nn.LSTM(3, 2), "tuple")):
        with pytest.raises(ValueError, match=f"a row for each of 2 images, got {found}"):
            shuffled(module, torch.ones(2, 3))


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


HEADS = [
    Projector,
    lambda *widths: build_head(*widths, layers=3),
    lambda *widths: build_head(*widths, norm="all"),
]


@pytest.mark.parametrize("place, name", [(0, "in_dim"), (1, "hidden_dim"), (2, "out_dim")])
@pytest.mark.parametrize("head", HEADS)
def test_wrong_widths(head, place, name):
    for value, error, message in (
        (0, ValueError, f"{name} must be at least 1, got 0"),
        (2.0, TypeError, f"{name} must be an int, got 2.0"),
        (True, TypeError, f"{name} must be an int, got True"),
        ("4", TypeError, f"{name} must be an int, got '4'"),
    ):
        widths = [3, 3, 3]
        widths[place] = value
        with pytest.raises(error, match=message):
            head(*widths)


@pytest.mark.parametrize("head", HEADS)
def test_widths_of_numpy_and_of_tensors(head):
    built = head(np.int64(4), torch.tensor(7), np.int32(3))
    assert built(torch.ones(5, 4)).shape == (5, 3)


def test_wrong_layers_and_parts():
    for layers, error in ((0, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"layers must be .*, got {layers}"):
            build_head(2, 2, 2, layers=layers)
    assert len(build_head(2, 0, 3, layers=1)) == 1  # the hidden width is unused
    for parts, name in (((None, nn.Identity()), "backbone"), ((nn.Identity(), 3), "projector")):
        with pytest.raises(TypeError, match=f"{name} must be a module, got"):
            Encoder(*parts)


def test_encoder_is_projector_of_features():
    model = student().eval()
    features = model.features(images())
    assert features.shape == (8, 64)
    assert torch.equal(model(images()), model.projector(features))
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "projector"}
