"""The Triton kernel of the views against the operations in PyTorch, on the same numbers."""

from __future__ import annotations

import pytest
import torch
from view_images import noise, table_of

from softcl.data import VIEWS, make_shapes, strong_view, views, weak_view
from softcl.data.recipe import COLUMNS
from softcl.data.render import constants_of, render

pytestmark = pytest.mark.usefixtures("triton_device")

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# In normalised units: a hundredth of an 8-bit level. Sums run in another order.
TOLERANCE = 1e-4


def both(make, images, size, device, monkeypatch, seed=0, **options):
    """The view by the kernel and by PyTorch, from one state of a generator."""

    def view(**more) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return make(images.to(device), size, MEAN, STD, generator, **options, **more)

    calls, original = [], views.triton_view
    with monkeypatch.context() as patch:
        patch.setattr(views, "triton_view", lambda *a: calls.append(1) or original(*a))
        patch.setattr(views, "triton_view", views.triton_view)
        got = view(kernel=True)
    assert len(calls) == 1
    return got, view(kernel=False)


SIZES = [
    (3, 17, 40, 40),  # several tiles, ragged, enlarged
    (2, 48, 64, 16),  # shrunk: a filter of many taps
    (3, 5, 9, 7),
    (2, 6, 6, 1),
    (3, 1, 5, 6),
    (0, 9, 9, 8),
]


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


@pytest.mark.parametrize("make", [strong_view, weak_view])
def test_crops_that_were_cut_before(make, triton_device, monkeypatch):
    got, expected = both(make, noise(5, 24, 24), 24, triton_device, monkeypatch, cropped=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def kernels_and_rendered(table: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = noise(len(table), 8, 8).to(device)
    table = table.to(device)
    made = views.triton_view(images, table, constants_of(MEAN, STD, images.device), 8, True)
    made = views._after_triton(made, table, MEAN, STD)
    return made, render(images, table, 8, MEAN, STD)


@pytest.mark.parametrize(
    "columns",
    [
        dict(),
        dict(mirror=1.0),
        dict(grayed=1.0),
        dict(blurred=1.0, sigma=1.3),
        dict(jittered=1.0, brightness=0.7),
        dict(jittered=1.0, contrast=1.4),
        dict(jittered=1.0, saturation=0.6),
        dict(jittered=1.0, hue=0.3),
        dict(solarized=1.0),
    ],
    ids=lambda columns: ",".join(columns) or "none",
)
def test_each_operation(triton_device, columns):
    got, expected = kernels_and_rendered(table_of(*[(0, 0, 8, 8)] * 4, **columns), triton_device)
    _, plain = kernels_and_rendered(table_of(*[(0, 0, 8, 8)] * 4), triton_device)
    assert (float((expected - plain).abs().max()) > 0.1) == bool(columns)  # it takes place
    if "solarized" in columns:
        assert float((got - expected).abs().gt(TOLERANCE).float().mean()) < 1e-3
    else:
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_all_orders_of_the_jitter(triton_device):
    factors = dict(brightness=1.3, contrast=0.6, saturation=1.5, hue=0.2)
    order = torch.arange(24.0) + 0.9
    table = table_of(*[(0, 0, 8, 8)] * 24, jittered=1.0, order=order, **factors)
    got, expected = kernels_and_rendered(table, triton_device)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_a_sample_depends_on_itself_alone_and_twice_is_the_same(triton_device):
    images = noise(4, 12, 12).to(triton_device)
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
    with torch.autocast(triton_device, dtype=torch.bfloat16):  # which does not touch the pixels
        assert torch.equal(make(images), first)


def test_the_table_has_the_kernels_columns():
    from softcl.kernels import views as kernel

    assert kernel.STRIDE.value == len(COLUMNS)
    for name in ("jittered", "order", "hue", "grayed"):
        assert getattr(kernel, name.upper()).value == COLUMNS.index(name)
    factors = COLUMNS[kernel.FACTORS.value : kernel.FACTORS.value + 3]
    assert factors == ("brightness", "contrast", "saturation")


def test_where_the_kernel_runs(triton_device, monkeypatch):
    images = noise(2, 8, 8).to(triton_device)
    assert views.kernel_for(images) is views.triton_view
    with monkeypatch.context() as patch:
        patch.setattr(views, "LARGEST_IMAGE", 64)
        assert views.kernel_for(images) is None
    with monkeypatch.context() as patch:
        patch.setattr(views, "_has_triton", lambda: False)
        assert views.kernel_for(images) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert views.kernel_for(noise(2, 8, 8)) in (None, views.compiled_view)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [weak_view, strong_view])
def test_numbers_drawn_on_the_gpu(make):
    images = make_shapes(64).images.cuda()
    got, expected = (
        make(images, 32, MEAN, STD, torch.Generator("cuda").manual_seed(3), kernel=wanted)
        for wanted in (True, False)
    )
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
