"""Split batch norm against one batch norm per split, and its conversion of whole networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from softcl.nn import SplitBatchNorm2d, convert_split_batch_norm
from softcl.nn.split_batch_norm import SplitBatchNormAct2d

SPLITS = 8


def images(N: int = 16, C: int = 3, size: int = 4, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, N + 1).view(N, 1, 1, 1)  # splits differ clearly in mean and variance
    return (torch.randn(N, C, size, size, generator=generator) * scale + scale).to(dtype)


def one_norm_per_split(norm: nn.BatchNorm2d, x: torch.Tensor, splits: int = SPLITS):
    """The definition: image i goes to a copy of the norm for split i % splits."""
    norms = [copy.deepcopy(norm) for _ in range(splits)]
    output = torch.empty_like(x)
    for split, each in enumerate(norms):
        output[split::splits] = F.batch_norm(
            x[split::splits],
            each.running_mean,
            each.running_var,
            norm.weight,
            norm.bias,
            True,
            each.momentum,
            each.eps,
        )
    mean = torch.stack([each.running_mean for each in norms]).mean(0)
    var = torch.stack([each.running_var for each in norms]).mean(0)
    return output, mean, var


def pair(C: int = 3, **options) -> tuple[nn.BatchNorm2d, SplitBatchNorm2d]:
    plain, split = nn.BatchNorm2d(C, **options), SplitBatchNorm2d(C, SPLITS, **options)
    generator = torch.Generator().manual_seed(1)
    if plain.affine:
        for parameter in (plain.weight, plain.bias):
            parameter.data = torch.randn(C, generator=generator, dtype=parameter.dtype)
    split.load_state_dict(plain.state_dict())
    return plain, split


@pytest.mark.parametrize("N", [8, 16, 24])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_equals_one_norm_per_split(N, memory_format, affine):
    plain, split = pair(affine=affine)
    x = images(N).to(memory_format=memory_format)
    expected, mean, var = one_norm_per_split(plain, x)
    output = split(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(split.running_mean, mean)
    torch.testing.assert_close(split.running_var, var)
    assert split.num_batches_tracked == 1
    assert output.is_contiguous(memory_format=memory_format)
    assert not torch.allclose(output, plain(x), atol=0.1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_equal_those_of_one_norm_per_split(memory_format):
    plain, split = pair()
    x = images().to(memory_format=memory_format)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for norm in (plain, split):
        inputs = x.clone().requires_grad_()
        output = split(inputs) if norm is split else one_norm_per_split(plain, inputs)[0]
        (output * weights).sum().backward()
        gradients.append((inputs.grad, norm.weight.grad, norm.bias.grad))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    split = SplitBatchNorm2d(2, 2, dtype=torch.float64)
    x = images(4, 2, 2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: torch.func.functional_call(
            split, {"weight": weight, "bias": bias}, x
        ),
        (x, split.weight.detach().requires_grad_(), split.bias.detach().requires_grad_()),
    )


@pytest.mark.parametrize("training", [True, False])
def test_one_split_and_eval_are_plain_batch_norm(training):
    plain, split = pair()
    if training:
        split.num_splits = 1
    else:
        for norm in (plain, split):
            norm.running_mean.fill_(0.5)
            norm.running_var.fill_(2.0)
    plain.train(training)
    split.train(training)
    assert torch.equal(split(images(6)), plain(images(6)))
    for name, value in plain.state_dict().items():
        assert torch.equal(split.state_dict()[name], value), name


def test_cumulative_average_and_untracked_statistics():
    plain, split = pair(momentum=None)
    first, second = images(), images() * 2
    split(first)
    split(second)
    means = [x.mean((0, 2, 3)) for x in (first, second)]
    torch.testing.assert_close(split.running_mean, (means[0] + means[1]) / 2)
    _, untracked = pair(track_running_stats=False)
    assert untracked.running_mean is None
    torch.testing.assert_close(untracked(first), one_norm_per_split(pair()[0], first)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mixed_and_double_precision(dtype):
    plain, split = pair()
    if dtype == torch.float64:
        plain, split = plain.double(), split.double()
    x = images(dtype=dtype)
    output = split(x)
    assert output.dtype == dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(output, one_norm_per_split(plain, x)[0], **tolerance)


def test_compiles_without_a_graph_break_and_with_activation_in_place():
    _, split = pair()
    model = nn.Sequential(split, nn.ReLU(inplace=True))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for each in (compiled, twin):
        x = images().requires_grad_()
        each(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert torch.equal(split.running_mean, twin[0].running_mean)


def test_state_dict_keys_are_those_of_batch_norm():
    plain, split = pair()
    assert list(plain.state_dict()) == list(split.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in split.named_parameters()]
    nn.BatchNorm2d(3).load_state_dict(split.state_dict())


def test_a_batch_that_does_not_split_is_an_error():
    split = SplitBatchNorm2d(3, SPLITS)
    with pytest.raises(ValueError, match="multiple of num_splits=8, got N=12"):
        split(images(12))
    assert split.num_batches_tracked == 0
    assert split.eval()(images(12)).shape == (12, 3, 4, 4)


@pytest.mark.parametrize("num_splits", [0, -1, 2.0, True, None, np.float32(2), torch.tensor([2])])
def test_wrong_num_splits(num_splits):
    message = "num_splits must be (at least 1|an int), got "
    with pytest.raises((TypeError, ValueError), match=message):
        SplitBatchNorm2d(3, num_splits)
    with pytest.raises((TypeError, ValueError), match=message):
        convert_split_batch_norm(nn.Identity(), num_splits)


@pytest.mark.parametrize("number", [np.int64, torch.tensor])
def test_num_splits_of_numpy_and_of_tensors(number):
    assert SplitBatchNorm2d(3, number(4)).num_splits == 4
    assert type(convert_split_batch_norm(nn.BatchNorm2d(3), number(2)).num_splits) is int


def test_a_norm_in_two_places_stays_one_norm():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), nn.Sequential(norm), norm)
    convert_split_batch_norm(model, 2)
    assert type(model[0]) is SplitBatchNorm2d
    assert model[0] is model[2][0] is model[3]


def test_a_module_that_cannot_be_converted_is_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    split = SplitBatchNorm2d(3, 2)
    model = nn.Sequential(nn.BatchNorm2d(3), split, Own(3))
    children = list(model)
    with pytest.raises(TypeError, match="cannot convert .*Own to split batch norm"):
        convert_split_batch_norm(model, 4)
    assert list(model) == children and split.num_splits == 2
    with pytest.raises(TypeError, match="module must be a module, got None"):
        convert_split_batch_norm(None, 4)


def test_a_norm_without_a_bias_gets_none():
    norm = nn.BatchNorm2d(3)
    norm.bias = None
    split = convert_split_batch_norm(norm, SPLITS)
    assert split.bias is None and split.weight is norm.weight
    assert split(images()).isfinite().all()


def test_wrong_input_dimension():
    with pytest.raises(ValueError, match="expected 4D input"):
        SplitBatchNorm2d(3, SPLITS)(torch.zeros(8, 3))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.2),
        nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, affine=False)),
        nn.Flatten(),
        nn.Linear(20, 6),
        nn.BatchNorm1d(6),
    )


def test_conversion_keeps_tensors_options_and_mode():
    model = network()
    model[2][2].eval()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    converted = convert_split_batch_norm(model, SPLITS)
    assert converted is model
    assert isinstance(model[1], SplitBatchNorm2d) and isinstance(model[2][2], SplitBatchNorm2d)
    assert type(model[5]) is nn.BatchNorm1d
    assert (model[1].eps, model[1].momentum, model[1].num_splits) == (1e-3, 0.2, SPLITS)
    assert model[1].training and not model[2][2].training
    for name, tensor in model.named_parameters():
        assert tensor is parameters[name], name
    for name, tensor in model.named_buffers():
        assert tensor is buffers[name], name
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert list(model.state_dict()) == list(network().state_dict())
    model.eval()
    plain = network().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(images(5)), plain(images(5)))


def test_conversion_of_a_norm_itself_and_of_a_converted_network():
    assert isinstance(convert_split_batch_norm(nn.BatchNorm2d(3), 2), SplitBatchNorm2d)
    model = convert_split_batch_norm(convert_split_batch_norm(network(), 4), 2)
    assert model[1].num_splits == model[2][2].num_splits == 2
    layers = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert convert_split_batch_norm(layers, 4) is layers


def test_conversion_refuses_norms_it_does_not_know():
    class OwnNorm(nn.BatchNorm2d):
        pass

    for norm in (OwnNorm(3), nn.SyncBatchNorm(3)):
        with pytest.raises(TypeError, match=type(norm).__name__):
            convert_split_batch_norm(nn.Sequential(norm), 2)


def test_conversion_of_a_timm_norm_with_activation():
    layers = pytest.importorskip("timm.layers")
    norm = layers.BatchNormAct2d(3, act_layer=nn.SiLU)
    expected = F.silu(one_norm_per_split(norm, images())[0])
    model = convert_split_batch_norm(nn.Sequential(norm), SPLITS)
    assert isinstance(model[0], SplitBatchNormAct2d)
    assert list(model[0].state_dict()) == list(norm.state_dict())
    torch.testing.assert_close(model(images()), expected)
    assert torch.equal(model.eval()(images(6)), norm.eval()(images(6)))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_conversion_of_timm_models(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=0)
    keys = list(model.state_dict())
    x = images(4, 3, 32)
    expected = model.eval()(x)
    convert_split_batch_norm(model, 2)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(isinstance(norm, SplitBatchNorm2d) for norm in norms)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    model.train()(x).sum().backward()
    assert all(norm.weight.grad is not None for norm in norms)
