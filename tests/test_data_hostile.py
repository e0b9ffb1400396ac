"""Files made to do harm: each is refused in one line, or read as what it is."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import tracemalloc
import warnings

import numpy as np
import pytest

from softcl.data import DataError, load_dataset
from softcl.data.arrays import load_pickle

Image = pytest.importorskip("PIL.Image")


# --------------------------------------------------------------------------------------- pickles


class Reduced:
    """What pickle writes as a call, and the state that is given to its result."""

    def __init__(self, *parts) -> None:
        self.parts = parts

    def __reduce__(self):
        return self.parts


def array_of(word: str, data: bytes, flags: int = 0, shape: tuple = (1,)) -> Reduced:
    """An array as numpy pickles it, of any type and with any flags."""
    make, (kind, _, name), _ = np.zeros(0, np.uint8).__reduce__()
    dtype = Reduced(np.dtype, (word, False, True), (3, "|", None, None, None, -1, -1, flags))
    return Reduced(make, (kind, (0,), name), (1, shape, dtype, False, data))


@pytest.mark.parametrize(
    "content, words",
    [
        # numpy would take the eight bytes for the address of an object.
        (array_of("O8", struct.pack("<Q", 0x4141414141414141)), "of type 'O8', not of integers"),
        (array_of("V8", bytes(8), flags=0x3F), "of type 'V8'"),
        (array_of("u1", b"x", shape=(1 << 60,)), "cannot reshape"),
        (array_of("u1", [1]), "not made of bytes"),
    ],
)
def test_pickled_arrays_hold_integers_alone(tmp_path, content, words):
    file = tmp_path / "data_batch_1"
    file.write_bytes(pickle.dumps({b"data": content, b"labels": [0]}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_1: cannot unpickle: .+") as error:
        load_pickle(file)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"\x80\x02Nr\xff\xff\xff\x0f.", "holds a NoneType"),  # at a place in a memo of 4 GiB
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".", "cannot unpickle"),
        (
            b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x04\x00\x00\x00zlibtR.",
            "in the encoding 'zlib'",
        ),
        (b"(" * 100_000 + b"t" * 100_000 + b".", "holds a tuple"),
    ],
)
def test_pickles_cannot_ask_for_memory(tmp_path, data, words):
    (tmp_path / "meta").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="meta: ") as error:
            load_pickle(tmp_path / "meta")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert words in str(error.value) and most < 1 << 28


def test_pickled_arrays_are_numpys(tmp_path):
    values = {b"a": np.arange(6, dtype=np.uint8).reshape(2, 3), b"b": np.arange(3)}
    values[b"f"] = np.asfortranarray(values[b"a"])
    for protocol in (2, 4):
        (tmp_path / "meta").write_bytes(pickle.dumps(values, protocol=protocol))
        for name, array in load_pickle(tmp_path / "meta").items():
            assert array.dtype == values[name].dtype and np.array_equal(array, values[name])


# ------------------------------------------------------------------------------------------- tar


def png() -> bytes:
    stream = io.BytesIO()
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def member(name: str, data: bytes = b"", **fields) -> bytes:
    """A header and its data; the fields as they are written, whatever they say."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def pax(**records: str) -> bytes:
    """A pax header for the member after it."""
    lines = b""
    for key, value in records.items():
        body = f" {key.replace('_', '.')}={value}\n".encode()
        length = len(body)
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        lines += str(length).encode() + body
    return member("pax", lines, type=tarfile.XHDTYPE)


HOSTILE = {
    "a negative size": pax(size="-1024") + member("b.png", png()),
    "a huge size": pax(size=str(1 << 70)) + member("b.png", png()),
    "a size that is none": pax(size="many") + member("b.png", png()),
    "a sparse file of petabytes": pax(
        GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize=str(1 << 50)
    )
    + member("b.cls", b"1\n0\n1\n".ljust(512, b"\0")),
    "a sparse map that is none": pax(GNU_sparse_map="0,-1,x") + member("b.png", png()),
    "3,000 headers": b"".join(
        member("././@LongLink", b"name\0", type=tarfile.GNUTYPE_LONGNAME) for _ in range(3000)
    ),
    "3,000 pax headers": pax(path="x") * 3000,
    "a label of gigabytes": member("b.cls", b"1", size=1 << 34),
    "a label of many digits": member("a.cls", b"9" * 100_000),
    "deep json": member("a.json", b'{"label": ' + b"[" * 100_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tar_members(tmp_path, name, capfd):
    """Before, after and beside a good image: that one is read, or the shard refused in one line."""
    good = member("a.png", png())
    for order in (HOSTILE[name] + good, good + HOSTILE[name]):
        (tmp_path / "x.tar").write_bytes(order + bytes(1024))
        try:
            images = load_dataset(str(tmp_path), "all")
        except DataError as error:
            message = str(error)
            assert "\n" not in message and "x.tar" in message and len(message) < 500
        else:
            assert images.images[0, :, 0, 0].tolist() == [0, 1, 2]
        assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------- images


def test_libtiff_and_pillow_say_nothing(tmp_path, capfd):
    for number in range(250):
        (tmp_path / f"{number}.png").write_bytes(png())
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "TIFF", compression="tiff_adobe_deflate")
    data = stream.getvalue()
    (tmp_path / "cut.tif").write_bytes(data[:-20])  # in its directory, which comes last
    (tmp_path / "damaged.tif").write_bytes(data[:8] + b"\xa5" * 60 + data[68:])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        images = load_dataset(str(tmp_path), "all")
    assert len(images) == 250 and len(images.skipped) == 2
    assert not heard and capfd.readouterr() == ("", "")
