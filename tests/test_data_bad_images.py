"""Unusual and damaged image files are handled as docs/images.md says, all in one table."""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from softcl.data import load_dataset

Image = pytest.importorskip("PIL.Image")

TABLE = Path(__file__).resolve().parents[1] / "docs" / "images.md"
SIDE = 8
COLOR = (200, 120, 40)
BAD = "a/050.png"  # of class a, whose next image is 051


def plain(size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    return Image.new("RGB", size, COLOR)


def noise() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Each writes a file, and returns what it must be read as, in the middle of each quarter; or None.


def truncated(path: Path) -> None:
    noise().save(path, "JPEG")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damaged(path: Path) -> None:
    smooth = np.indices((64, 64, 3)).sum(0).astype(np.uint8)
    Image.fromarray(smooth).save(path, "PNG")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = b"\xff" * 16
    path.write_bytes(data)


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("<!DOCTYPE html><title>404 Not Found</title>\n" * 40)


def program(path: Path) -> None:
    plain().save(path, "EPS")


def huge(path: Path) -> None:
    """A whole PNG but for its pixels: a header that asks for 14 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 69_000, 69_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def no_permission(path: Path) -> None:
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("needs a user with limits")
    plain().save(path)
    path.chmod(0)


def wrong_suffix(path: Path):
    plain().save(path, "JPEG", quality=100)
    return [COLOR] * 4


def cmyk(path: Path):
    plain().convert("CMYK").save(path, "TIFF")
    return [COLOR] * 4


def sixteen_bits(path: Path):
    Image.fromarray(np.full((SIDE, SIDE), 200 * 257, dtype=np.uint16)).save(path, "PNG")
    return [(200, 200, 200)] * 4


def palette_with_alpha(path: Path):
    indices = np.zeros((SIDE, SIDE), dtype=np.uint8)
    indices[: SIDE // 2] = 1
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette([10, 20, 30, *COLOR])
    picture.save(path, "PNG", transparency=0)
    return [COLOR, COLOR, (255, 255, 255), (255, 255, 255)]


def animated(path: Path):
    frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ((0, 0, 0), (255, 255, 255))]
    plain().save(path, "GIF", save_all=True, append_images=frames, duration=50, loop=0)
    assert Image.open(path).n_frames == 3
    return [COLOR] * 4


def exif_rotated(path: Path):
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[: SIDE // 2, : SIDE // 2] = 255  # stored with the white quarter on the top left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right by a quarter
    Image.fromarray(pixels).save(path, "PNG", exif=exif)
    return [(0, 0, 0), (255, 255, 255), (0, 0, 0), (0, 0, 0)]


def one_pixel(path: Path):
    plain((1, 1)).save(path)
    return [COLOR] * 4


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere.png")


def folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("no image")


SKIPPED = (truncated, damaged, zero_bytes, text, program, huge, no_permission)
READ = (wrong_suffix, cmyk, sixteen_bits, palette_with_alpha, animated, exif_rotated, one_pixel)
IGNORED = (dangling_link, folder)
NAMES = {"cmyk": "CMYK", "sixteen_bits": "16 bits", "exif_rotated": "EXIF rotated"}


def name_of(write) -> str:
    return NAMES.get(write.__name__, write.__name__.replace("_", " "))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """149 grey images of two classes, all different; a/050.png is missing."""
    root = tmp_path_factory.mktemp("images")
    for label in "ab":
        (root / label).mkdir()
        for number in range(75):
            if f"{label}/{number:03d}.png" != BAD:
                color = (number,) * 3 if label == "a" else (100 + number,) * 3
                Image.new("RGB", (SIDE, SIDE), color).save(root / label / f"{number:03d}.png")
    return root


@pytest.fixture
def bad(good: Path):
    """Where a test puts its file; it is removed afterwards."""
    path = good / BAD
    yield path
    if path.is_dir():
        (path / "notes.txt").unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def quarters(image: torch.Tensor) -> list[tuple[int, ...]]:
    """The pixels in the middle of the four quarters, row by row."""
    near, far = SIDE // 4, 3 * SIDE // 4
    return [tuple(image[:, y, x].tolist()) for y in (near, far) for x in (near, far)]


@pytest.mark.parametrize("write", [*SKIPPED, *READ, *IGNORED], ids=name_of)
def test_as_documented(good: Path, bad: Path, write):
    expected = write(bad)
    resident = load_dataset(str(good), "all", image_size=SIDE)
    lazy = load_dataset(str(good), "all", image_size=SIDE, memory_limit=0, workers=2)
    at_its_place = lazy.batch(torch.tensor([50]))[0]
    if write in READ:
        assert len(resident) == len(lazy) == 150 and not resident.skipped and not lazy.skipped
        for image in (resident.images[50], at_its_place):
            for got, wanted in zip(quarters(image), expected, strict=True):
                assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= 2, got
        return
    assert len(resident) == 149 and (at_its_place == 51).all()
    assert resident.images[50, 0, 0, 0] == 51 and resident.labels.tolist() == [0] * 74 + [1] * 75
    if write in IGNORED:
        assert len(lazy) == 149 and not resident.skipped and not lazy.skipped
    else:
        assert len(lazy) == 150
        for images in (resident, lazy):
            (line,) = images.skipped
            assert re.match(rf"{BAD}: \w+(Error|Exception)?(: .+)?$", line), line
            assert "1 unreadable skipped" in images.describe()


def test_the_documented_table_is_the_tested_one():
    rows = re.findall(r"^\| ([\w ]+?) \| (\w+) \|", TABLE.read_text(), re.MULTILINE)
    outcomes = ((SKIPPED, "skipped"), (READ, "read"), (IGNORED, "ignored"))
    tested = [(name_of(write), outcome) for group, outcome in outcomes for write in group]
    assert rows[1:] == tested and len(tested) >= 12
