"""The Triton kernel of the views against the operations in PyTorch, on the same numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from view_images import noise

from softcl.data import VIEWS, compiled, fused, make_shapes, strong_view, views, weak_view
from softcl.data.recipe import COLOR_COLUMNS, RECIPE, Recipe, draw_colors

pytestmark = pytest.mark.usefixtures("triton_device")

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# In normalised units: a hundredth of an 8-bit level. Sums run in another order.
TOLERANCE = 1e-4


def both(make, images, size, device, monkeypatch, seed=0, **options):
    """The view by the kernel and by PyTorch, from one state of a generator."""

    def view() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return make(images.to(device), size, MEAN, STD, generator, **options)

    calls, original = [], views.fused_view
    with monkeypatch.context() as patch:
        patch.setattr(views, "fused_view", lambda *a: calls.append(1) or original(*a))
        got = view()
        patch.setattr(views, "kernel_for", lambda *_: None)
        expected = view()
    assert len(calls) == 1
    return got, expected


SIZES = [
    (3, 17, 40, 40),  # several tiles, ragged, enlarged
    (2, 48, 64, 16),  # shrunk: a filter of many taps
    (3, 5, 9, 7),
    (2, 6, 6, 1),
    (3, 1, 5, 6),
    (0, 9, 9, 8),
]


@pytest.mark.parametrize("make", [strong_view, weak_view])
def test_crops_that_were_cut_before(make, triton_device, monkeypatch):
    got, expected = both(make, noise(5, 24, 24), 24, triton_device, monkeypatch, cropped=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "number", "height", "width", "size"),
    [*((name, 8, 32, 32, 32) for name in VIEWS), *(("strong", *sizes) for sizes in SIZES)],
)
def test_as_in_pytorch(triton_device, monkeypatch, name, number, height, width, size):
    images = noise(number, height, width)
    got, expected = both(VIEWS[name], images, size, triton_device, monkeypatch)
    assert got.shape == expected.shape == (number, 3, size, size)
    assert got.is_contiguous() and got.dtype == torch.float32
    difference = (got - expected).abs()
    if name == "byol_second":  # solarisation jumps at its threshold
        assert float((difference > TOLERANCE).float().sum()) <= 2e-4 * difference.numel()
    else:
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def only(**changes) -> Recipe:
    return dataclasses.replace(
        Recipe(jitter=0.0, grayscale=0.0, blur=0.0, flip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        **changes,
    )


@pytest.mark.parametrize(
    "recipe",
    [
        only(),
        only(flip=1.0),
        only(grayscale=1.0),
        only(blur=1.0),
        only(jitter=1.0, contrast=0.0, saturation=0.0, hue=0.0),
        only(jitter=1.0, brightness=0.0, saturation=0.0, hue=0.0),
        only(jitter=1.0, brightness=0.0, contrast=0.0, hue=0.0),
        only(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.5),
        only(jitter=1.0, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5),
        only(solarize=1.0),
    ],
    ids=lambda r: ",".join(
        f"{f.name}={getattr(r, f.name)}"
        for f in dataclasses.fields(r)
        if getattr(r, f.name) != getattr(only(), f.name)
    ),
)
def test_each_operation(triton_device, monkeypatch, recipe):
    images = noise(4, 16, 16)
    options = dict(recipe=recipe)
    got, expected = both(strong_view, images, 16, triton_device, monkeypatch, **options)
    plain = (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    changed = float((expected.cpu() - plain).abs().max()) > 0.1
    assert changed == (recipe != only())  # the operation takes place
    if recipe.solarize:
        assert float((got - expected).abs().gt(TOLERANCE).float().mean()) < 1e-3
    else:
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_all_orders_of_the_jitter(triton_device, monkeypatch):
    images = noise(48, 4, 4)
    recipe = only(jitter=1.0, brightness=0.6, contrast=0.9, saturation=0.9, hue=0.4)
    seen = {}

    def draw(uniform, recipe):
        colors = draw_colors(uniform, recipe)
        for kinds, slot in zip(colors.kinds.tolist(), colors.hue_slot.tolist(), strict=True):
            seen[(*kinds, slot)] = True
        return colors

    monkeypatch.setattr(views, "draw_colors", draw)
    got, expected = both(strong_view, images, 4, triton_device, monkeypatch, seed=2, recipe=recipe)
    assert len(seen) >= 18  # of 24
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_nothing_unwritten_is_read(triton_device, monkeypatch, nan_filled_memory):
    images = noise(5, 20, 12)
    got, expected = both(strong_view, images, 33, triton_device, monkeypatch)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_a_sample_depends_on_itself_alone_and_twice_is_the_same(triton_device):
    images = make_shapes(4).images.to(triton_device)
    changed = images.clone()
    changed[2] = 255 - changed[2]

    def make(x):
        return strong_view(x, 8, MEAN, STD, torch.Generator().manual_seed(4))

    first, second = make(images), make(changed)
    same = (first == second).flatten(1).all(1)
    assert same.tolist() == [i != 2 for i in range(4)]
    assert torch.equal(make(images), first)
    # Images that are no block of memory of their own.
    apart = images.repeat_interleave(2, 0)[::2]
    assert not apart.is_contiguous() and torch.equal(make(apart), first)


def test_autocast_does_not_touch_the_pixels(triton_device):
    images = make_shapes(4).images.to(triton_device)
    make = lambda: strong_view(images, 16, MEAN, STD, torch.Generator().manual_seed(4))  # noqa: E731
    expected = make()
    with torch.autocast(triton_device, dtype=torch.bfloat16):
        assert torch.equal(make(), expected)


def test_the_table_has_the_kernels_columns():
    from softcl.kernels import views as kernel

    uniform = torch.rand((3, COLOR_COLUMNS), generator=torch.Generator().manual_seed(0))
    colors = draw_colors(uniform, RECIPE)
    crop = views.draw_crop(torch.rand((3, views.CROP_COLUMNS)), 9, 9, RECIPE)
    table = fused.parameter_table(crop, colors, kernel.STRIDE.value)
    assert table.shape == (3, kernel.STRIDE.value) and len(kernel.COLUMNS) <= table.shape[1]
    column = dict(zip(kernel.COLUMNS, table.unbind(1), strict=False))
    for name in ("top", "left", "height", "width", "mirror"):
        assert torch.equal(column[name], getattr(crop, name).float())
    for name in ("jittered", "hue", "hue_slot", "grayed"):
        assert torch.equal(column[name], getattr(colors, name).float())
    for slot in range(3):
        assert torch.equal(column[f"kind_{slot}"], colors.kinds[:, slot].float())
        assert torch.equal(column[f"factor_{slot}"], colors.factors[:, slot])


def test_where_the_kernel_runs(triton_device, monkeypatch):
    images = noise(2, 8, 8).to(triton_device)
    assert fused.kernel_for(images) is not None
    with monkeypatch.context() as patch:
        patch.setattr(fused, "LARGEST_IMAGE", 64)
        assert fused.kernel_for(images) is None
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_kernel", lambda: None)  # triton is not installed
        assert fused.kernel_for(images) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert fused.kernel_for(noise(2, 8, 8)) in (None, compiled)  # on a CPU, not interpreted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [weak_view, strong_view])
def test_numbers_drawn_on_the_gpu(make, monkeypatch):
    images = make_shapes(64).images.cuda()

    def view():
        return make(images, 32, MEAN, STD, torch.Generator("cuda").manual_seed(3))

    got = view()
    monkeypatch.setattr(views, "kernel_for", lambda *_: None)
    torch.testing.assert_close(got, view(), atol=TOLERANCE, rtol=0)
