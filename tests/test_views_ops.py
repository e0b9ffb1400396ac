"""Each operation of a view, with given parameters, against torchvision and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softcl.data import color
from softcl.data.recipe import Crop, central_crop
from softcl.data.resample import apply_rows_then_columns, blur_matrix, crop_matrix
from softcl.data.views import center_view, crop_resize, normalize

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


def crop_of(*boxes: tuple[int, int, int, int], mirror: bool = False) -> Crop:
    top, left, height, width = torch.tensor(boxes, dtype=torch.float32).unbind(1)
    return Crop(top, left, height, width, torch.full((len(boxes),), mirror))


BOXES = [
    (32, 32, 32, (0, 0, 32, 32)),
    (32, 32, 32, (3, 7, 20, 13)),
    (32, 32, 32, (31, 31, 1, 1)),
    (64, 48, 32, (0, 0, 64, 48)),
    (64, 48, 32, (11, 2, 47, 46)),
    (17, 29, 24, (1, 0, 15, 29)),
    (100, 75, 7, (13, 5, 80, 61)),
    (5, 9, 32, (0, 2, 5, 6)),
    (8, 8, 1, (1, 1, 6, 5)),
]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("height", "width", "size", "box"), BOXES)
def test_crop_resize_is_torchvisions_antialiased_crop(height, width, size, box, mirror):
    images = make_images(4, height, width)
    result = channels_first(crop_resize(images, crop_of(*[box] * 4, mirror=mirror), size))
    expected = functional.resized_crop(images.float() / 255, *box, [size, size], antialias=True)
    if mirror:
        expected = functional.horizontal_flip(expected)
    assert (result - expected).abs().max() < 1e-5


def test_crop_resize_is_pillows_to_one_level():
    images = make_images(4, 40, 50)
    box = (4, 9, 33, 27)
    result = channels_first(crop_resize(images, crop_of(*[box] * 4), 24))
    for image, view in zip(images, result, strict=True):
        picture = functional.resized_crop(functional.to_pil_image(image), *box, [24, 24])
        expected = functional.pil_to_tensor(picture).float() / 255
        assert (view - expected).abs().max() < 1.01 * LEVEL


def test_crops_differ_within_a_batch():
    images = make_images(3, 20, 20)
    crop = crop_of((0, 0, 20, 20), (5, 5, 10, 10), (2, 0, 9, 17))
    crop = Crop(crop.top, crop.left, crop.height, crop.width, torch.tensor([False, True, False]))
    together = crop_resize(images, crop, 16)
    for i in range(3):
        one = Crop(*(getattr(crop, f)[i : i + 1] for f in vars(crop)))
        torch.testing.assert_close(together[i : i + 1], crop_resize(images[i : i + 1], one, 16))


def test_crop_matrix_rows_sum_to_one_and_stay_inside_the_crop():
    start = torch.tensor([0.0, 3.0, 30.0])
    length = torch.tensor([32.0, 11.0, 2.0])
    matrix = crop_matrix(start, length, None, 9, 32)
    torch.testing.assert_close(matrix.sum(2), torch.ones(3, 9))
    assert (matrix >= 0).all()
    for i in range(3):
        inside = torch.zeros(32, dtype=torch.bool)
        inside[int(start[i]) : int(start[i] + length[i])] = True
        assert (matrix[i][:, ~inside] == 0).all()


# torchvision weighs red by 0.2989, Pillow and this project by 0.299: at most 1e-4 |1 - factor|.
GRAY_TOLERANCE = 1e-4

BLENDS = [
    (color.BRIGHTNESS, "adjust_brightness", 1e-6),
    (color.CONTRAST, "adjust_contrast", GRAY_TOLERANCE),
    (color.SATURATION, "adjust_saturation", GRAY_TOLERANCE),
]


@pytest.mark.parametrize("factor", [0.5, 0.6, 0.93, 1.0, 1.4])
@pytest.mark.parametrize(("kind", "name", "tolerance"), BLENDS)
def test_blend_is_torchvisions(kind, name, tolerance, factor):
    images = make_images(5, 12, 9)
    pixels = rows_outermost(images)
    color.blend(pixels, torch.full((5,), kind), torch.full((5,), factor))
    expected = getattr(functional, name)(images.float() / 255, factor)
    assert (channels_first(pixels) - expected).abs().max() < tolerance


@pytest.mark.parametrize(("kind", "name", "tolerance"), BLENDS)
def test_blend_is_pillows_to_two_levels(kind, name, tolerance):
    images = make_images(5, 12, 9)
    pixels = rows_outermost(images)
    color.blend(pixels, torch.full((5,), kind), torch.full((5,), 1.3))
    for image, view in zip(images, channels_first(pixels), strict=True):
        picture = getattr(functional, name)(functional.to_pil_image(image), 1.3)
        expected = functional.pil_to_tensor(picture).float() / 255
        assert (view - expected).abs().max() < 2 * LEVEL


def test_blend_takes_kind_and_factor_of_each_sample():
    images = make_images(6, 8, 8)
    kinds, factors = torch.tensor([0, 1, 2, 2, 1, 0]), torch.linspace(0.6, 1.4, 6)
    together = rows_outermost(images)
    color.blend(together, kinds, factors)
    for i in range(6):
        alone = rows_outermost(images[i : i + 1])
        color.blend(alone, kinds[i : i + 1], factors[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.03, 0.0, 0.01, 0.1, 0.37, 0.5])
def test_hue_is_torchvisions(shift):
    images = make_images(6, 13, 10)
    pixels = rows_outermost(images)
    color.shift_hue(pixels, torch.full((6,), shift))
    expected = functional.adjust_hue(images.float() / 255, shift)
    assert (channels_first(pixels) - expected).abs().max() < 2e-5


def test_hue_of_special_pixels():
    pixels = torch.tensor(
        [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    ).view(1, 7, 3, 1)
    color.shift_hue(pixels, torch.tensor([1 / 3]))
    expected = torch.tensor(
        [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]]
    ).view(1, 7, 3, 1)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_gray_is_pillows_to_one_level():
    images = make_images(4, 9, 11)
    result = color.gray(rows_outermost(images))[:, :, 0]
    for image, view in zip(images, result, strict=True):
        expected = np.asarray(functional.to_pil_image(image).convert("L")).astype(np.float32) / 255
        assert np.abs(view.numpy() - expected).max() < 1.01 * LEVEL


@pytest.mark.parametrize("size", [32, 19, 5])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.8, 1.0, 1.37, 2.0])
def test_blur_is_pillows(sigma, size):
    # Pillow rounds after each of its six passes, and where sigma is small a pass changes a pixel by
    # less than the rounding.
    from PIL import ImageFilter

    images = make_images(4, size, size)
    matrix = blur_matrix(torch.full((4,), sigma), size)
    result = channels_first(apply_rows_then_columns(rows_outermost(images), matrix, matrix))
    for image, view in zip(images, result, strict=True):
        picture = functional.to_pil_image(image).filter(ImageFilter.GaussianBlur(sigma))
        expected = functional.pil_to_tensor(picture).float() / 255
        difference = (view - expected).abs()
        assert difference.max() < 3 * LEVEL
        assert difference.mean() < 1.5 * LEVEL


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_blur_is_close_to_a_gaussian_away_from_the_border(sigma):
    images = make_images(4, 48, 48)[::2]  # the smooth ones: three boxes are not a Gaussian on noise
    matrix = blur_matrix(torch.full((2,), sigma), 48)
    result = channels_first(apply_rows_then_columns(rows_outermost(images), matrix, matrix))
    expected = functional.gaussian_blur(images.float() / 255, [21, 21], [sigma, sigma])
    inner = (result - expected)[..., 12:-12, 12:-12].abs()
    assert inner.max() < 4 * LEVEL


def test_blur_matrix_has_the_gaussians_variance_and_keeps_constants():
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.9])
    matrix = blur_matrix(sigma, 41)
    torch.testing.assert_close(matrix.sum(2), torch.ones(4, 41))
    offset = torch.arange(41.0) - 20
    variance = (matrix[:, 20] * offset.square()).sum(1)
    torch.testing.assert_close(variance, sigma.square(), rtol=1e-4, atol=1e-6)


def test_blur_of_one_pixel_is_the_pixel():
    torch.testing.assert_close(blur_matrix(torch.tensor([2.0]), 1), torch.ones(1, 1, 1))


def test_normalize():
    images = make_images(3, 7, 7)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    result = normalize(rows_outermost(images), mean, std)
    assert result.is_contiguous()
    expected = functional.normalize(images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 56, 32), (9, 7, 16)])
def test_center_view(height, width, size):
    images = make_images(3, height, width)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
    side = min(height, width)
    box = ((height - side) // 2, (width - side) // 2, side, side)
    expected = functional.resized_crop(images.float() / 255, *box, [size, size], antialias=True)
    expected = functional.normalize(expected, list(mean), list(std))
    assert (center_view(images, size, mean, std) - expected).abs().max() < 1e-4
    crop = central_crop(3, height, width, images.device)
    assert (crop.height == side).all() and not crop.mirror.any()


@pytest.mark.parametrize("hue_slot", [0, 1, 2, 3])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_jitter_applies_the_operations_in_the_samples_order(order, hue_slot):
    images = make_images(4, 10, 10)
    factor_of = {color.BRIGHTNESS: 0.7, color.CONTRAST: 1.35, color.SATURATION: 0.65}
    names = {kind: name for kind, name, _ in BLENDS}
    expected = images.float() / 255
    for slot in range(4):
        if slot == hue_slot:
            expected = functional.adjust_hue(expected, 0.08)
        if slot < 3:
            expected = getattr(functional, names[order[slot]])(expected, factor_of[order[slot]])
    parameters = [
        torch.tensor([order] * 4),
        torch.tensor([[factor_of[k] for k in order]] * 4),
        torch.full((4,), 0.08),
        torch.full((4,), hue_slot),
    ]
    counts = tuple(4 if hue_slot <= slot else 0 for slot in range(3))
    for given in (None, counts):
        pixels = rows_outermost(images)
        color.jitter(pixels, color.Jitter(*parameters, counts=given))
        # A rotated hue amplifies the difference of the two grey formulas.
        assert (channels_first(pixels) - expected).abs().max() < 5 * GRAY_TOLERANCE


def test_solarize_is_pillows():
    from PIL import Image, ImageOps

    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).expand(2, 16, 3, 16)
    image = Image.fromarray(pixels[0].permute(0, 2, 1).contiguous().numpy())
    expected = torch.from_numpy(np.asarray(ImageOps.solarize(image, 128)).copy())
    got = color.solarize(pixels.float() / 255, torch.tensor([True, False]))
    assert torch.equal((got[0] * 255).round().byte().permute(0, 2, 1), expected)
    assert torch.equal(got[1], pixels[1].float() / 255)
