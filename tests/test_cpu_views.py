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

from view_images import noise  # noqa: E402

from softcl.data import (  # noqa: E402  # noqa: E402
    VIEWS,
    color,
    compiled,
    fused,
    make_shapes,
    strong_view,
    views,
    weak_view,
)
from softcl.data.recipe import (  # noqa: E402  # noqa: E402
    COLOR_COLUMNS,
    CROP_COLUMNS,
    RECIPE,
    Colors,
    Crop,
    draw_colors,
    draw_crop,
)
from softcl.data.resample import apply_rows_then_columns, crop_matrix  # noqa: E402

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CONSTANTS = torch.tensor([[1 / s for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)]])
# In normalised units, and the largest that was seen: 2.9e-6. Float32 in PyTorch: 9.6e-6.
TOLERANCE = 6e-6


@pytest.fixture(autouse=True)
def compiled_and_not_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def draw(number: int, height: int, width: int, seed: int = 0, recipe=RECIPE) -> tuple[Crop, Colors]:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand((number, CROP_COLUMNS + COLOR_COLUMNS), generator=generator)
    crop = draw_crop(numbers[:, :CROP_COLUMNS], height, width, recipe)
    return crop, draw_colors(numbers[:, CROP_COLUMNS:], recipe)


def crops(*boxes: tuple[int, int, int, int], mirror: bool = False) -> Crop:
    top, left, height, width = torch.tensor(boxes, dtype=torch.float32).unbind(1)
    return Crop(top, left, height, width, torch.full((len(boxes),), mirror))


def doubles(numbers):
    """The same parameters, the real ones in float64."""
    fields = {k: v.double() if v.is_floating_point() else v for k, v in vars(numbers).items()}
    return type(numbers)(**fields)


def oracle(images, size, crop: Crop, colors: Colors | None = None, solarized=None) -> torch.Tensor:
    """softcl.data.views, step by step, in float64."""
    crop = doubles(crop)
    rows = crop_matrix(crop.top, crop.height, None, size, images.shape[2])
    columns = crop_matrix(crop.left, crop.width, crop.mirror, size, images.shape[3])
    pixels = apply_rows_then_columns(images.permute(0, 2, 1, 3).double() / 255, rows, columns)
    if colors is not None:
        pixels = views.color_masked(pixels, doubles(colors))
    if solarized is not None:
        pixels = color.solarize(pixels, solarized)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    return (pixels.transpose(1, 2) - mean) / std


def kernel(images, size, crop: Crop, colors: Colors | None = None, solarized=None) -> torch.Tensor:
    table = compiled.parameter_table(crop, colors, solarized)
    return compiled.launch(images, table, CONSTANTS, size, colors is not None)


def assert_is_the_oracles(images, size, *parameters) -> None:
    got = kernel(images, size, *parameters)
    assert got.shape == (len(images), 3, size, size)
    assert got.dtype == torch.float32 and got.is_contiguous()
    expected = oracle(images, size, *parameters)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE)


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
@pytest.mark.parametrize("with_colors", [False, True])
def test_sizes(number, height, width, size, with_colors, nan_filled_memory):
    crop, colors = draw(number, height, width)
    images = noise(number, height, width)
    assert_is_the_oracles(images, size, crop, colors if with_colors else None)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("cropped", [False, True])
def test_recipes_as_in_pytorch(name, cropped):
    images = noise(32, 32, 32)

    def make(wanted):
        generator = torch.Generator().manual_seed(3)
        options = dict(cropped=cropped, kernel=wanted)
        return VIEWS[name](images, 32, MEAN, STD, generator, **options)

    got, expected = make(True), make(False)
    difference = (got - expected).abs()
    # Two roundings to float32; solarisation jumps at its threshold.
    beyond = float((difference > 2 * TOLERANCE).double().mean())
    assert beyond <= (2e-4 if name == "byol_second" else 0.0), float(difference.max())


# In an image of 23 x 37: corners, lines, single pixels, all of it.
BOXES = [
    *((0, 0, 1, 1), (22, 36, 1, 1), (0, 36, 1, 1), (22, 0, 1, 1), (11, 19, 1, 1)),
    *((0, 0, 1, 37), (22, 0, 1, 37), (0, 0, 23, 1), (0, 36, 23, 1), (5, 9, 2, 2)),
    *((0, 0, 23, 37), (1, 2, 22, 35), (20, 30, 3, 7), (0, 13, 7, 23)),
]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 23, 33, 64])
@pytest.mark.parametrize("mirror", [False, True])
def test_extreme_crops(size, mirror):
    assert_is_the_oracles(noise(len(BOXES), 23, 37), size, crops(*BOXES, mirror=mirror))


def test_a_large_image_keeps_the_fractions_of_its_centres():
    """Among 16384 columns a float32 centre would be off by up to 5e-4 of a pixel."""
    images = (torch.arange(16384) % 2 * 255).to(torch.uint8).view(1, 1, 1, -1).repeat(1, 3, 1, 1)
    for box in ((0, 16000, 1, 384), (0, 16351, 1, 33), (0, 16383, 1, 1), (0, 11003, 1, 29)):
        assert_is_the_oracles(images, 31, crops(box))


def test_a_whole_image_of_the_views_size_keeps_its_pixels():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    plain = torch.tensor([[1.0] * 3, [0.0] * 3])
    table = compiled.parameter_table(crops((0, 0, 16, 16)), None, None)
    got = compiled.launch(images, table, plain, 16, False)
    assert torch.equal(got, images * torch.tensor(1 / 255))


def jitters(**changes) -> Colors:
    """Jittered samples of every order of the four operations: 24 of them."""
    orders = [(*k, slot) for k in itertools.permutations(range(3)) for slot in range(4)]
    orders = torch.tensor(orders)
    generator = torch.Generator().manual_seed(1)
    n, yes = len(orders), torch.ones(len(orders), dtype=torch.bool)
    colors = dict(
        jittered=yes,
        kinds=orders[:, :3],
        factors=torch.rand((n, 3), generator=generator) * 1.8 + 0.1,
        hue=torch.rand(n, generator=generator) - 0.5,
        hue_slot=orders[:, 3],
        grayed=~yes,
        blurred=~yes,
        sigma=torch.full((n,), 1.0),
    )
    return Colors(**{**colors, **changes})


def test_every_order_of_the_jitter():
    colors = jitters()
    orders = {(*k, s) for k, s in zip(colors.kinds.tolist(), colors.hue_slot.tolist(), strict=True)}
    orders = {tuple(map(str, order)) for order in orders}
    assert len(orders) == 24
    images = noise(24, 13, 13)
    assert_is_the_oracles(images, 13, crops(*[(0, 0, 13, 13)] * 24), colors)


@pytest.mark.parametrize("shift", [-1.0, -0.5, -0.1, 0.0, 1 / 6, 1 / 3, 0.5, 1.0])
def test_hue(shift):
    """Primary, mixed, grey and nearly grey pixels, each with all shifts."""
    levels = torch.tensor(list(itertools.product((0, 1, 127, 128, 254, 255), repeat=3)))
    images = levels.T.reshape(1, 3, 12, 18).to(torch.uint8).repeat(24, 1, 1, 1)
    colors = jitters(factors=torch.ones(24, 3), hue=torch.full((24,), shift))
    assert_is_the_oracles(images, 18, crops(*[(0, 0, 12, 18)] * 24), colors)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 255])
def test_images_of_one_value_stay_so(value):
    images = torch.full((24, 3, 11, 14), value, dtype=torch.uint8)
    crop, _ = draw(24, 11, 14)
    colors = jitters(blurred=torch.ones(24, dtype=torch.bool))
    assert_is_the_oracles(images, 19, crop, colors)
    view = kernel(images, 19, crop, colors)
    assert float((view - view[..., :1, :1]).abs().max()) < TOLERANCE


def test_grayed_only():
    yes = torch.ones(24, dtype=torch.bool)
    colors = jitters(jittered=~yes, grayed=yes)
    images = noise(24, 20, 20)
    assert_is_the_oracles(images, 20, crops(*[(0, 0, 20, 20)] * 24), colors)
    first, second, third = (
        kernel(images, 20, crops(*[(0, 0, 20, 20)] * 24), colors) * torch.tensor(STD).view(3, 1, 1)
        + torch.tensor(MEAN).view(3, 1, 1)
    ).unbind(1)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    torch.testing.assert_close(first, third, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 21])
def test_blur(size):
    """From no width to boxes wider than the view, on either side of a whole radius."""
    sigma = torch.tensor([1e-3, 0.1, 0.3, 0.8, 0.8165, 1.4, 1.4143, 2.0, 3.0, 5.5, 9.0, 20.0])
    n, yes = len(sigma), torch.ones(len(sigma), dtype=torch.bool)
    colors = Colors(
        ~yes, torch.tensor([[0, 1, 2]] * n), torch.ones(n, 3), torch.zeros(n),
        torch.zeros(n, dtype=torch.int64), ~yes, yes, sigma,
    )  # fmt: skip
    assert_is_the_oracles(noise(n, size, size), size, crops(*[(0, 0, size, size)] * n), colors)


def test_solarized_from_128_on():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    _, colors = draw(2, 16, 16)
    no = torch.zeros(2, dtype=torch.bool)
    colors = Colors(**{**vars(colors), "jittered": no, "grayed": no, "blurred": no})
    solarized = torch.tensor([True, False])
    assert_is_the_oracles(images, 16, crops(*[(0, 0, 16, 16)] * 2), colors, solarized)


def test_the_same_bits_with_any_threads_and_in_any_batch():
    images = noise(37, 29, 31)
    crop, colors = draw(37, 29, 31)
    colors = Colors(**{**vars(colors), "sigma": colors.sigma * 3})
    threads = torch.get_num_threads()
    try:
        made = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            made += [kernel(images, 32, crop, colors) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(made[0], other) for other in made)
    for places in ([0], [36], [5, 11], list(range(36, -1, -1))):
        some = [type(x)(**{k: v[places] for k, v in vars(x).items()}) for x in (crop, colors)]
        assert torch.equal(kernel(images[places], 32, *some), made[0][places])


def test_images_that_are_no_block_of_memory():
    images = noise(6, 12, 18)
    crop, colors = draw(6, 12, 18)
    expected = kernel(images, 9, crop, colors)
    for apart in (
        images.repeat_interleave(2, 0)[::2],
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert not apart.is_contiguous()
        assert torch.equal(kernel(apart, 9, crop, colors), expected)
    one = images[:1].expand(6, -1, -1, -1)
    assert torch.equal(kernel(one, 9, crop, colors)[0], expected[0])


def test_the_table_has_the_kernels_columns():
    crop, colors = draw(5, 9, 11)
    solarized = torch.tensor([True, False, True, False, False])
    table = compiled.parameter_table(crop, colors, solarized)
    assert table.shape == (5, len(compiled.COLUMNS)) and table.dtype == torch.float32
    assert _C.view_columns == len(compiled.COLUMNS)
    column = dict(zip(compiled.COLUMNS, table.unbind(1), strict=True))
    for name in ("top", "left", "height", "width", "mirror"):
        assert torch.equal(column[name], getattr(crop, name).float())
    for name in ("jittered", "hue", "hue_slot", "grayed"):
        assert torch.equal(column[name], getattr(colors, name).float())
    for slot in range(3):
        assert torch.equal(column[f"kind_{slot}"], colors.kinds[:, slot].float())
        assert torch.equal(column[f"factor_{slot}"], colors.factors[:, slot])
    assert torch.equal(column["sigma"], colors.sigma * colors.blurred)
    assert torch.equal(column["solarized"], solarized.float())
    # One order with the Triton kernel's table, whose first columns these are.
    theirs = fused.parameter_table(crop, colors, 16)[:, :15]
    assert torch.equal(table[:, :15], theirs)


# ------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("height", 0, r"height=0 of sample 1, must be in \[1, 8\]"),
        ("height", 9, "height=9"),
        ("width", 4.5, "width=4.5.* and whole"),
        ("top", -1, "top=-1"),
        ("top", 7, r"top=7 of sample 1, must be in \[0, 4\]"),
        ("left", 5, "left=5"),
        ("left", float("nan"), "left=nan"),
        ("kind_1", 3, "kind=3"),
        ("kind_1", 0, "a kind comes twice"),
        ("factor_2", -0.5, "factor=-0.5"),
        ("factor_0", float("inf"), "factor=inf"),
        ("hue", 1.5, "hue=1.5"),
        ("hue_slot", 4, "hue_slot=4"),
        ("sigma", -1, "sigma=-1"),
        ("sigma", 1e6, "sigma=1000000"),
    ],
)
def test_numbers_out_of_range_are_named(column, value, said):
    crop = crops(*[(0, 0, 4, 4)] * 2)
    colors = Colors(**{k: v[:2] for k, v in vars(jitters()).items()})
    table = compiled.parameter_table(crop, colors, None)
    images = noise(2, 8, 8)
    compiled.launch(images, table, CONSTANTS, 8, True)
    table[1, compiled.COLUMNS.index(column)] = value
    with pytest.raises(ValueError, match=f"table: {said}"):
        compiled.launch(images, table, CONSTANTS, 8, True)
    if compiled.COLUMNS.index(column) >= 5:  # not read
        compiled.launch(images, table, CONSTANTS, 8, False)


def test_other_types_and_shapes_are_named():
    images, table = noise(2, 8, 8), compiled.parameter_table(crops(*[(0, 0, 4, 4)] * 2), None, None)

    def launch(images=images, table=table, constants=CONSTANTS, size=8):
        return compiled.launch(images, table, constants, size, False)

    launch()
    for wrong, said in (
        (dict(images=images.float()), r"images must be torch.uint8 on the CPU, got torch.float32"),
        (dict(images=images[:, :2]), r"images must have shape \(\*, 3, \*, \*\), got \(2, 2, 8, 8"),
        (dict(images=images[0]), "images must have shape"),
        (dict(table=table.double()), "table must be torch.float32"),
        (dict(table=table[:1]), r"table must have shape \(2, 17\), got \(1, 17\)"),
        (dict(table=table[:, :16]), "table must have shape"),
        (dict(constants=CONSTANTS[0]), "constants must have shape"),
        (dict(constants=CONSTANTS.half()), "constants must be torch.float32"),
        (dict(size=0), "size=0, must be in"),
        (dict(images=images[:, :, :, :0]), "width=0"),
    ):
        with pytest.raises(ValueError, match=said):
            launch(**wrong)


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


@pytest.mark.parametrize("make", [strong_view, weak_view])
def test_autocast_does_not_touch_the_pixels(make):
    images = make_shapes(4).images
    view = lambda: make(images, 16, MEAN, STD, torch.Generator().manual_seed(4))  # noqa: E731
    expected = view()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(view(), expected)


def test_without_the_compiled_module_pytorch_makes_the_views(monkeypatch):
    images = make_shapes(4).images
    view = lambda **o: strong_view(images, 16, MEAN, STD, torch.Generator().manual_seed(4), **o)  # noqa: E731
    cpu = torch.device("cpu")
    assert fused.kernel_for(images) is compiled
    assert fused.kernel_missing(cpu) is None
    assert fused.kernel_missing(torch.device("meta")) == "needs a CPU or a CUDA device"
    assert fused.describe_kernel(cpu) == f"by the compiled kernel ({_C.isa()})"
    assert fused.describe_kernel(cpu, False) == "by PyTorch, as asked for"
    by_pytorch = view(kernel=False)
    assert not torch.equal(view(), by_pytorch)
    reason = "needs softcl._C, which is not built"
    monkeypatch.setattr(compiled, "load", lambda: (None, reason))
    assert torch.equal(view(), by_pytorch)
    assert fused.describe_kernel(cpu) == f"by PyTorch (the kernel {reason})"
    with pytest.raises(RuntimeError, match="the views' kernel needs softcl._C"):
        view(kernel=True)


@pytest.mark.parametrize("isa", _C.available_isas())
def test_all_of_this_on_each_instruction_set(isa):
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
