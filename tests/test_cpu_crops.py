"""The compiled kernel of the crops against its filter's definition, in float64."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

_C = pytest.importorskip("softcl._C", reason="softcl._C is not built")
Image = pytest.importorskip("PIL.Image")

from softcl import native  # noqa: E402
from softcl.data.crops import Box, _by_pillow, cut_boxes  # noqa: E402

# Half a level is the rounding at the end; the rest is that of the line and of the weights. The
# largest that was seen with up to 32 inputs of an output is 0.507, with 700 of them 0.64.
NARROW, WIDE = 0.52, 0.75


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    chooser = np.random.default_rng(seed)
    return Image.fromarray(chooser.integers(0, 256, (height, width, 3), dtype=np.uint8))


def kernel(image: Image.Image, boxes, sizes) -> list[np.ndarray]:
    results = [np.full((3, *size), 77, np.uint8) for size in sizes]
    cut_boxes(image, [Box(*box) for box in boxes], results)
    return results


def matrix(start: float, length: float, size: int, full: int) -> np.ndarray:
    """Weights (size, full) of one axis, as crops.h defines them."""
    middles = np.arange(full) + 0.5
    centres = start + (np.arange(size) + 0.5) * length / size
    weights = np.maximum(0, 1 - abs(middles - centres[:, None]) / max(length / size, 1))
    weights[:, (middles < np.floor(start)) | (middles > np.ceil(start + length))] = 0
    return weights / weights.sum(1, keepdims=True)


def oracle(image: Image.Image, box, size) -> np.ndarray:
    rows = matrix(box[0], box[2], size[0], image.height)
    columns = matrix(box[1], box[3], size[1], image.width)
    pixels = np.asarray(image).astype(float)
    return np.einsum("yh,hwc,xw->cyx", rows, pixels, columns, optimize=True)


def assert_is_the_oracles(image: Image.Image, boxes, sizes, tolerance: float = NARROW) -> None:
    for box, size, found in zip(boxes, sizes, kernel(image, boxes, sizes), strict=True):
        difference = np.abs(found - oracle(image, box, size))
        assert difference.max() <= tolerance, (box, size, difference.max())


@pytest.mark.parametrize(
    ("height", "width"),
    [(375, 500), (224, 224), (1, 1), (1, 9), (9, 1), (3, 5), (33, 31), (16, 17)],
)
@pytest.mark.parametrize("size", [(224, 224), (32, 32), (1, 1), (7, 13), (30, 9), (5, 66)])
def test_every_part_of_an_image(height, width, size):
    if max(height / size[0], width / size[1]) > 16:
        size = (24, 33)
    boxes = [
        (0, 0, height, width),
        (height - 1, width - 1, 1, 1),
        (height // 2, 0, height - height // 2, width),
        (0, width // 3, height, width - width // 3),
        (0.3 * height, 0.27 * width, 0.41 * height, 0.62 * width),
        (0, 0.5 * width, 0.2 * height, 0.5 * width),
    ]
    assert_is_the_oracles(noise(height, width), boxes, [size] * len(boxes))


@pytest.mark.parametrize("width", range(1, 40))
def test_every_width_and_place_of_a_vector(width):
    """The last bytes of the image are those of the box: the kernel must not read on."""
    boxes = [(0, left, 11, width - left) for left in range(min(width, 5))]
    assert_is_the_oracles(noise(11, width), boxes, [(8, width % 9 + 1)] * len(boxes))


@pytest.mark.parametrize(("height", "width"), [(5, 9001), (8000, 3), (1500, 2300)])
def test_a_wide_filter_stays_within_a_level(height, width):
    for seed in range(2):
        image = noise(height, width, seed)
        assert_is_the_oracles(image, [(0, 0, height, width)] * 2, [(25, 26), (224, 24)], WIDE)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
def test_one_value_stays_so(value):
    image = Image.new("RGB", (131, 977), (value, 255 - value, value))
    expected = np.array([value, 255 - value, value])[:, None, None]
    sizes = [(224, 224), (3, 5), (1, 1), (977, 131)]
    boxes = [(0, 0, 977, 131), (3.3, 7.7, 900.1, 99.9), (976, 130, 1, 1), (0, 0, 977, 131)]
    for found in kernel(image, boxes, sizes):
        assert (found == expected).all()


def test_a_part_of_the_same_size_keeps_its_pixels():
    image = noise(45, 67)
    (found,) = kernel(image, [(3, 5, 40, 60)], [(40, 60)])
    assert (found == np.asarray(image)[3:43, 5:65].transpose(2, 0, 1)).all()


@pytest.mark.parametrize("size", [(224, 224), (64, 48)])
def test_pillows_and_torchs_pixels_are_near(size):
    image = noise(375, 500)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    for box in ((0, 0, 375, 500), (50, 70, 300, 250), (11, 33, 100, 130)):
        (found,) = kernel(image, [box], [size])
        top, left, height, width = box
        part = pixels[..., top : top + height, left : left + width].contiguous()
        options = dict(mode="bilinear", antialias=True, align_corners=False)
        by_torch = torch.nn.functional.interpolate(part, size, **options)[0].numpy()
        for other in (by_torch, _by_pillow(image, Box(*box), size)):
            difference = np.abs(found - other.astype(int))
            assert difference.max() <= 1 and difference.mean() <= 0.25


def test_without_the_module_pillow_cuts(monkeypatch):
    image, box = noise(80, 90), (10.5, 20.25, 60, 50)
    (by_kernel,) = kernel(image, [box], [(32, 32)])
    monkeypatch.setattr(native, "load_for_cpu", lambda: (None, "softcl._C is not built"))
    (found,) = kernel(image, [box], [(32, 32)])
    assert np.array_equal(found, _by_pillow(image, Box(*box), (32, 32)))
    difference = np.abs(found - by_kernel.astype(int))
    assert 0 < difference.max() <= 1


def test_an_image_in_several_pieces_of_memory_is_cut_too():
    """Pillow keeps at most 16 MB in one, and hands out no others."""
    image = Image.new("RGB", (2100, 2100))
    image.paste(noise(50, 60), (2040, 2050))
    with pytest.raises(ValueError, match=r".+"):
        image.__arrow_c_array__()
    assert_is_the_oracles(image, [(2045, 2030, 55, 70)], [(32, 32)])


def test_threads_change_nothing():
    image, boxes = noise(200, 300), [(3, 5, 150, 170), (20.5, 40, 100, 250)]
    sizes = [(64, 64), (33, 31)]
    expected = kernel(image, boxes, sizes)
    found = [None] * 8

    def work(i: int) -> None:
        found[i] = [kernel(image, boxes, sizes) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for made in (results for several in found for results in several):
        assert all(map(np.array_equal, made, expected))


def test_only_the_result_is_written():
    """Odd sizes end within a vector: what lies behind belongs to another image."""
    image = noise(40, 50)
    for size in ((1, 1), (3, 7), (5, 9), (8, 16), (2, 31)):
        around = np.full(3 * size[0] * size[1] + 128, 7, np.uint8)
        result = around[64:-64].reshape(3, *size)
        cut_boxes(image, [Box(2, 3, 30, 40)], [result])
        assert (around[:64] == 7).all() and (around[-64:] == 7).all()
        assert np.array_equal(result, kernel(image, [(2, 3, 30, 40)], [size])[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(pixels=0), "pixels is a null pointer"),
        (dict(height=0), "height=0, must be in"),
        (dict(width=-3), "width=-3, must be in"),
        (dict(box=(-1, 0, 4, 4)), "top=-1, must be in"),
        (dict(box=(0, float("nan"), 4, 4)), "left=nan, must be in"),
        (dict(box=(5, 0, 4, 4)), r"height of a box=4, must be in \[0.001, 3\]"),
        (dict(box=(0, 0, 4, 0)), "width of a box=0"),
        (dict(size=(0, 4)), "rows=0"),
        (dict(size=(4, 1 << 20)), "columns=1048576"),
        (dict(result=0), "result is a null pointer"),
    ],
)
def test_what_is_out_of_range_is_named(change, said):
    pixels, result = np.zeros((8, 8, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)
    good = dict(
        pixels=pixels.ctypes.data, height=8, width=8,
        box=(0, 0, 4, 4), size=(4, 4), result=result.ctypes.data,
    )  # fmt: skip

    def call(pixels, height, width, box, size, result):
        boxes = [(*box, *size, result)]
        _C.cpu_crops(pixels=pixels, height=height, width=width, boxes=boxes)

    call(**good)
    with pytest.raises(ValueError, match=said):
        call(**(good | change))


def test_what_is_no_list_of_bytes_is_refused():
    _, grey = Image.new("L", (4, 4)).__arrow_c_array__()
    schema, capsule = Image.new("RGB", (4, 4)).__arrow_c_array__()
    assert _C.arrow_bytes(capsule, 64) != 0
    for other, count in ((grey, 16), (capsule, 63), (schema, 64)):
        with pytest.raises(ValueError, match=r"capsule|Capsule"):
            _C.arrow_bytes(other, count)


def bits() -> str:
    """A digest of crops at every place of a vector, and of some of the usual size."""
    found = hashlib.sha256()
    for width in range(1, 40):
        for crop in kernel(noise(9, width), [(0, 0, 9, width)] * 2, [(7, width), (4, 11)]):
            found.update(crop)
    boxes = [(3, 5, 300, 500), (0, 0, 333, 517), (9.5, 8.25, 99, 77)]
    for size in ((224, 224), (17, 19), (400, 397)):
        for crop in kernel(noise(333, 517), boxes, [size] * len(boxes)):
            found.update(crop)
    return found.hexdigest()


@pytest.mark.parametrize("isa", [isa for isa in _C.available_isas() if isa != _C.isa()])
def test_every_instruction_set_gives_the_same_bits(isa):
    code = "from softcl import native; from test_cpu_crops import bits"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(native.load()[0].isa(), bits())"],
        env={**os.environ, "SOFTCL_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa, bits()]
