"""Views as functions: pure, independent per sample, of any size, with clear errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from softcl.data import VIEWS, center_view, fused, make_shapes, strong_view, views, weak_view
from softcl.data.recipe import (
    BYOL_FIRST,
    BYOL_SECOND,
    COLOR_COLUMNS,
    CROP_COLUMNS,
    RECIPE,
    Recipe,
    draw_colors,
    draw_crop,
)
from softcl.data.views import color_chosen, color_masked, crop_resize, normalize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True, params=["kernel", "PyTorch"])
def made_by(request, monkeypatch) -> str:
    """Views by the kernel for CPUs, where there is one, and by the operations it stands for."""
    if request.param == "PyTorch":
        monkeypatch.setattr(views, "kernel_for", lambda *_: None)
    elif fused.kernel_missing(torch.device("cpu")) is not None:
        pytest.skip("no kernel runs here")
    return request.param


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(number: int, height: int, width: int) -> torch.Tensor:
    shape = (number, 3, height, width)
    return torch.randint(0, 256, shape, generator=generator(99), dtype=torch.uint8)


@pytest.mark.parametrize("name", VIEWS)
def test_same_generator_state_gives_the_same_view(name):
    images = make_shapes(16).images
    first = VIEWS[name](images, 32, MEAN, STD, generator(5))
    torch.randn(7)  # the global generator takes no part
    assert torch.equal(first, VIEWS[name](images, 32, MEAN, STD, generator(5)))
    assert not torch.equal(first, VIEWS[name](images, 32, MEAN, STD, generator(6)))
    g = generator(5)
    again = [VIEWS[name](images, 32, MEAN, STD, g) for _ in range(2)]
    assert torch.equal(again[0], first) and not torch.equal(again[1], first)


@pytest.mark.parametrize("name", VIEWS)
def test_every_sample_has_its_own_parameters(name):
    images = make_shapes(1).images.expand(64, -1, -1, -1)
    views = VIEWS[name](images, 32, MEAN, STD, generator())
    assert len(torch.unique(views.flatten(1), dim=0)) == 64


@pytest.mark.parametrize("name", VIEWS)
def test_a_sample_depends_on_its_own_image_alone(name):
    images = make_shapes(12).images
    changed = images.clone()
    changed[5] = 255 - changed[5]
    first = VIEWS[name](images, 32, MEAN, STD, generator())
    second = VIEWS[name](changed, 32, MEAN, STD, generator())
    same = (first == second).flatten(1).all(1)
    assert same.tolist() == [i != 5 for i in range(12)]


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize(
    ("number", "height", "width", "size"),
    [(1, 32, 32, 32), (5, 17, 40, 32), (3, 64, 48, 31), (2, 8, 8, 1), (4, 1, 5, 6), (0, 9, 9, 8)],
)
def test_sizes(name, number, height, width, size, nan_filled_memory):
    views = VIEWS[name](noise(number, height, width), size, MEAN, STD, generator())
    assert views.shape == (number, 3, size, size)
    assert views.dtype == torch.float32 and views.is_contiguous()
    low, high = (
        torch.tensor([(v - m) / s for m, s in zip(MEAN, STD, strict=True)]) for v in (0.0, 1.0)
    )
    assert (views >= low.view(3, 1, 1) - 1e-4).all() and (views <= high.view(3, 1, 1) + 1e-4).all()


@pytest.mark.parametrize("name", VIEWS)
def test_images_are_not_changed(name):
    images = make_shapes(8).images
    before = images.clone()
    VIEWS[name](images, 32, MEAN, STD, generator())
    assert torch.equal(images, before)


def test_a_strong_view_without_color_is_a_crop(made_by):
    plain = Recipe(jitter=0.0, grayscale=0.0, blur=0.0)
    images = make_shapes(16).images

    strong = strong_view(images, 32, MEAN, STD, generator(), recipe=plain)
    numbers = torch.rand((16, CROP_COLUMNS + COLOR_COLUMNS), generator=generator())
    crop = draw_crop(numbers[:, :CROP_COLUMNS], 32, 32)
    expected = normalize(crop_resize(images, crop, 32), MEAN, STD)
    atol = 0.0 if made_by == "PyTorch" else 1e-5
    torch.testing.assert_close(strong, expected, rtol=0, atol=atol)


def test_the_asymmetric_pair_solarizes_and_blurs_as_published():
    """A constant bright image stays constant under crop and blur, so that its value tells all."""
    assert (BYOL_FIRST.blur, BYOL_FIRST.solarize) == (1.0, 0.0)
    assert (BYOL_SECOND.blur, BYOL_SECOND.solarize) == (0.1, 0.2)
    for recipe in (BYOL_FIRST, BYOL_SECOND):
        assert recipe.scale == (0.08, 1.0) and recipe.saturation == 0.2
    bright = torch.full((4000, 3, 4, 4), 230, dtype=torch.uint8)
    plain = dataclasses.replace(BYOL_SECOND, jitter=0.0, grayscale=0.0)
    view = strong_view(bright, 4, (0, 0, 0), (1, 1, 1), generator(), recipe=plain)
    inverted = (view.mean((1, 2, 3)) - 25 / 255).abs() < 1e-3
    assert ((view.mean((1, 2, 3)) - 230 / 255).abs() < 1e-3).logical_xor(inverted).all()
    assert 0.17 < float(inverted.float().mean()) < 0.23


def test_grayscale_makes_channels_equal():
    recipe = Recipe(grayscale=1.0)
    views = strong_view(
        make_shapes(8).images, 32, (0.0,) * 3, (1.0,) * 3, generator(), recipe=recipe
    )
    torch.testing.assert_close(views[:, 0], views[:, 1])
    torch.testing.assert_close(views[:, 0], views[:, 2])


@pytest.mark.parametrize("recipe", [RECIPE, Recipe(jitter=0.0, grayscale=1.0), Recipe(blur=0.0)])
def test_both_ways_to_apply_colors_agree(recipe):
    # On the CPU each operation runs on its samples; with a CUDA generator all run on all samples.
    numbers = torch.rand((64, COLOR_COLUMNS), generator=generator(3))
    colors = draw_colors(numbers, recipe)
    pixels = make_shapes(64).images.permute(0, 2, 1, 3).float() / 255
    masked = color_masked(pixels.clone(), colors)
    torch.testing.assert_close(color_chosen(pixels.clone(), colors), masked, atol=1e-6, rtol=0)


def test_autocast_does_not_touch_the_pixels():
    images = make_shapes(8).images
    expected = strong_view(images, 32, MEAN, STD, generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(strong_view(images, 32, MEAN, STD, generator()), expected)


def test_center_view_of_its_own_size_only_normalizes():
    images = noise(4, 32, 32)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (MEAN, STD))
    expected = (images.float() / 255 - mean) / std
    torch.testing.assert_close(center_view(images, 32, MEAN, STD), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("view", [strong_view, weak_view])
def test_errors_name_the_argument(view):
    images = noise(2, 8, 8)
    with pytest.raises(ValueError, match=r"images must be uint8, got torch.float32"):
        view(images.float(), 8, MEAN, STD, generator())
    with pytest.raises(ValueError, match=r"images must have shape .*got \(2, 8, 8\)"):
        view(images[:, 0], 8, MEAN, STD, generator())
    with pytest.raises(ValueError, match=r"images must have shape .*got \(2, 1, 8, 8\)"):
        view(images[:, :1], 8, MEAN, STD, generator())
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        view(images, 0, MEAN, STD, generator())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_views():
    images = make_shapes(64).images
    expected = strong_view(images, 32, MEAN, STD, generator())
    with_host_numbers = strong_view(images.cuda(), 32, MEAN, STD, generator())
    # Pixels on an edge of the hue circle or of a crop may round either way.
    assert ((with_host_numbers.cpu() - expected).abs() > 1e-3).float().mean() < 1e-3
    g = torch.Generator("cuda").manual_seed(0)
    first = strong_view(images.cuda(), 32, MEAN, STD, g)
    assert torch.equal(first, strong_view(images.cuda(), 32, MEAN, STD, g.manual_seed(0)))
    with pytest.raises(ValueError, match="generator must be on"):
        strong_view(images, 32, MEAN, STD, g)
