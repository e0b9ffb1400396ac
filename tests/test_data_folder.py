"""Folders of images: layout, classes, splits, order, and what is said when something is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from softcl.data import DataError, load_dataset
from softcl.data.folder import list_folder
from softcl.data.image_set import Listing
from softcl.data.sets import known_statistics
from softcl.data.splits import Choice, choose

Image = pytest.importorskip("PIL.Image")


def write(path: Path, value: int = 0, size: tuple[int, int] = (6, 6)) -> Path:
    """A plain PNG of grey `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def write_classes(root: Path, counts: dict[str, int], start: int = 0) -> None:
    for name, count in counts.items():
        for i in range(count):
            write(root / name / f"{i:03d}.png", start + i)


def listed(root: Path, split: str) -> tuple[list[str], Choice]:
    """The files of a split, and what else is known of it."""
    whole: Listing = list_folder(root)
    choice = choose(root, split, whole.parts, whole.labels)
    return list(whole.only(choice.places).files), choice


def values(root: Path, split: str) -> list[int]:
    """The grey of each image."""
    return load_dataset(str(root), split).images[:, 0, 0, 0].tolist()


def refused(root: Path, split: str = "train", named: Path | None = None) -> str:
    """What is said of a folder that cannot be read, in one line with the path."""
    with pytest.raises(DataError) as error:
        load_dataset(str(root), split)
    message = str(error.value)
    assert "\n" not in message and str(named or root) in message
    return message


# -------------------------------------------------------------------------------- splits, classes


def test_train_and_test_with_classes(tmp_path):
    write_classes(tmp_path / "train", {"dog": 3, "cat": 2})
    write_classes(tmp_path / "test", {"cat": 1, "dog": 1}, start=100)
    train, test = load_dataset(str(tmp_path), "train"), load_dataset(str(tmp_path), "test")
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 1, 1, 1] and test.labels.tolist() == [0, 1]
    assert values(tmp_path, "train") == [0, 1, 0, 1, 2] and values(tmp_path, "test") == [100, 100]
    everything = load_dataset(str(tmp_path), "all")
    assert torch.equal(everything.images, torch.cat([train.images, test.images]))
    assert torch.equal(everything.labels, torch.cat([train.labels, test.labels]))
    assert train.resident and train.images.dtype == torch.uint8 and len(train) == 5
    assert "5 images, 6x6" in train.describe() and "2 classes" in train.describe()


def test_classes_are_numbered_over_both_splits(tmp_path):
    write_classes(tmp_path / "train", {"a": 1, "c": 1})
    write_classes(tmp_path / "test", {"b": 1, "c": 1})
    train, test = load_dataset(str(tmp_path), "train"), load_dataset(str(tmp_path), "test")
    assert train.classes == test.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [0, 2] and test.labels.tolist() == [1, 2]


def test_val_stands_in_for_test(tmp_path):
    write_classes(tmp_path / "train", {"a": 2, "b": 2})
    write_classes(tmp_path / "val", {"a": 1, "b": 1}, start=50)
    assert values(tmp_path, "test") == [50, 50]
    write(tmp_path / "test" / "unlabelled.png", 9)  # as in ImageNet: val/ has the labels
    assert values(tmp_path, "test") == [50, 50]
    write_classes(tmp_path / "test", {"a": 1, "b": 1}, start=70)
    (tmp_path / "test" / "unlabelled.png").unlink()
    assert values(tmp_path, "test") == [70, 70]


def test_without_splits_every_tenth_image_of_a_class_is_held_out(tmp_path):
    write_classes(tmp_path, {"a": 25, "b": 9, "c": 10})
    (train, about), (test, held) = listed(tmp_path, "train"), listed(tmp_path, "test")
    everything, rest = listed(tmp_path, "all")
    assert test == ["a/009.png", "a/019.png", "c/009.png"]
    assert sorted(train + test) == everything
    assert not set(train) & set(test)
    assert held.labels.tolist() == [0, 0, 2] and rest.notes == []
    assert "held out" in about.notes[0]


def test_without_classes(tmp_path):
    for i in (2, 0, 1):
        write(tmp_path / "images" / f"{i}.png", i)
    for root in (tmp_path, tmp_path / "images"):  # one subfolder is no class, but is entered
        data = load_dataset(str(root))
        assert data.labels is None and data.classes == [] and "no labels" in data.describe()
        assert values(root, "train") == [0, 1, 2]
        assert "no part called test or val" in refused(root, "test")


def test_images_beside_class_folders_have_no_label(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 2})
    write(tmp_path / "stray.png", 255)
    data = load_dataset(str(tmp_path), "all")
    assert data.labels.tolist() == [0, 0, 1, 1, -1]
    assert data.notes == ["1 of 5 images have no label"]
    labelled = data.labelled()
    assert labelled.labels.tolist() == [0, 0, 1, 1] and labelled.images.max() == 1


def test_a_class_may_be_called_train(tmp_path):
    write_classes(tmp_path, {"plane": 2, "train": 2, "truck": 2})
    assert listed(tmp_path, "all")[1].classes == ["plane", "train", "truck"]
    deep = tmp_path / "deep"
    write_classes(deep / "train", {"plane": 2, "train": 2})
    write_classes(deep / "test", {"plane": 2, "train": 2})
    files, choice = listed(deep, "train")
    assert choice.classes == ["plane", "train"] and files[-1] == "train/train/001.png"


def test_only_train_given(tmp_path):
    write_classes(tmp_path / "train", {"a": 2, "b": 2})
    assert len(load_dataset(str(tmp_path), "train")) == 4
    assert "no part called test or val" in refused(tmp_path, "test")
    (tmp_path / "test").mkdir()
    assert len(load_dataset(str(tmp_path), "all")) == 4
    assert "no part called test or val" in refused(tmp_path, "test")


def test_folders_beside_the_splits_are_named(tmp_path):
    for name in ("train", "test", "unlabeled"):
        write_classes(tmp_path / name, {"a": 1, "b": 1})
    files, choice = listed(tmp_path, "all")
    assert len(files) == 4 and choice.notes == ["left out: 2 images of unlabeled/"]


# --------------------------------------------------------------------------------- which files


def test_nested_images_belong_to_the_first_level_and_other_files_to_none(tmp_path):
    for name in ("a/x/1.png", "a/0.png", "b/y/z/2.jpg", "b/UPPER.PNG"):
        write(tmp_path / name)
    for name in (".hidden/0.png", "a/._0.png", "__MACOSX/0.png"):
        write(tmp_path / name)
    (tmp_path / "a" / "labels.csv").write_text("x")
    (tmp_path / "README").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "folder.png").mkdir()
    files, choice = listed(tmp_path, "all")
    assert files == ["a/0.png", "a/x/1.png", "b/UPPER.PNG", "b/y/z/2.jpg"]
    assert choice.labels.tolist() == [0, 0, 1, 1]
    assert list_folder(tmp_path).left_out == {".csv": 1, "without a suffix": 1}


def test_links(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_classes(elsewhere, {"many": 2})
    root = tmp_path / "root"
    write_classes(root, {"a": 1, "b": 1})
    (root / "c").symlink_to(elsewhere / "many")
    (root / "a" / "loop").symlink_to(root)
    (root / "b" / "self").symlink_to(root / "b" / "self")
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    assert list(list_folder(root).files) == ["a/000.png", "b/000.png", "c/000.png", "c/001.png"]


def test_order_does_not_depend_on_the_file_system(tmp_path):
    names = ["b.png", "a.png", "10.png", "9.png", "Z.png", "é.png", "a b.png"]
    for name in names:
        write(tmp_path / name)
    assert list(list_folder(tmp_path).files) == sorted(names)


def test_what_is_no_folder_of_images(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    assert "not a folder but one image" in refused(write(tmp_path / "one" / "picture.png"))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for split in ("train", "test", "all"):
        assert "no images" in refused(tmp_path / "empty", split)
    with pytest.raises(DataError) as error:
        load_dataset(str(tmp_path / "two\nlines"))
    assert "two?lines" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user with limits")
def test_folder_without_permission(tmp_path):
    write_classes(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a").chmod(0)
    message = refused(tmp_path, named=tmp_path / "a")
    (tmp_path / "a").chmod(0o755)
    assert "Permission denied" in message


def test_unreadable_images_are_skipped_counted_and_listed(tmp_path):
    write_classes(tmp_path, {"a": 100, "b": 100})
    (tmp_path / "a" / "007.png").write_bytes(b"")
    whole = (tmp_path / "b" / "003.png").read_bytes()
    (tmp_path / "b" / "003.png").write_bytes(whole[: len(whole) // 2])
    data = load_dataset(str(tmp_path), "all")
    assert len(data) == len(data.labels) == len(data.images) == 198
    assert [line.split(":")[0] for line in data.skipped] == ["a/007.png", "b/003.png"]
    assert all(": " in line for line in data.skipped) and "2 unreadable" in data.describe()
    expected = [i for i in range(100) if i != 7] + [i for i in range(100) if i != 3]
    assert data.images[:, 0, 0, 0].tolist() == expected
    assert data.labels.tolist() == [0] * 99 + [1] * 99
    (tmp_path / "b" / "001.png").write_bytes(b"not an image")  # more than 1 %
    message = refused(tmp_path, "all")
    assert "3 of 200" in message
    assert all(name in message for name in ("a/007.png", "b/001.png", "b/003.png"))


# ----------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize(
    ("sizes", "requested", "stored"),
    [
        ([(6, 6)] * 3, None, (6, 6)),
        ([(8, 5)] * 3, None, (5, 8)),  # Pillow says (width, height), tensors (height, width)
        ([(8, 5)] * 3, 8, (5, 8)),
        ([(8, 5)] * 3, 7, (7, 7)),
        ([(8, 5), (6, 6)], None, (224, 224)),
        ([(8, 5), (6, 6)], 4, (4, 4)),
        ([(129, 129)] * 2, None, (224, 224)),
        ([(129, 129)] * 2, 130, (129, 129)),
    ],
)
def test_stored_size(tmp_path, sizes, requested, stored):
    for i, size in enumerate(sizes):
        write(tmp_path / f"{i}.png", 40 + i, size)
    data = load_dataset(str(tmp_path), image_size=requested)
    assert data.images.shape[2:] == stored
    for i, image in enumerate(data.images):
        assert (image == 40 + i).all()


def test_a_different_image_is_cropped_in_its_center(tmp_path):
    thirds = np.zeros((8, 24, 3), dtype=np.uint8)
    for channel in range(3):
        thirds[:, 8 * channel : 8 * channel + 8, channel] = 255
    Image.fromarray(thirds).save(tmp_path / "wide.png")
    write(tmp_path / "square.png", 0, (4, 4))
    red, green, blue = load_dataset(str(tmp_path), image_size=4).images[1]
    assert (green[:, 1:3] == 255).all() and (green >= 200).all()
    assert (red[:, 1:] == 0).all() and (blue[:, :3] == 0).all()


def test_normalisation_by_name():
    for name, row in (
        ("cifar10", "cifar10"),
        ("CIFAR-100", "cifar100"),
        ("cifar100-png", "cifar100"),
        ("stl10_binary", "stl10"),
        ("tiny-imagenet-200", "tiny-imagenet"),
        ("imagenet", "imagenet"),
        ("photos", "imagenet"),
        ("destiny", "imagenet"),
        ("cifar10/train", "cifar10"),
    ):
        assert known_statistics(Path("somewhere") / name) == row


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="split must be .* got 'valid'"):
        load_dataset(str(tmp_path), "valid")
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load_dataset(str(tmp_path), image_size=0)
