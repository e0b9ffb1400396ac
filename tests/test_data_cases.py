"""Folders and files of images as people have them: what is read of each, and what is said."""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import struct
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from softcl.data import DataError, load_dataset, walk
from softcl.data.decode import _centre, decode
from softcl.train.__main__ import main
from softcl.train.config import TrainConfig
from softcl.train.images import load_images

Image = pytest.importorskip("PIL.Image")


def picture(number: int, side: int = 8) -> Image.Image:
    """Dark and light enough that it has a use, and different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(number: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, kind)
    return stream.getvalue()


def classes(root: Path, count: int = 2, names: tuple[str, ...] = ("cat", "dog")) -> None:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(100 * label + i).save(root / name / f"{i}.png")


def shard(path: Path, labels: list, start: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels, start):
            for suffix, data in (("png", encoded(number)), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def table(path: Path, labels: list, names: list[str] | None = None) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(number), "path": None} for number in range(len(labels))]
    rows = pyarrow.table({"image": images, "label": pyarrow.array(labels)})
    features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
    stored = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(rows.replace_schema_metadata(stored), path)


# ------------------------------------------------------------------------------- what can be read
# Each writes a set and returns what to name; then the numbers of images in train and test, the
# classes, and words of the notes.


def parts_in_any_case(root: Path) -> Path:
    classes(root / "Train", 3)
    classes(root / "VALIDATION", 1)
    return root


def parts_in_a_lone_folder(root: Path) -> Path:
    classes(root / "a" / "archive" / "train", 3)
    classes(root / "a" / "archive" / "test", 1)
    (root / "__MACOSX").mkdir()
    return root


def another_test_part(root: Path) -> Path:
    classes(root / "train", 3)
    classes(root / "val", 1)
    classes(root / "test", 2, ("unknown",))
    return root


def strange_class(root: Path) -> Path:
    classes(root / "train", 3)
    classes(root / "test", 1, ("cat", "cow"))
    return root


def folders_of_systems(root: Path) -> Path:
    classes(root, 2, ("cat", "dog", "@eaDir", "#recycle", "__MACOSX", ".ipynb_checkpoints"))
    (root / "Thumbs.db").write_bytes(b"")
    return root


def other_suffixes(root: Path) -> Path:
    classes(root, 2)
    for suffix, kind in (("jfif", "JPEG"), ("jp2", "JPEG2000"), ("tga", "TGA"), ("pcx", "PCX")):
        (root / "dog" / f"x.{suffix}").write_bytes(encoded(7, kind))
    for number in range(3):
        (root / "cat" / f"{number}.svg").write_text("<svg/>")
    return root


def odd_entries(root: Path) -> Path:
    classes(root, 2)
    (root / "loop").symlink_to(".")
    (root / "cat" / "up").symlink_to("../..")
    (root / "cat" / "gone.png").symlink_to("nowhere")
    os.mkfifo(root / "dog" / "fifo.png")
    return root


def twelve_bits(root: Path) -> Path:
    for number in range(4):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        top = 4080 if number % 2 else 2040
        ramp = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(ramp).save(folder / f"{number}.tif")
    return root


def floating(root: Path) -> Path:
    for number in range(4):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        top = 1.3 if number % 2 else 0.65
        ramp = np.linspace(0, top, 64).astype(np.float32).reshape(8, 8)
        Image.fromarray(ramp).save(folder / f"{number}.tif")
    return root


def few_levels(root: Path) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(root / name / "mask.png")
    return root


def csv_of_labels(root: Path) -> Path:
    classes(root / "train", 3, ("images",))
    text = "".join(f"images/{i}.png,{('cat', 'dog')[i % 2]}\n" for i in range(3))
    (root / "train" / "metadata.csv").write_text("file_name,label\n" + text)
    return root


def csv_without_labels(root: Path) -> Path:
    classes(root, 3, ("images",))
    (root / "images" / "metadata.csv").write_text("file_name,caption\n0.png,a cat\n")
    return root


def idx(root: Path) -> Path:
    for part, count in (("train", 4), ("t10k", 2)):
        pixels = np.stack([np.asarray(picture(n).convert("L")) for n in range(count)])
        labels = np.arange(count, dtype=np.uint8) % 2
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(
                ">" + "I" * array.ndim, *array.shape
            )
            root.mkdir(exist_ok=True)
            (root / f"{part}-{name}-ubyte").write_bytes(head + array.tobytes())
    return root


def numpy_arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([np.asarray(picture(n)) for n in range(count)]), np.arange(count) % 2


def npz(root: Path) -> Path:
    root.mkdir()
    (images, labels), (tests, truth) = numpy_arrays(4), numpy_arrays(2)
    named = dict(train_images=images, train_labels=labels[:, None], x_test=tests, y_test=truth)
    np.savez(root / "arrays.npz", **named)
    return root / "arrays.npz"


def npy(root: Path) -> Path:
    root.mkdir()
    images, labels = numpy_arrays(4)
    np.save(root / "X_train.npy", images[..., 0].astype(np.uint16) * 16)  # 12 bits
    np.save(root / "y_train.npy", np.array(["cat", "dog"])[labels])
    np.save(root / "X_test.npy", images[:2, ..., 0].astype(np.uint16) * 16)
    np.save(root / "y_test.npy", np.array(["cat", "dog"])[labels[:2]])
    return root


def shards_by_pattern(root: Path) -> Path:
    for number in range(4):
        shard(root / f"s-{number:03d}.tar", [0, 1] * 3, 6 * number)
    return root / "s-{001..003}.tar"


def shards_by_star(root: Path) -> Path:
    return shards_by_pattern(root).with_name("s-*[12].tar")


def shards_of_words(root: Path) -> Path:
    shard(root / "train.tar", ["cat", "dog", "cat"])
    shard(root / "test.tar", ["dog"])
    return root


def parquet_with_an_unlabelled_test(root: Path) -> Path:
    for part, labels in (("train", [0, 1, 1]), ("validation", [0, 1]), ("test", [-1, -1, -1])):
        table(root / "data" / f"{part}-00000-of-00001.parquet", labels, ["cat", "dog"])
    return root


def parquet_with_a_null(root: Path) -> Path:
    table(root / "train.parquet", [0, 1, None, 1], ["cat", "dog"])
    return root


def parquet_of_words(root: Path) -> Path:
    table(root / "train.parquet", ["cat", "dog", "dog"])
    return root


PETS, DIGITS = ["cat", "dog"], ["0", "1"]
READ: list[tuple[Callable[[Path], Path], int, int | None, list[str], str]] = [
    (parts_in_any_case, 6, 2, PETS, ""),
    (parts_in_a_lone_folder, 6, 2, PETS, "entered a/archive/"),
    (another_test_part, 6, 2, PETS, "left out: 2 images of test: the test images are"),
    (strange_class, 6, 2, ["cat", "cow", "dog"], "1 images of test are of classes that train"),
    (folders_of_systems, 4, None, PETS, ""),
    (other_suffixes, 8, None, PETS, "left out, as they are not read: 3 .svg"),
    (odd_entries, 4, None, PETS, "1 dangling link, 1 no regular file"),
    (twelve_bits, 4, None, PETS, "the largest is 4080, and 4095 is white"),
    (floating, 4, None, PETS, "the largest is 1.3, and 1.3 is white"),
    (few_levels, 2, None, PETS, "are all between 0 and 1 of 255"),
    (csv_of_labels, 3, None, PETS, ""),
    (csv_without_labels, 3, None, [], "metadata.csv: no labels: it has caption, file_name"),
    (idx, 4, 2, DIGITS, ""),
    (npz, 4, 2, DIGITS, ""),
    (npy, 4, 2, PETS, "the largest is 4080, and 4095 is white"),
    (shards_by_pattern, 18, None, DIGITS, ""),
    (shards_by_star, 12, None, DIGITS, ""),
    (shards_of_words, 3, 1, PETS, ""),
    (parquet_with_an_unlabelled_test, 3, 2, PETS, "left out: 3 images of test"),
    (parquet_with_a_null, 4, None, PETS, "1 of 4 images have no label"),
    (parquet_of_words, 3, None, PETS, ""),
]


@pytest.mark.parametrize(
    "write, train, test, names, words", READ, ids=lambda x: getattr(x, "__name__", "")
)
def test_what_is_read(tmp_path, write, train, test, names, words, capfd):
    spec = str(write(tmp_path / "set"))
    images = load_dataset(spec, "train" if test is not None else "all")
    assert (len(images), images.classes) == (train, names)
    notes = images.notes
    if test is not None:
        held = load_dataset(spec, "test")
        assert (len(held), held.classes) == (test, names)
        notes = notes + held.notes
    assert words in "\n".join(notes), notes
    assert words or not notes, notes
    assert not images.skipped and capfd.readouterr() == ("", "")


def test_folders_may_be_nested_deeper_than_calls(tmp_path):
    classes(tmp_path)
    inner = tmp_path / "cat" / "/".join("n" * 300)
    inner.mkdir(parents=True)
    picture(1).save(inner / "deep.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        found = list(walk.walk(tmp_path, {".png"}, Counter()))
    finally:
        sys.setrecursionlimit(limit)
    assert len(found) == 5 and found[2][-1] == "deep.png"


def test_one_scale_for_a_set(tmp_path):
    """The same value has the same grey in all files, whatever each one's largest is."""
    for write in (twelve_bits, floating):
        images = load_dataset(str(write(tmp_path / write.__name__)), "all").images
        darker, lighter = images[0].max().item(), images[2].max().item()
        assert abs(2 * darker - lighter) <= 1 and lighter >= 254


def test_every_size_has_a_centre():
    """At 224 px rounding once put the box of 2.6 % of them outside of the image."""
    for width in range(1, 1025):
        for height in range(1, 1025):
            left, top, right, bottom = _centre(width, height, 1.0)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
    for size in ((300, 225), (225, 300), (1024, 7)):
        stream = io.BytesIO()
        Image.new("RGB", size, (9, 99, 200)).save(stream, "PNG")
        for side in (224, 33):
            assert (decode(stream, side, side) == np.array([[[9]], [[99]], [[200]]])).all()


def test_sets_that_take_long_say_so(tmp_path, monkeypatch, capfd):
    classes(tmp_path, 70)
    monkeypatch.setattr(walk, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(walk, "MORE_SECONDS", 0.0)
    load_dataset(str(tmp_path))
    lines = capfd.readouterr().err.splitlines()
    assert f"listing {tmp_path}: 70" in lines and f"listing {tmp_path}: 140" in lines
    assert lines[-1] == f"reading {tmp_path}: 96 of 126"
    monkeypatch.setenv("RANK", "1")  # the first process tells
    load_dataset(str(tmp_path))
    assert capfd.readouterr() == ("", "")


# -------------------------------------------------------------------------------- in a run's plan


def plan(spec: Path, capsys, *flags: str) -> dict:
    """What --dry-run shows."""
    small = ["--arch", "resnet_tiny", "--device", "cpu", "--image-size", "8"]
    assert main(["--data", str(spec), "--dry-run", *small, *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_counts_what_is_left_out(tmp_path, capsys):
    notes = plan(other_suffixes(tmp_path / "a"), capsys)["notes"]
    assert "left out, as they are not read: 3 .svg" in notes
    shown = plan(another_test_part(tmp_path / "b"), capsys)
    assert "(test): 2 images" in shown["evaluation"]
    assert any(note.startswith("evaluation: left out: 2 images of test") for note in shown["notes"])


def test_images_without_a_label_are_trained_on_and_do_not_vote(tmp_path):
    classes(tmp_path / "train", 3)
    classes(tmp_path / "test", 1)
    picture(7).save(tmp_path / "train" / "stray.png")
    picture(8).save(tmp_path / "test" / "stray.png")
    train, bank, queries, _ = load_images(TrainConfig(data=str(tmp_path)))
    assert (len(train), len(bank), len(queries)) == (7, 6, 2)
    assert "1 of 7 images have no label" in train.notes
    assert "evaluation: 1 of 3 images have no label" in train.notes
    lazy = load_dataset(str(tmp_path), memory_limit=0).labelled()
    assert lazy.batch(torch.arange(6)).equal(bank.images)


def test_images_to_evaluate_on_are_all_of_an_undivided_set(tmp_path):
    classes(tmp_path / "a", 3)
    classes(tmp_path / "b", 11)
    config = TrainConfig(data=str(tmp_path / "a"), eval_data=str(tmp_path / "b"))
    assert len(load_images(config)[2]) == 22


def test_small_sets_are_fitted(tmp_path, capsys):
    classes(tmp_path, 1)
    shown = plan(tmp_path, capsys)
    assert shown["config"]["batch_size"] == 2 and shown["config"]["num_splits"] == 1
    assert "fitted to 2 images: batch size 2, splits of batch norm 1" in shown["notes"]
    argv = ["--data", str(tmp_path), "--dry-run", "--arch", "resnet_tiny", "--device", "cpu"]
    assert main([*argv, "--num-splits", "4"]) == 2
    assert "--num-splits 4" in capsys.readouterr().err
    (tmp_path / "cat" / "0.png").unlink()
    assert main(argv) == 2
    assert "1 image; training needs at least two" in capsys.readouterr().err


# ----------------------------------------------------------------------------- what cannot be read


def first_bytes(start: bytes, name: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        root.mkdir()
        (root / name).write_bytes(start + bytes(200))
        return root / name

    return write


def lmdb(root: Path) -> Path:
    root.mkdir()
    (root / "data.mdb").write_bytes(b"x")
    return root


def cifar_without_a_batch(root: Path) -> Path:
    root.mkdir()
    content = {b"labels": [0], b"data": np.zeros((1, 3072), np.uint8)}
    for number in (1, 2, 3, 5):
        (root / f"data_batch_{number}").write_bytes(pickle.dumps(content, protocol=2))
    (root / "batches.meta").write_bytes(pickle.dumps({b"label_names": []}, protocol=2))
    return root


def shard_cut(root: Path) -> Path:
    shard(root / "a.tar", [0, 1] * 20)
    data = (root / "a.tar").read_bytes()
    (root / "a.tar").write_bytes(data[: len(data) // 2])
    return root


def one_of_two_shards_cut(root: Path) -> Path:
    shard_cut(root)
    shard(root / "b.tar", [0, 1] * 20)
    return root


def pattern_with_a_gap(root: Path) -> Path:
    shard(root / "s-0.tar", [0, 1])
    return root / "s-{0..2}.tar"


def pattern_of_images(root: Path) -> Path:
    classes(root)
    return root / "cat" / "*.png"


def fifo(root: Path) -> Path:
    os.mkfifo(root)
    return root


def foreign_test_part(root: Path) -> Path:
    classes(root / "train")
    classes(root / "test", 2, ("x", "y"))
    return root


REFUSED: list[tuple[str, Callable[[Path], Path], str]] = [
    ("gzip", first_bytes(b"\x1f\x8b", "images.tar.gz"), "a gzip file, which is not read: unpack"),
    ("gzip by its bytes", first_bytes(b"\x1f\x8b", "images"), "a gzip file, which is not read"),
    ("zip", first_bytes(b"PK\x03\x04", "images.zip"), "a zip archive, which is not read: unpack"),
    ("HDF5", first_bytes(b"\x89HDF", "images.h5"), "an HDF5 file, which is not read"),
    ("LMDB", lmdb, "no images in this folder but 1 .mdb; an LMDB database"),
    ("DICOM", first_bytes(bytes(128) + b"DICM", "scan"), "a DICOM file, which is not read"),
    ("csv", first_bytes(b"", "labels.csv"), "a csv table, which is not read: name the folder"),
    ("arrow", first_bytes(b"ARROW1", "data.arrow"), "an Arrow file, which is not read: save it"),
    ("one image", first_bytes(b"", "a.png"), "not a folder but one image"),
    ("fifo", fifo, "neither a folder nor a regular file"),
    ("cifar", cifar_without_a_batch, "CIFAR-10 without data_batch_4 (there are batches.meta, "),
    (
        "shard cut",
        shard_cut,
        "a.tar: cut short after 22 images, and nothing says how many",
    ),
    ("one shard cut", one_of_two_shards_cut, "18 of 74 images cannot be read (1% is allowed)"),
    ("gap", pattern_with_a_gap, "no such file: "),
    ("pattern", pattern_of_images, "patterns name .tar or .parquet files, not .png"),
    ("damaged npz", first_bytes(b"PK\x03\x04", "a.npz"), "cannot read: "),
    ("npz of objects", first_bytes(b"\x93NUMPY", "a.npy"), "cannot read: "),
]


@pytest.mark.parametrize("write, words", [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_is_refused(tmp_path, write, words, capfd):
    spec = write(tmp_path / "set")
    with pytest.raises(DataError) as error:
        load_dataset(str(spec))
    message = str(error.value)
    assert words in message and message.startswith(str(tmp_path)) and "\n" not in message, message
    if "which is not read" in message:
        assert "Read are folders of images, " in message
    assert capfd.readouterr() == ("", "")
