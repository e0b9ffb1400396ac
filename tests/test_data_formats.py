"""Data sets in the formats they are published in, byte for byte on files written here."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from softcl.data import DataError, formats, load_dataset, sets
from softcl.data.arrays import load_pickle
from softcl.data.formats import FORMATS, READERS, Format
from softcl.data.image_set import Arrays
from softcl.data.sets import training_split

Image = pytest.importorskip("PIL.Image")


def pixels(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, format="PNG")
    return stream.getvalue()


def check(root: Path, split: str, images: np.ndarray, labels, data_format: str, **options) -> None:
    data = load_dataset(str(root), split, **options)
    assert data.data_format == data_format and f", {data_format}, " in data.describe()
    got = data.batch(torch.arange(len(data))).numpy()
    assert got.dtype == np.uint8 and np.array_equal(got, images)
    assert (data.labels is None) if labels is None else data.labels.tolist() == list(labels)


# ------------------------------------------------------------------------------------------- CIFAR


def write_cifar(root: Path, classes: int = 10, binary: bool = False) -> tuple:
    """24 images, the last 4 for testing: images, labels, and the names of the classes."""
    root.mkdir(parents=True, exist_ok=True)
    images, labels = pixels(24, 32), np.arange(24) * 11 % classes
    ten = classes == 10
    parts = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    bounds = range(0, 25, 4) if ten else (0, 20, 24)
    for name, start, stop in zip(parts, bounds[:-1], bounds[1:], strict=True):
        flat, fine, coarse = images[start:stop].reshape(-1, 3072), labels[start:stop], np.arange(20)
        if binary:
            columns = ([] if ten else [coarse[: stop - start, None]]) + [fine[:, None], flat]
            np.concatenate(columns, axis=1).astype(np.uint8).tofile(root / f"{name}.bin")
        else:
            key = b"labels" if ten else b"fine_labels"
            content = {key: fine.tolist(), b"coarse_labels": coarse.tolist(), b"data": flat}
            (root / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class {number}" for number in range(classes)]
    if binary:
        file = "batches.meta.txt" if ten else "fine_label_names.txt"
        (root / file).write_text("\n".join(names) + "\n\n")
    else:
        meta = {b"label_names" if ten else b"fine_label_names": [n.encode() for n in names]}
        (root / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return images, labels, names


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, classes: int, binary: bool):
    images, labels, names = write_cifar(tmp_path / "cifar", classes, binary)
    for root in (tmp_path, tmp_path / "cifar"):  # the folder above it will do
        check(root, "train", images[:20], labels[:20], "cifar")
        check(root, "test", images[20:], labels[20:], "cifar")
        check(root, "all", images, labels, "cifar")
    data = load_dataset(str(tmp_path))
    assert data.statistics == f"cifar{classes}" and data.classes == names


def test_damaged_binary_cifar(tmp_path):
    write_cifar(tmp_path, binary=True)
    path = tmp_path / "data_batch_3.bin"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], r"data_batch_3\.bin: 12291 bytes are not whole records of 3073"),
        (b"\x0a" + whole[1:], r"data_batch_3\.bin: has labels outside 0 \.\. 9"),
        (None, r"CIFAR-10 without data_batch_3\.bin \(there are "),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_dataset(str(tmp_path))


class _Evil:
    def __reduce__(self):
        return (os.system, ("echo must not run",))


def test_pickles_run_no_code(tmp_path, capfd):
    write_cifar(tmp_path)
    content = {b"data": pixels(1, 32).reshape(1, -1), b"labels": [0], b"extra": _Evil()}
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_2: cannot unpickle: it asks for .*system"):
        load_dataset(str(tmp_path))
    assert "must not run" not in capfd.readouterr().out
    for name in ("eval", "getattr", "__import__"):
        data = f"cbuiltins\n{name}\n(S'1'\ntR.".encode()
        (tmp_path / "data_batch_2").write_bytes(data)
        with pytest.raises(DataError, match="which is not allowed"):
            load_pickle(tmp_path / "data_batch_2")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot unpickle"),
        (b"\x80\x02}q\x00", "cannot unpickle"),
        (pickle.dumps([1, 2]), "holds a list where a dictionary"),
        (pickle.dumps({b"labels": [1]}), "not 3072 bytes in 'data'"),
        (pickle.dumps({b"labels": [1, 2], b"data": np.zeros((1, 3072), np.uint8)}), "not 3072"),
        (pickle.dumps({b"labels": ["a"], b"data": np.zeros((1, 3072), np.uint8)}), "whole numbers"),
    ],
)
def test_damaged_pickles_are_named(tmp_path, content: bytes, message: str):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_4").write_bytes(content)
    with pytest.raises(DataError, match="data_batch_4: .*" + message):
        load_dataset(str(tmp_path))


# ------------------------------------------------------------------------------------------ STL-10


def write_stl10(root: Path) -> tuple[dict, dict]:
    root.mkdir(parents=True, exist_ok=True)
    counts = {"train": 5, "test": 3, "unlabeled": 4}
    images = {part: pixels(n, 96, seed) for seed, (part, n) in enumerate(counts.items())}
    labels = {part: np.arange(counts[part]) for part in ("train", "test")}
    for part, stack in images.items():
        stack.transpose(0, 1, 3, 2).copy().tofile(root / f"{part}_X.bin")
    for part, values in labels.items():
        (values + 1).astype(np.uint8).tofile(root / f"{part}_y.bin")
    (root / "class_names.txt").write_text("\n".join(f"c{n}" for n in range(10)))
    return images, labels


def test_stl10(tmp_path):
    images, labels = write_stl10(tmp_path / "stl10_binary")
    check(tmp_path, "train", images["train"], labels["train"], "stl10")
    check(tmp_path, "test", images["test"], labels["test"], "stl10")
    check(tmp_path, "unlabeled", images["unlabeled"], None, "stl10")
    both = np.concatenate([images["train"], images["unlabeled"]])
    check(tmp_path, "train+unlabeled", both, None, "stl10")
    data = load_dataset(str(tmp_path / "stl10_binary"), "all")
    assert data.statistics == "stl10" and data.classes[2] == "c2" and len(data) == 8
    assert (
        training_split(str(tmp_path)) == "train+unlabeled" and training_split("shapes") == "train"
    )
    with pytest.raises(DataError, match="split 'unlabeled' is STL-10's alone"):
        load_dataset("shapes", "unlabeled")


def test_damaged_stl10(tmp_path):
    write_stl10(tmp_path)
    (tmp_path / "test_y.bin").write_bytes(b"\x01\x02")
    with pytest.raises(DataError, match=r"test_y\.bin: not 3 labels from 1 to 10"):
        load_dataset(str(tmp_path), "test")
    with open(tmp_path / "train_X.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"train_X\.bin: 138241 bytes are not whole images"):
        load_dataset(str(tmp_path), "train")
    (tmp_path / "unlabeled_X.bin").unlink()
    with pytest.raises(DataError, match=r"unlabeled_X\.bin: No such file"):
        load_dataset(str(tmp_path), "unlabeled")


# ----------------------------------------------------------------------------------- Tiny-ImageNet


def write_tiny(root: Path) -> tuple[np.ndarray, np.ndarray]:
    train, val = pixels(6, 64), pixels(4, 64, seed=1)
    names = ["n02", "n01", "n03"]
    for number, image in enumerate(train):
        folder = root / "train" / sorted(names)[number // 2] / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(image))
    (root / "val/images").mkdir(parents=True)
    lines = []
    for number, image in enumerate(val):
        (root / "val/images" / f"val_{number}.png").write_bytes(png(image))
        lines.append(f"val_{number}.png\t{names[number % 3]}\t0\t0\t10\t10\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    (root / "test/images").mkdir(parents=True)
    (root / "test/images/test_0.png").write_bytes(png(train[0]))
    return train, val


def test_tiny_imagenet(tmp_path):
    train, val = write_tiny(tmp_path / "tiny-imagenet-200")
    for root in (tmp_path, tmp_path / "tiny-imagenet-200"):
        check(root, "train", train, [0, 0, 1, 1, 2, 2], "tiny-imagenet")
        check(root, "test", val, [1, 0, 2, 1], "tiny-imagenet")
    data = load_dataset(str(tmp_path))
    assert data.classes == ["n01", "n02", "n03"] and data.statistics == "tiny-imagenet"
    annotations = tmp_path / "tiny-imagenet-200/val/val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("n03", "n99"))
    notes = load_dataset(str(tmp_path), "test").notes
    lacking = "1 images of val are of classes that train lacks, for which nothing can vote: n99"
    assert lacking in notes
    annotations.write_text("val_0.png\tn01\n")
    assert "3 of 4 images have no label" in load_dataset(str(tmp_path), "test").notes


# --------------------------------------------------------------------------------------- tar shards


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def samples(images: np.ndarray, labels, start: int = 0, kind: str = "cls") -> list:
    members = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True), start):
        members.append((f"{number:06d}.png", png(image)))
        text = str(label) if kind == "cls" else json.dumps({"label": int(label), "caption": "x"})
        members.append((f"{number:06d}.{kind}", text.encode()))
    return members


@pytest.mark.parametrize(("kind", "memory_limit"), [("cls", None), ("json", 0)])
def test_tar_shards(tmp_path, kind: str, memory_limit: int | None):
    images, labels = pixels(12, 16), np.arange(12) % 3
    write_tar(tmp_path / "set-train-0000.tar", samples(images[:5], labels[:5], 0, kind))
    write_tar(tmp_path / "set-train-0001.tar", samples(images[5:9], labels[5:9], 5, kind))
    write_tar(tmp_path / "set-val-0000.tar", samples(images[9:], labels[9:], 9, kind))
    options = {"memory_limit": memory_limit, "workers": 2}
    check(tmp_path, "train", images[:9], labels[:9], "tar", **options)
    check(tmp_path, "test", images[9:], labels[9:], "tar", **options)
    check(tmp_path, "all", images, labels, "tar", **options)
    assert load_dataset(str(tmp_path)).classes == ["0", "1", "2"]


def test_one_tar_file_and_what_is_held_out(tmp_path):
    images, labels = pixels(20, 16), np.arange(20) % 2
    write_tar(tmp_path / "all.tar", samples(images, labels))
    held = [18, 19]  # the tenth of each class
    rest = [i for i in range(20) if i not in held]
    check(tmp_path / "all.tar", "train", images[rest], labels[rest], "tar")
    check(tmp_path / "all.tar", "test", images[held], labels[held], "tar")
    assert "every 10th image" in " ".join(load_dataset(str(tmp_path / "all.tar")).notes)


def test_tar_shards_without_labels(tmp_path):
    images = pixels(3, 16)
    members = [(f"a/{n}.png", png(image)) for n, image in enumerate(images)]
    write_tar(tmp_path / "x.tar", members)
    check(tmp_path, "train", images, None, "tar")
    with pytest.raises(DataError, match="no part called test or val"):
        load_dataset(str(tmp_path), "test")
    write_tar(tmp_path / "x.tar", [*members, ("a/1.cls", b"0"), ("a/2.cls", b"\x00")])
    data = load_dataset(str(tmp_path), "all")
    assert data.labels.tolist() == [-1, 0, -1] and "2 of 3 images have no label" in data.notes


def test_damaged_tar_shards(tmp_path):
    images, labels = pixels(400, 4), np.zeros(400, dtype=int)
    members = samples(images, labels)
    members[40] = (members[40][0], b"no image")
    path = tmp_path / "train.tar"
    write_tar(path, members)
    whole = path.read_bytes()
    data = load_dataset(str(tmp_path))
    assert len(data) == 399 and data.skipped == [
        "train.tar/000020.png: UnidentifiedImageError: cannot identify image file"
    ]
    assert "1 unreadable skipped" in data.describe()
    path.write_bytes(whole[: 400 * 4 * 512 - 600])  # without the last label
    with pytest.raises(DataError, match="train.tar: cut short .* nothing says how many are lost"):
        load_dataset(str(tmp_path))
    write_tar(tmp_path / "train-1.tar", samples(images, labels, 400))  # says how many there were
    data = load_dataset(str(tmp_path))
    assert 790 < len(data) < 800 and "train.tar: cut short after 39" in " ".join(data.notes)
    assert np.array_equal(data.images[:20].numpy(), images[:20])
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read .1% is allowed.: train.tar: cut short"):
        load_dataset(str(tmp_path))
    (tmp_path / "train-1.tar").unlink()
    write_tar(path, members, "w:gz")
    with pytest.raises(DataError, match="train.tar: not a readable tar file .compressed"):
        load_dataset(str(tmp_path))


# ----------------------------------------------------------------------------------------- parquet


def write_parquet(path: Path, images: np.ndarray, labels, **options) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": png(image), "path": None} for image in images]
    table = pyarrow.table({"img": rows, "fine_label": pyarrow.array(labels, pyarrow.int64())})
    names = {"fine_label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": names}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, **options)


@pytest.mark.parametrize("memory_limit", [None, 0])
def test_parquet(tmp_path, memory_limit: int | None):
    images, labels = pixels(11, 16), np.arange(11) % 3
    rows = {"row_group_size": 2}
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", images[:5], labels[:5], **rows)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", images[5:8], labels[5:8])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images[8:], labels[8:])
    options = {"memory_limit": memory_limit, "workers": 2}
    check(tmp_path, "train", images[:8], labels[:8], "parquet", **options)
    check(tmp_path, "test", images[8:], labels[8:], "parquet", **options)
    assert load_dataset(str(tmp_path)).classes == ["cat", "dog", "owl"]


def test_damaged_parquet(tmp_path):
    write_parquet(tmp_path / "train.parquet", pixels(3, 16), [0, 1, 2])
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "train.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="train.parquet: cannot read: "):
        load_dataset(str(tmp_path))
    table = pyarrow.table({"text": ["a"], "label": [0]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match="no column of images among text, label"):
        load_dataset(str(tmp_path))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="needs pyarrow: pip install pyarrow"):
        load_dataset(str(tmp_path))


# --------------------------------------------------------------------------------------- detection


def test_formats_are_recognised_and_can_be_demanded(tmp_path):
    write_cifar(tmp_path / "a")
    folder = tmp_path / "a/more"
    for name in ("x", "y"):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").write_bytes(png(pixels(1, 8)[0]))
    assert load_dataset(str(tmp_path / "a")).data_format == "cifar"
    assert load_dataset(str(tmp_path / "a"), "all", data_format="folder").data_format == "folder"
    for wanted in ("stl10", "tiny-imagenet", "tar", "parquet"):
        with pytest.raises(DataError, match=f"a: nothing of format {wanted} here"):
            load_dataset(str(tmp_path / "a"), data_format=wanted)
    with pytest.raises(ValueError, match="data_format must be one of auto"):
        load_dataset(str(tmp_path / "a"), data_format="lmdb")
    assert set(READERS) < set(FORMATS)


def test_a_new_format_is_a_reader_and_a_line(tmp_path, monkeypatch):
    def read_numpy(folder: Path, split: str) -> Arrays:
        return Arrays(np.load(folder / f"{split}.npy"), None, [], "imagenet")

    stored = Format(read_numpy, (("train.npy", "test.npy"),))
    monkeypatch.setattr(formats, "READERS", {"raw": stored, **READERS})
    monkeypatch.setattr(sets, "READERS", formats.READERS)
    for seed, split in enumerate(("train", "test")):
        np.save(tmp_path / f"{split}.npy", pixels(3, 8, seed))
    check(tmp_path, "test", pixels(3, 8, 1), None, "raw")
