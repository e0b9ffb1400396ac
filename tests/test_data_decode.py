"""Image files of every mode, depth and orientation become the same upright RGB pixels."""

from __future__ import annotations

import numpy as np
import pytest

from softcl.data.decode import decode, image_size

Image = pytest.importorskip("PIL.Image")

HEIGHT, WIDTH = 8, 12
RGB = (np.indices((HEIGHT, WIDTH, 3)).sum(0) * 9 % 256).astype(np.uint8)
GRAY = (np.indices((HEIGHT, WIDTH)).sum(0) * 13 % 256).astype(np.uint8)


def read(path, height=HEIGHT, width=WIDTH) -> np.ndarray:
    pixels = decode(path, height, width)
    assert pixels.shape == (3, height, width) and pixels.dtype == np.uint8
    return pixels.transpose(1, 2, 0)


def test_rgb(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "x.png")
    assert (read(tmp_path / "x.png") == RGB).all()


def test_gray(tmp_path):
    Image.fromarray(GRAY).save(tmp_path / "x.png")
    assert (read(tmp_path / "x.png") == GRAY[..., None]).all()


def test_one_bit(tmp_path):
    bits = GRAY > 100
    Image.fromarray(bits).save(tmp_path / "x.png")
    assert (read(tmp_path / "x.png") == 255 * bits[..., None]).all()


def test_palette(tmp_path):
    picture = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE, colors=200)
    picture.save(tmp_path / "x.gif")
    assert (read(tmp_path / "x.gif") == np.asarray(picture.convert("RGB"))).all()


def test_transparency_lies_over_white(tmp_path):
    alpha = np.zeros((HEIGHT, WIDTH, 1), dtype=np.uint8)
    alpha[:, 6:] = 255
    Image.fromarray(np.concatenate([RGB, alpha], axis=2)).save(tmp_path / "x.png")
    pixels = read(tmp_path / "x.png")
    assert (pixels[:, :6] == 255).all() and (pixels[:, 6:] == RGB[:, 6:]).all()

    Image.fromarray(np.dstack([GRAY, alpha[..., 0]])).save(tmp_path / "la.png")
    pixels = read(tmp_path / "la.png")
    assert (pixels[:, :6] == 255).all() and (pixels[:, 6:] == GRAY[:, 6:, None]).all()


def test_transparent_palette_entry(tmp_path):
    picture = Image.fromarray((GRAY > 100).astype(np.uint8)).convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.save(tmp_path / "x.png", transparency=0)
    expected = np.where((GRAY > 100)[..., None], [40, 50, 60], [255, 255, 255])
    assert (read(tmp_path / "x.png") == expected).all()


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    smooth = np.broadcast_to(np.array([200, 120, 40], dtype=np.uint8), (HEIGHT, WIDTH, 3))
    Image.fromarray(np.ascontiguousarray(smooth)).convert("CMYK").save(tmp_path / f"x.{suffix}")
    difference = read(tmp_path / f"x.{suffix}").astype(int) - smooth
    assert np.abs(difference).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(tmp_path, suffix):
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / f"x.{suffix}")
    assert (read(tmp_path / f"x.{suffix}") == GRAY[..., None]).all()


def test_sixteen_bits_in_a_dark_image_are_not_stretched(tmp_path):
    Image.fromarray(np.full((HEIGHT, WIDTH), 200, dtype=np.uint16)).save(tmp_path / "x.png")
    assert (read(tmp_path / "x.png") == 1).all()  # 200 of 65535


def test_thirty_two_bits(tmp_path):
    Image.fromarray(GRAY.astype(np.int32)).save(tmp_path / "x.tif")
    assert (read(tmp_path / "x.tif") == GRAY[..., None]).all()
    Image.fromarray(GRAY.astype(np.int32) * 257).save(tmp_path / "y.tif")
    assert (read(tmp_path / "y.tif") == GRAY[..., None]).all()


def test_floating_point(tmp_path):
    Image.fromarray(GRAY.astype(np.float32) / 255).save(tmp_path / "x.tif")
    assert (read(tmp_path / "x.tif") == GRAY[..., None]).all()
    values = GRAY.astype(np.float32)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "y.tif")
    expected = GRAY.copy()
    expected[0, 0] = 0
    assert (read(tmp_path / "y.tif") == expected[..., None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation(tmp_path, orientation, suffix):
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
    picture = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    picture.save(path, exif=exif, quality=100)
    assert image_size(path) == (HEIGHT, WIDTH)
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
