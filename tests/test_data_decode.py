"""Image files of every mode, depth and orientation become the same upright RGB pixels."""

from __future__ import annotations

import numpy as np
import pytest

from softcl.data.decode import decode, probe
from softcl.data.depth import USUAL, scale_of

Image = pytest.importorskip("PIL.Image")

HEIGHT, WIDTH = 8, 12
RGB = (np.indices((HEIGHT, WIDTH, 3)).sum(0) * 9 % 256).astype(np.uint8)
GRAY = (np.indices((HEIGHT, WIDTH)).sum(0) * 13 % 256).astype(np.uint8)
DARK = np.full((HEIGHT, WIDTH), 200)
ALPHA = np.where(np.arange(WIDTH) < 6, 0, 255).astype(np.uint8) + np.zeros_like(GRAY)
PALETTE = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE, colors=200)
NOT_A_NUMBER = np.where(GRAY == GRAY[0, 0], np.nan, GRAY).astype(np.float32)


def read(path, height=HEIGHT, width=WIDTH) -> np.ndarray:
    """The file as a set of its own."""
    found = probe(path)
    scale = USUAL if found.largest is None else scale_of({found.floating: found.largest})[0]
    pixels = decode(path, height, width, scale)
    assert pixels.shape == (3, height, width) and pixels.dtype == np.uint8
    return pixels.transpose(1, 2, 0)


def over_white(pixels: np.ndarray) -> np.ndarray:
    return np.where(ALPHA[..., None] > 0, pixels, 255)


@pytest.mark.parametrize(
    ("suffix", "picture", "expected"),
    [
        ("png", RGB, RGB),
        ("png", GRAY, GRAY),
        ("png", GRAY > 100, 255 * (GRAY > 100)),
        ("gif", PALETTE, np.asarray(PALETTE.convert("RGB"))),
        ("png", np.dstack([RGB, ALPHA]), over_white(RGB)),
        ("png", np.dstack([GRAY, ALPHA]), over_white(GRAY[..., None])),
        ("png", GRAY.astype(np.uint16) * 257, GRAY),
        ("tif", GRAY.astype(np.uint16) * 257, GRAY),
        ("png", DARK.astype(np.uint16), DARK),  # 8 bits suffice: 200 of 255
        ("tif", DARK.astype(np.uint16) * 16, DARK * 16 * 255 // 4095),  # 12 bits
        ("tif", DARK.astype(np.float32) / 250, DARK * 0 + 204),  # 0.8 of 1: it is not stretched
        ("tif", GRAY.astype(np.int32), GRAY),
        ("tif", GRAY.astype(np.int32) * 257, GRAY),
        ("tif", GRAY.astype(np.float32) / 255, GRAY),
        ("tif", NOT_A_NUMBER, np.nan_to_num(NOT_A_NUMBER)),
    ],
)
def test_modes(tmp_path, suffix, picture, expected):
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(tmp_path / f"x.{suffix}")
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert (read(tmp_path / f"x.{suffix}") == expected).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    upright[:4, :6] = 255  # the top left quarter is white
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / ("x.png" if orientation % 2 else "x.jpg")
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=100)
    assert probe(path)[:2] == (HEIGHT, WIDTH)
    assert np.abs(read(path).astype(int) - upright).max() < 60  # JPEG, at the edges


def test_damaged_exif_counts_as_none(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "x.jpg", exif=b"Exif\x00\x00garbage", quality=100)
    read(tmp_path / "x.jpg")


def test_a_large_jpeg_is_resized_like_the_full_one(tmp_path):
    # The decoder may skip detail that the resize discards; a smooth image shows any shift.
    x, y = np.meshgrid(np.linspace(0, 6, 640), np.linspace(0, 4, 480))
    smooth = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=2) * 100 + 128
    picture = Image.fromarray(smooth.astype(np.uint8))
    picture.save(tmp_path / "x.jpg", quality=95)
    picture.save(tmp_path / "x.png")
    jpeg, png = (read(tmp_path / name, 32, 32).astype(int) for name in ("x.jpg", "x.png"))
    assert np.abs(jpeg - png).max() <= 3


def test_resize_takes_the_largest_centered_part(tmp_path):
    picture = Image.fromarray(RGB)
    picture.save(tmp_path / "x.png")
    whole = np.asarray(picture.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.BILINEAR))
    assert (read(tmp_path / "x.png", 4, 4) == whole[:, 1:5]).all()


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_not_an_image_raises(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(Exception, match=r".+"):
        decode(tmp_path / "x.png", 4, 4)
