"""Random crops of whole image files: every part is seen, and by whom it was cut changes nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from run_comparison import assert_same_run

from softcl import native
from softcl.data import DataError, ImageSet, load_dataset, sets, views
from softcl.data.crops import Box
from softcl.data.decode import decode_crops
from softcl.data.image_set import CropOrder, Cut
from softcl.data.recipe import CROP_COLUMNS, RECIPE, Recipe
from softcl.distributed import World
from softcl.methods import ASCL
from softcl.train.__main__ import main
from softcl.train.folder import read_metrics
from softcl.train.images import build_views, crop_order

Image = pytest.importorskip("PIL.Image")

HEIGHT, WIDTH = 40, 120


def ramp(height: int = HEIGHT, width: int = WIDTH, blue: int = 0) -> np.ndarray:
    """Red tells the column, green the row."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    pixels[..., 2] = blue
    return pixels


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two classes of 20 wide images, told apart by their blue."""
    root = tmp_path_factory.mktemp("wide")
    for label in range(2):
        for split, count in (("train", 20), ("test", 4)):
            path = root / split / f"class{label}"
            path.mkdir(parents=True)
            for number in range(count):
                blue = 10 * number + label
                Image.fromarray(ramp(blue=blue)).save(path / f"{number:02d}.png")
    return root


def load(wide, **options) -> ImageSet:
    return load_dataset(str(wide), "train", image_size=16, **options)


def cut(count: int, side: int = 16, seed: int = 0, recipe: Recipe = RECIPE) -> Cut:
    generator = torch.Generator().manual_seed(seed)
    return Cut(side, recipe, torch.rand((count, CROP_COLUMNS), generator=generator))


def test_crops_reach_every_corner_of_a_wide_image(wide):
    """A centred square of these images has columns 40 to 80: red from 85 to 170."""
    images = load(wide)
    small = Recipe(scale=(0.02, 0.1))
    indices = torch.arange(40).repeat(10)
    crops = images.read(CropOrder(indices, {"view": cut(400, recipe=small)}))["view"]
    assert crops.shape == (400, 3, 16, 16) and crops.dtype == torch.uint8
    middle = crops.float().mean((2, 3))  # (400, 3)
    for channel in (0, 1):
        assert middle[:, channel].min() < 45 and middle[:, channel].max() > 210
    assert torch.equal(crops[:, 2, 0, 0].long(), 10 * (indices % 20) + indices // 20)
    assert int(images.images[:, 0].min()) > 80  # what is stored for the evaluation


def test_pixels_are_those_of_torchvision():
    functional = pytest.importorskip("torchvision.transforms.functional")
    chooser = np.random.default_rng(0)
    image = Image.fromarray(chooser.integers(0, 256, (90, 70, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    boxes = [Box(0, 0, 90, 70), Box(11, 7, 50, 60), Box(60, 50, 9, 13)]
    results = [np.empty((3, side, side), np.uint8) for side in (32, 32, 24)]
    file.seek(0)
    decode_crops(file, lambda *_: boxes, results)
    for box, pixels in zip(boxes, results, strict=True):
        size = list(pixels.shape[1:])
        expected = functional.resized_crop(image, *box, size, antialias=True)
        difference = np.abs(pixels - np.asarray(expected).transpose(2, 0, 1).astype(int))
        most = (0, 0) if native.load_for_cpu()[0] is None else (1, 0.25)
        assert difference.max() <= most[0] and difference.mean() <= most[1]


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_a_fraction(orientation):
    """Turned or not, the crop is nearly that of the whole file."""
    smooth = Image.fromarray(ramp(64, 96)).resize((1536, 1024), Image.Resampling.BICUBIC)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    smooth.save(file, "JPEG", quality=95, exif=exif)
    pixels = np.empty((3, 32, 32), np.uint8)
    seen = []
    file.seek(0)
    decode_crops(file, lambda *size: seen.append(size) or [Box(100, 200, 700, 500)], [pixels])
    upright = smooth if orientation == 1 else smooth.transpose(Image.Transpose.ROTATE_270)
    assert seen == [(upright.height, upright.width)]
    part = upright.crop((200, 100, 700, 800)).resize((32, 32), Image.Resampling.BILINEAR)
    expected = np.asarray(part).transpose(2, 0, 1).astype(float)
    assert abs(pixels - expected)[:2].max() <= 4 and abs(pixels - expected)[:2].mean() <= 1


@pytest.mark.parametrize(("workers", "memory_limit"), [(0, 0), (1, None), (5, 0)])
def test_threads_and_storage_change_nothing(wide, workers, memory_limit):
    indices = torch.tensor([3, 39, 0, 3])
    order = CropOrder(indices, {"a": cut(4), "b": cut(4, side=9, seed=1)})
    expected = load(wide).read(order)
    found = load(wide, workers=workers, memory_limit=memory_limit).read(order)
    assert list(found) == ["a", "b"] and found["b"].shape == (4, 3, 9, 9)
    for name in found:
        assert torch.equal(found[name], expected[name])
    assert not torch.equal(found["a"][0], found["a"][3])  # one image, two boxes


def test_small_images_of_one_size_are_kept_whole(folder):
    images = load_dataset(str(folder), "train")
    assert images.files is None and images.size == (16, 16)


def test_an_unreadable_file_is_replaced_by_its_neighbor(wide, tmp_path, monkeypatch):
    monkeypatch.setattr("softcl.data.decode.UNREADABLE_LIMIT", 0.05)
    images = load(wide, memory_limit=0)
    path = wide / "train/class0/07.png"
    content = path.read_bytes()
    try:
        path.write_bytes(b"junk")
        crops = images.read(CropOrder(torch.tensor([7]), {"a": cut(1)}))["a"]
    finally:
        path.write_bytes(content)
    assert int(crops[0, 2, 0, 0]) == 80 and "07.png" in images.skipped[0]
    (wide / "train/class0/08.png").rename(tmp_path / "08.png")
    try:
        monkeypatch.setattr("softcl.data.decode.UNREADABLE_LIMIT", 0.025)
        with pytest.raises(DataError, match="2 of 40 images cannot be read .* No such file"):
            images.read(CropOrder(torch.tensor([8]), {"a": cut(1)}))
    finally:
        (tmp_path / "08.png").rename(wide / "train/class0/08.png")


def test_processes_share_the_boxes_of_the_whole(wide):
    images, indices = load(wide), torch.arange(12)
    views = build_views(ASCL(), images, 16)
    whole = crop_order(indices, views, seed=5, step=3)
    assert list(whole.cuts) == list(ASCL().views())
    for size, rank in ((2, 0), (2, 1), (3, 2)):
        part = crop_order(indices[rank::size], views, 5, 3, World(rank, size))
        for name in whole.cuts:
            assert torch.equal(part.cuts[name].numbers, whole.cuts[name].numbers[rank::size])
    other = crop_order(indices, views, seed=5, step=4)
    first, second = (order.cuts["query"].numbers for order in (whole, other))
    assert not torch.equal(first, second)
    assert not torch.equal(first, whole.cuts["key"].numbers)


@pytest.fixture
def wide_flags(wide, flags) -> list[str]:
    """The usual run on the wide images, of 2 epochs of 5 steps."""
    return [*flags, "--data", str(wide), "--image-size", "16", "--batch-size", "8", "--knn-k", "5"]


def test_a_run_does_not_depend_on_workers_nor_interruption(
    wide_flags, tmp_path, monkeypatch, capsys
):
    assert main([*wide_flags, "--workers", "2", "--out", "whole"]) == 0
    assert "crops of the whole files" in capsys.readouterr().out
    monkeypatch.setattr(sets, "_default_memory_limit", lambda: 0)
    assert main([*wide_flags, "--workers", "0", "--out", "parts", "--max-steps", "3"]) == 0
    for step in ("4", "7", "10"):
        assert main(["--resume", "parts", "--workers", "2", "--max-steps", step]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_centred_squares_are_used_where_they_are_asked_for(wide_flags, tmp_path, capsys):
    flags = [*wide_flags, "--max-steps", "2", "--log-every", "1", "--show-views", "2"]
    losses = {}
    for name, more in (("whole", []), ("squares", ["--no-whole-images"])):
        assert main([*flags, *more, "--out", name]) == 0
        said = "crops of the whole files" in capsys.readouterr().out
        assert said == (name == "whole")
        assert (tmp_path / name / "views.png").exists()
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [row["loss"] for row in rows if "loss" in row]
    assert losses["whole"] != losses["squares"]


def test_the_kernel_of_the_views_can_be_demanded_or_left(wide_flags, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def made(*flags: str) -> str:
        assert main([*wide_flags, *flags, "--dry-run"]) == 0
        return json.loads(capsys.readouterr().out)["views"]

    assert made("--no-view-kernel") == "by PyTorch, as asked for"
    if native.load()[0] is not None:
        assert made() == made("--view-kernel")
        assert made().startswith("by the compiled kernel (")
    monkeypatch.setattr(native, "load_for_cpu", lambda: (None, "softcl._C is not built"))
    assert made() == "by PyTorch (the kernel does not run: softcl._C is not built)"
    assert main([*wide_flags, "--view-kernel", "--dry-run"]) == 2
    assert "--view-kernel: does not run: softcl._C is not built" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--no-view-kernel"]])
def test_a_run_says_what_makes_its_views(wide_flags, capsys, monkeypatch, extra):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([*wide_flags, *extra, "--out", "said", "--max-steps", "1"]) == 0
    wanted = False if extra else None
    words = views.describe_kernel(torch.device("cpu"), wanted)
    assert f"views      {words}\n" in capsys.readouterr().out
    assert json.loads(Path("said/config.json").read_text())["views"] == words
