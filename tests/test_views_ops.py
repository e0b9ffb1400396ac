"""Each operation of a view, with given parameters, against torchvision and Pillow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from view_images import parameters, table_of

from softcl.data import render
from softcl.data.recipe import slots
from softcl.data.render import blur_matrix, crop_resize
from softcl.data.views import center_view

functional = pytest.importorskip("torchvision.transforms.v2.functional")

LEVEL = 1 / 255  # one step of an 8-bit pixel


def make_images(number: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Half noise, half smooth, with saturated and grey pixels: uint8 (number, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (number, 3, height, width), generator=generator)
    coarse = torch.rand((number, 3, 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 300 - 20
    images[::2] = smooth.clamp(0, 255).long()[::2]
    images[0, :, : height // 2] = 255
    images[-1, :, :, : width // 2] = images[-1, :1, :, : width // 2]
    return images.to(torch.uint8)


def rows_outermost(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 2, 1, 3).float() / 255


def channels_first(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(0, 2, 1, 3)


def cropped(images: torch.Tensor, size: int, *boxes, **columns) -> torch.Tensor:
    return channels_first(crop_resize(images, parameters(table_of(*boxes, **columns)), size))


BOXES = [
    (32, 32, 32, (0, 0, 32, 32), 0),
    (32, 32, 32, (3, 7, 20, 13), 1),
    (32, 32, 32, (31, 31, 1, 1), 1),
    (64, 48, 32, (11, 2, 47, 46), 0),
    (17, 29, 24, (1, 0, 15, 29), 1),
    (100, 75, 7, (13, 5, 80, 61), 0),
    (5, 9, 32, (0, 2, 5, 6), 1),
    (8, 8, 1, (1, 1, 6, 5), 0),
]


@pytest.mark.parametrize(("height", "width", "size", "box", "mirror"), BOXES)
def test_crop_resize_is_torchvisions_antialiased_crop(height, width, size, box, mirror):
    images = make_images(4, height, width)
    result = cropped(images, size, *[box] * 4, mirror=mirror)
    expected = functional.resized_crop(images.float() / 255, *box, [size, size], antialias=True)
    if mirror:
        expected = functional.horizontal_flip(expected)
    assert (result - expected).abs().max() < 1e-5


def test_crop_resize_is_pillows_to_one_level():
    images = make_images(4, 40, 50)
    box = (4, 9, 33, 27)
    for image, view in zip(images, cropped(images, 24, *[box] * 4), strict=True):
        picture = functional.resized_crop(functional.to_pil_image(image), *box, [24, 24])
        expected = functional.pil_to_tensor(picture).float() / 255
        assert (view - expected).abs().max() < 1.01 * LEVEL


# torchvision weighs red by 0.2989, Pillow and this project by 0.299: at most 1e-4 |1 - factor|.
GRAY_TOLERANCE = 1e-4

BLENDS = [
    (render.BRIGHTNESS, "adjust_brightness", 1e-6),
    (render.CONTRAST, "adjust_contrast", GRAY_TOLERANCE),
    (render.SATURATION, "adjust_saturation", GRAY_TOLERANCE),
]


@pytest.mark.parametrize(("kind", "name", "tolerance"), BLENDS)
def test_blend_is_torchvisions_and_nearly_pillows(kind, name, tolerance):
    images = make_images(5, 12, 9)
    adjust = getattr(functional, name)
    for factor in (0.5, 0.93, 1.0, 1.3):
        pixels = render.blend(
            rows_outermost(images), torch.full((5,), kind), torch.full((5,), factor)
        )
        expected = adjust(images.float() / 255, factor)
        assert (channels_first(pixels) - expected).abs().max() < tolerance
    for image, view in zip(images, channels_first(pixels), strict=True):
        picture = adjust(functional.to_pil_image(image), factor)
        expected = functional.pil_to_tensor(picture).float() / 255
        assert (view - expected).abs().max() < 2 * LEVEL


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.01, 0.37])
def test_hue_is_torchvisions(shift):
    images = make_images(6, 13, 10)
    pixels = render.shift_hue(rows_outermost(images), torch.full((6,), shift))
    expected = functional.adjust_hue(images.float() / 255, shift)
    assert (channels_first(pixels) - expected).abs().max() < 2e-5


def test_hue_of_special_pixels():
    black, white, red, green, blue = torch.tensor(
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    )
    before = torch.stack((black, white, white / 2, red, green, blue, red + green))
    expected = torch.stack((black, white, white / 2, green, blue, red, green + blue))
    turned = render.shift_hue(before.view(1, 7, 3, 1), torch.tensor([1 / 3]))
    torch.testing.assert_close(turned.view(7, 3), expected, atol=1e-6, rtol=0)


def test_gray_is_pillows_to_one_level():
    images = make_images(4, 9, 11)
    result = render.gray(rows_outermost(images))[:, :, 0]
    for image, view in zip(images, result, strict=True):
        expected = np.asarray(functional.to_pil_image(image).convert("L")).astype(np.float32) / 255
        assert np.abs(view.numpy() - expected).max() < 1.01 * LEVEL


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    boxes = [(0, 0, *images.shape[2:])] * len(images)
    p = parameters(table_of(*boxes, blurred=1.0, sigma=sigma))
    return channels_first(render.blur(rows_outermost(images), p))


@pytest.mark.parametrize(
    ("sigma", "size"), [(0.1, 32), (0.3, 5), (0.5, 19), (0.8, 32), (1.0, 5), (1.37, 19), (2.0, 32)]
)
def test_blur_is_pillows(sigma, size):
    # Pillow rounds after each of its six passes, and where sigma is small a pass changes a pixel by
    # less than the rounding.
    from PIL import ImageFilter

    images = make_images(4, size, size)
    for image, view in zip(images, blurred(images, sigma), strict=True):
        picture = functional.to_pil_image(image).filter(ImageFilter.GaussianBlur(sigma))
        difference = (view - functional.pil_to_tensor(picture).float() / 255).abs()
        assert difference.max() < 3 * LEVEL
        assert difference.mean() < 1.5 * LEVEL


def test_blur_matrix_has_the_gaussians_variance_and_keeps_constants():
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.9])
    matrix = blur_matrix(sigma, 41)
    torch.testing.assert_close(matrix.sum(2), torch.ones(4, 41))
    offset = torch.arange(41.0) - 20
    variance = (matrix[:, 20] * offset.square()).sum(1)
    torch.testing.assert_close(variance, sigma.square(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(blur_matrix(torch.tensor([2.0]), 1), torch.ones(1, 1, 1))


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 56, 32), (9, 7, 16)])
def test_center_view(height, width, size):
    images = make_images(3, height, width)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
    side = min(height, width)
    box = ((height - side) // 2, (width - side) // 2, side, side)
    expected = functional.resized_crop(images.float() / 255, *box, [size, size], antialias=True)
    expected = functional.normalize(expected, list(mean), list(std))
    assert (center_view(images, size, mean, std) - expected).abs().max() < 1e-4


def test_an_order_is_one_of_24():
    kinds, hue_slot = slots(torch.arange(24) + 0.7)
    orders = {tuple(row) for row in torch.stack([*kinds, hue_slot], dim=1).tolist()}
    assert orders == {(*k, s) for k in itertools.permutations(range(3)) for s in range(4)}


def test_jitter_applies_the_operations_in_the_samples_order():
    images = make_images(24, 10, 10)
    factors = dict(brightness=0.7, contrast=1.35, saturation=0.65)
    order = torch.arange(24.0)
    p = parameters(table_of(*[(0, 0, 10, 10)] * 24, order=order, hue=0.08, **factors))
    got = channels_first(render.jitter(rows_outermost(images), p))
    kinds, hue_slot = slots(order)
    for i in range(24):
        steps = [BLENDS[int(kind[i])][1] for kind in kinds]
        amounts = [factors[name.removeprefix("adjust_")] for name in steps]
        steps.insert(int(hue_slot[i]), "adjust_hue")
        amounts.insert(int(hue_slot[i]), 0.08)
        expected = images[i].float() / 255
        for name, amount in zip(steps, amounts, strict=True):
            expected = getattr(functional, name)(expected, amount)
        # A rotated hue amplifies the difference of the two grey formulas.
        assert (got[i] - expected).abs().max() < 5 * GRAY_TOLERANCE


def test_solarize_is_pillows():
    from PIL import Image, ImageOps

    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).expand(2, 16, 3, 16)
    image = Image.fromarray(pixels[0].permute(0, 2, 1).contiguous().numpy())
    expected = torch.from_numpy(np.asarray(ImageOps.solarize(image, 128)).copy())
    p = parameters(table_of(*[(0, 0, 16, 16)] * 2, solarized=torch.tensor([1.0, -0.5])))
    got = render.solarize(pixels.float() / 255, p, render.THRESHOLD, 1.0)
    assert torch.equal((got[0] * 255).round().byte().permute(0, 2, 1), expected)
    assert torch.equal(got[1], pixels[1].float() / 255)
