"""Batch norm of an untrained network, recalibrated: what it computes and leaves untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from softcl.data import ImageSet, center_view
from softcl.evaluation.features import PIECE, eval_mode, sampled
from softcl.evaluation.recalibration import recalibrated
from softcl.nn import Encoder, convert_split_batch_norm

CPU = torch.device("cpu")


def image_set(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, None, [], (0.3,) * 3, (0.2,) * 3, "test")


def build(splits: int = 1) -> Encoder:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
        nn.Linear(80, 4), nn.BatchNorm1d(4),
    )  # fmt: skip
    return Encoder(convert_split_batch_norm(backbone, splits), nn.Identity())


@pytest.mark.parametrize("count, splits", [(48, 1), (48, 8), (PIECE + 100, 1)])
def test_features_are_those_of_train_mode(count: int, splits: int):
    images, encoder = image_set(count), build(splits)
    views = center_view(images.batch(sampled(count, PIECE)), 8, images.mean, images.std)
    literal = copy.deepcopy(build())  # batch norm over the whole batch, without drop-out
    literal.train()
    literal.backbone[3].eval()
    with torch.no_grad():
        expected = literal.features(views)
    with recalibrated(encoder, images, 8, CPU) as same, eval_mode(encoder), torch.no_grad():
        assert same is encoder
        torch.testing.assert_close(encoder.features(views), expected, atol=1e-5, rtol=1e-5)


def test_statistics_and_modes_are_restored_even_after_an_error():
    encoder = build(8)
    encoder.backbone[1].eval()
    before = copy.deepcopy(encoder.state_dict())
    with pytest.raises(ZeroDivisionError), recalibrated(encoder, image_set(16), 8, CPU):
        assert not torch.equal(encoder.backbone[1].running_mean, torch.zeros(6))
        raise ZeroDivisionError
    after = encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert encoder.training and not encoder.backbone[1].training
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_a_network_without_batch_norm_reads_no_image():
    encoder = Encoder(nn.Flatten(), nn.Identity())
    images = image_set(4)
    images.images = None
    with recalibrated(encoder, images, 8, CPU) as same:
        assert same is encoder
