"""The compiled kernel of the views against the operations in PyTorch, in float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_C = pytest.importorskip("softcl._C", reason="softcl._C is not built")

from view_images import noise, table_of  # noqa: E402

from softcl import native  # noqa: E402
from softcl.data import make_shapes, strong_view, views  # noqa: E402
from softcl.data.recipe import COLUMNS, RECIPE, draw  # noqa: E402
from softcl.data.render import render  # noqa: E402

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CONSTANTS = torch.tensor([[1 / s for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)]])
# In normalised units, and the largest that was seen: 2.9e-6. Float32 in PyTorch: 9.6e-6.
TOLERANCE = 6e-6


@pytest.fixture(autouse=True)
def compiled_and_not_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def drawn(number: int, height: int, width: int) -> torch.Tensor:
    numbers = torch.rand((number, RECIPE.columns), generator=torch.Generator().manual_seed(0))
    return draw(numbers, height, width, RECIPE)


def kernel(images, size, table, colors: bool = True) -> torch.Tensor:
    return views.compiled_view(images, table, CONSTANTS, size, colors)


def assert_is_the_oracles(images, size, table, colors: bool = True) -> torch.Tensor:
    """The kernel's views are those of softcl.data.views in float64."""
    got = kernel(images, size, table, colors)
    assert got.shape == (len(images), 3, size, size)
    assert got.dtype == torch.float32 and got.is_contiguous()
    expected = render(images, table.double(), size, MEAN, STD, colors)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE)
    return got


SIZES = [
    (16, 32, 32, 32),
    (5, 17, 40, 40),  # ragged, enlarged
    (4, 48, 64, 16),  # shrunk: a filter of many taps
    (3, 300, 500, 33),  # and of more than a window holds
    (3, 96, 96, 64),
    (3, 5, 9, 7),
    (2, 6, 6, 1),
    (4, 1, 5, 6),
    (4, 5, 1, 6),
    (2, 1, 1, 1),
    (0, 9, 9, 8),
]


@pytest.mark.parametrize(("number", "height", "width", "size"), SIZES)
def test_sizes(number, height, width, size):
    table, images = drawn(number, height, width), noise(number, height, width)
    for colors in (False, True):
        assert_is_the_oracles(images, size, table, colors)


# In an image of 23 x 37: corners, lines, single pixels, all of it.
BOXES = [
    *((0, 0, 1, 1), (22, 36, 1, 1), (0, 36, 1, 1), (22, 0, 1, 1), (11, 19, 1, 1)),
    *((0, 0, 1, 37), (22, 0, 1, 37), (0, 0, 23, 1), (0, 36, 23, 1), (5, 9, 2, 2)),
    *((0, 0, 23, 37), (1, 2, 22, 35), (20, 30, 3, 7), (0, 13, 7, 23)),
]


@pytest.mark.parametrize(
    ("size", "mirror"), [(1, 0), (2, 1), (7, 0), (16, 1), (23, 0), (33, 1), (64, 0)]
)
def test_extreme_crops(size, mirror):
    table = table_of(*BOXES, mirror=mirror)
    assert_is_the_oracles(noise(len(BOXES), 23, 37), size, table, False)


def test_a_large_image_keeps_the_fractions_of_its_centres():
    """Among 16384 columns a float32 centre would be off by up to 5e-4 of a pixel."""
    images = (torch.arange(16384) % 2 * 255).to(torch.uint8).view(1, 1, 1, -1).repeat(1, 3, 1, 1)
    for box in ((0, 16000, 1, 384), (0, 16351, 1, 33), (0, 16383, 1, 1), (0, 11003, 1, 29)):
        assert_is_the_oracles(images, 31, table_of(box), False)


def test_a_whole_image_of_the_views_size_keeps_its_pixels():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    plain = torch.tensor([[1.0] * 3, [0.0] * 3])
    got = views.compiled_view(images, table_of((0, 0, 16, 16)), plain, 16, False)
    assert torch.equal(got, images * torch.tensor(1 / 255))


def jitters(height: int, width: int, **columns) -> torch.Tensor:
    """Jittered whole images, one in each of the 24 orders of the four operations."""
    generator = torch.Generator().manual_seed(1)
    names = ("brightness", "contrast", "saturation")
    rest = dict(
        jittered=1.0, order=torch.arange(24.0), hue=torch.rand(24, generator=generator) - 0.5
    )
    rest |= {name: torch.rand(24, generator=generator) * 1.8 + 0.1 for name in names}
    return table_of(*[(0, 0, height, width)] * 24, **(rest | columns))


def test_every_order_of_the_jitter():
    assert_is_the_oracles(noise(24, 13, 13), 13, jitters(13, 13))


@pytest.mark.parametrize("shift", [-1.0, -0.5, -0.1, 0.0, 1 / 3, 1.0])
def test_hue(shift):
    """Primary, mixed, grey and nearly grey pixels, each with all shifts."""
    levels = torch.tensor(list(itertools.product((0, 1, 127, 128, 254, 255), repeat=3)))
    images = levels.T.reshape(1, 3, 12, 18).to(torch.uint8).repeat(24, 1, 1, 1)
    plain = dict(brightness=1.0, contrast=1.0, saturation=1.0)
    assert_is_the_oracles(images, 18, jitters(12, 18, hue=shift, **plain))


@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_images_of_one_value_stay_so(value):
    images = torch.full((24, 3, 11, 14), value, dtype=torch.uint8)
    table = jitters(11, 14, blurred=1.0)
    table[:, :5] = drawn(24, 11, 14)[:, :5]
    view = assert_is_the_oracles(images, 19, table)
    assert float((view - view[..., :1, :1]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("size", [1, 2, 5, 16, 21])
def test_blur(size):
    """From no width to boxes wider than the view, on either side of a whole radius."""
    sigma = torch.tensor([0, 1e-3, 0.1, 0.3, 0.8, 0.8165, 1.4, 1.4143, 2.0, 3.0, 5.5, 9.0, 20.0])
    table = table_of(*[(0, 0, size, size)] * len(sigma), blurred=1.0, sigma=sigma)
    assert_is_the_oracles(noise(len(sigma), size, size), size, table)


def test_solarized_from_128_on():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    table = table_of(*[(0, 0, 16, 16)] * 2, solarized=torch.tensor([0.3, -0.3]))
    first, second = assert_is_the_oracles(images, 16, table)
    assert not torch.equal(first, second)


def test_the_same_bits_with_any_threads_and_in_any_batch():
    images, table = noise(37, 29, 31), drawn(37, 29, 31)
    table[:, COLUMNS.index("sigma")] *= 3
    threads = torch.get_num_threads()
    try:
        made = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            made += [kernel(images, 32, table) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(made[0], other) for other in made)
    for places in ([0], [36], [5, 11], list(range(36, -1, -1))):
        assert torch.equal(kernel(images[places], 32, table[places]), made[0][places])


def test_images_that_are_no_block_of_memory():
    images, table = noise(6, 12, 18), drawn(6, 12, 18)
    expected = kernel(images, 9, table)
    for apart in (
        images.repeat_interleave(2, 0)[::2],
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert not apart.is_contiguous()
        assert torch.equal(kernel(apart, 9, table), expected)
    one = images[:1].expand(6, -1, -1, -1)
    assert torch.equal(kernel(one, 9, table)[0], expected[0])


def test_the_table_has_the_kernels_columns():
    assert _C.view_columns == len(COLUMNS)


# ------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("height", 0, r"height=0 of sample 1, must be in \[1, 8\]"),
        ("height", 9, "height=9"),
        ("width", 4.5, "width=4.5.* and whole"),
        ("top", -1, "top=-1"),
        ("top", 7, r"top=7 of sample 1, must be in \[0, 4\]"),
        ("left", float("nan"), "left=nan"),
        ("order", 24, "order=24"),
        ("order", -0.5, "order=-0.5"),
        ("saturation", -0.5, "factor=-0.5"),
        ("brightness", float("inf"), "factor=inf"),
        ("hue", 1.5, "hue=1.5"),
        ("sigma", -1, "sigma=-1"),
        ("sigma", 1e6, "sigma=1000000"),
    ],
)
def test_numbers_out_of_range_are_named(column, value, said):
    table = table_of(*[(0, 0, 4, 4)] * 2, jittered=1.0, blurred=1.0)
    images = noise(2, 8, 8)
    kernel(images, 8, table)
    table[1, COLUMNS.index(column)] = value
    with pytest.raises(ValueError, match=f"table: {said}"):
        kernel(images, 8, table)
    if COLUMNS.index(column) >= 5:  # not read
        kernel(images, 8, table, False)


def test_a_null_pointer_is_named():
    good = dict(images=1, table=1, constants=1, views=1)
    for name in good:
        arrays = {**good, name: 0}
        with pytest.raises(ValueError, match=f"{name} is a null pointer"):
            _C.cpu_views(
                **arrays, num_images=1, height=1, width=1, size=1, colors=False, num_threads=1
            )
    sizes = dict(num_images=0, height=1, width=1, size=1, num_threads=1)
    _C.cpu_views(**good, **sizes, colors=False)
    for name, value in (("num_images", -1), ("height", 0), ("size", 1 << 20), ("num_threads", 0)):
        with pytest.raises(ValueError, match=f"{name}={value}, must be in"):
            _C.cpu_views(**good, **{**sizes, name: value}, colors=False)


# ------------------------------------------------------------------------------- where it runs


def test_without_the_compiled_module_pytorch_makes_the_views(monkeypatch):
    images = make_shapes(4).images
    view = lambda **o: strong_view(images, 16, MEAN, STD, torch.Generator().manual_seed(4), **o)  # noqa: E731
    cpu = torch.device("cpu")
    assert views.kernel_for(images) is views.compiled_view
    assert views.kernel_missing(cpu) is None
    assert views.kernel_missing(torch.device("meta")) == "needs a CPU or a CUDA device"
    assert views.describe_kernel(cpu) == f"by the compiled kernel ({_C.isa()})"
    assert views.describe_kernel(cpu, False) == "by PyTorch, as asked for"
    by_pytorch = view(kernel=False)
    assert not torch.equal(view(), by_pytorch)
    reason = "softcl._C is not built"
    monkeypatch.setattr(native, "load_for_cpu", lambda: (None, reason))
    assert torch.equal(view(), by_pytorch)
    assert views.describe_kernel(cpu) == f"by PyTorch (the kernel does not run: {reason})"
    with pytest.raises(RuntimeError, match="the views' kernel does not run: softcl._C"):
        view(kernel=True)


@pytest.mark.parametrize("isa", [isa for isa in _C.available_isas() if isa != _C.isa()])
def test_all_of_this_on_each_other_instruction_set(isa):
    if "SOFTCL_CPU_ISA" in os.environ:
        pytest.skip("one is forced")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "SOFTCL_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
