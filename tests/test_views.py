"""Views as functions: pure, independent per sample, of any size, with clear errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from view_images import noise

from softcl.data import VIEWS, center_view, make_shapes, strong_view, views, weak_view
from softcl.data.recipe import RECIPE, RECIPES, Recipe, draw
from softcl.data.views import Share

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True, params=["kernel", "PyTorch"])
def made_by(request, monkeypatch) -> str:
    """Views by the kernel for CPUs, where there is one, and by the operations it stands for."""
    if request.param == "PyTorch":
        monkeypatch.setattr(views, "kernel_for", lambda *_: None)
    elif views.kernel_missing(torch.device("cpu")) is not None:
        pytest.skip("no kernel runs here")
    return request.param


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_a_function_of_its_image_and_its_numbers(name):
    images = make_shapes(12).images
    before = images.clone()
    first = VIEWS[name](images, 32, MEAN, STD, generator(5))
    torch.randn(7)  # the global generator takes no part
    g = generator(5)
    again = [VIEWS[name](images, 32, MEAN, STD, g) for _ in range(2)]
    assert torch.equal(again[0], first) and not torch.equal(again[1], first)
    assert torch.equal(images, before)
    changed = images.clone()
    changed[5] = 255 - changed[5]
    same = (first == VIEWS[name](changed, 32, MEAN, STD, generator(5))).flatten(1).all(1)
    assert same.tolist() == [i != 5 for i in range(12)]
    one = images[:1].expand(64, -1, -1, -1)
    alike = VIEWS[name](one, 32, MEAN, STD, generator())
    assert len(torch.unique(alike.flatten(1), dim=0)) == 64  # each sample has its own numbers


@pytest.mark.parametrize("name", ["weak", "byol_second"])
def test_processes_make_the_views_of_the_whole_batch(name, made_by):
    images = make_shapes(36).images
    whole = VIEWS[name](images, 32, MEAN, STD, generator(5))
    numbers = torch.rand((36, RECIPES[name].columns), generator=generator(5))
    table = draw(numbers, 32, 32, RECIPES[name])
    for size, rank in ((36, 7), (4, 3)):
        assert torch.equal(draw(numbers[rank::size], 32, 32, RECIPES[name]), table[rank::size])
        share = Share(generator(5), rank, size)
        part = VIEWS[name](images[rank::size], 32, MEAN, STD, share)
        # A product of matrices may round otherwise in another batch; a kernel does not.
        atol = 0.0 if made_by == "kernel" else 1e-6
        torch.testing.assert_close(part, whole[rank::size], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "number", "height", "width", "size"),
    [
        ("strong", 1, 32, 32, 32),
        ("weak", 5, 17, 40, 32),
        ("byol_second", 3, 64, 48, 31),
        ("strong", 2, 8, 8, 1),
        ("byol_first", 4, 1, 5, 6),
        ("weak", 0, 9, 9, 8),
    ],
)
def test_sizes(name, number, height, width, size):
    made = VIEWS[name](noise(number, height, width), size, MEAN, STD, generator())
    assert made.shape == (number, 3, size, size)
    assert made.dtype == torch.float32 and made.is_contiguous()
    low, high = (
        torch.tensor([(v - m) / s for m, s in zip(MEAN, STD, strict=True)]) for v in (0.0, 1.0)
    )
    assert (made >= low.view(3, 1, 1) - 1e-4).all() and (made <= high.view(3, 1, 1) + 1e-4).all()


@pytest.mark.parametrize(("name", "cropped"), [("weak", True), ("strong", False), ("strong", True)])
def test_the_kernel_makes_the_views_of_pytorch(name, cropped, made_by):
    if made_by == "PyTorch":
        pytest.skip("nothing to compare")
    images, options = noise(32, 32, 32), dict(cropped=cropped)
    by_kernel, by_pytorch = (
        VIEWS[name](images, 32, MEAN, STD, generator(3), kernel=wanted, **options)
        for wanted in (True, False)
    )
    torch.testing.assert_close(by_kernel, by_pytorch, rtol=0, atol=2e-5)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_drawn_in_few_operations(name):
    """Each is a launch on a GPU, or a call on a CPU that takes longer than its work."""
    recipe = RECIPES[name]
    for _ in range(2):  # the first fills a cache
        with _Operations() as operations:
            draw(torch.rand((64, recipe.columns)), 32, 32, recipe)
    assert operations.count <= 19


def test_a_strong_view_without_color_is_a_weak_one():
    images = make_shapes(16).images
    plain = Recipe(jitter=0.0, grayscale=0.0, blur=0.0)
    strong = strong_view(images, 32, MEAN, STD, generator(), recipe=plain)
    assert torch.equal(strong, weak_view(images, 32, MEAN, STD, generator()))


def test_the_asymmetric_pair_solarizes_and_blurs_as_published():
    """A constant bright image stays constant under crop and blur, so that its value tells all."""
    first, second = RECIPES["byol_first"], RECIPES["byol_second"]
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    for recipe in (first, second):
        assert recipe.scale == (0.08, 1.0) and recipe.saturation == 0.2
    bright = torch.full((4000, 3, 4, 4), 230, dtype=torch.uint8)
    plain = dataclasses.replace(second, jitter=0.0, grayscale=0.0)
    view = strong_view(bright, 4, (0, 0, 0), (1, 1, 1), generator(), recipe=plain)
    inverted = (view.mean((1, 2, 3)) - 25 / 255).abs() < 1e-3
    assert ((view.mean((1, 2, 3)) - 230 / 255).abs() < 1e-3).logical_xor(inverted).all()
    assert 0.17 < float(inverted.float().mean()) < 0.23


def test_grayscale_makes_channels_equal():
    recipe = Recipe(grayscale=1.0)
    black = dict(mean=(0.0,) * 3, std=(1.0,) * 3, generator=generator(), recipe=recipe)
    red, green, blue = strong_view(make_shapes(8).images, 32, **black).unbind(1)
    torch.testing.assert_close(red, green)
    torch.testing.assert_close(red, blue)


def test_autocast_does_not_touch_the_pixels():
    images = make_shapes(8).images
    expected = strong_view(images, 32, MEAN, STD, generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(strong_view(images, 32, MEAN, STD, generator()), expected)


def test_a_crop_that_was_cut_before_is_only_mirrored():
    """With the numbers that a view of whole images would mirror it by."""
    crops, numbers = noise(32, 16, 16), torch.rand((32, 23), generator=generator(1))
    view = weak_view(crops, 16, MEAN, STD, generator(1), cropped=True)
    mirror = draw(numbers, 16, 16, RECIPES["weak"])[:, 4] > 0
    assert 5 < int(mirror.sum()) < 27
    plain = (crops / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = torch.where(mirror.view(-1, 1, 1, 1), plain.flip(3), plain)
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="crops must have 8 pixels a side"):
        weak_view(crops, 8, MEAN, STD, generator(), cropped=True)


def test_center_view_of_its_own_size_only_normalizes():
    images = noise(4, 32, 32)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (MEAN, STD))
    expected = (images.float() / 255 - mean) / std
    torch.testing.assert_close(center_view(images, 32, MEAN, STD), expected, atol=1e-5, rtol=0)


def test_errors_name_the_argument():
    images = noise(2, 8, 8)
    for wrong, size, said in (
        (images.float(), 8, r"images must be uint8, got torch.float32"),
        (images[:, 0], 8, r"images must have shape .*got \(2, 8, 8\)"),
        (images[:, :1], 8, r"images must have shape .*got \(2, 1, 8, 8\)"),
        (images, 0, "size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            weak_view(wrong, size, MEAN, STD, generator())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_views():
    images = make_shapes(64).images
    expected = strong_view(images, 32, MEAN, STD, generator())
    with_host_numbers = strong_view(images.cuda(), 32, MEAN, STD, generator())
    # Pixels on an edge of the hue circle or of a crop may round either way.
    assert ((with_host_numbers.cpu() - expected).abs() > 1e-3).float().mean() < 1e-3
    g = torch.Generator("cuda").manual_seed(0)
    first = strong_view(images.cuda(), 32, MEAN, STD, g, recipe=RECIPE)
    assert torch.equal(first, strong_view(images.cuda(), 32, MEAN, STD, g.manual_seed(0)))
    with pytest.raises(ValueError, match="generator must be on"):
        strong_view(images, 32, MEAN, STD, g)
