"""Folders of image files, with or without class subfolders and splits; and Tiny-ImageNet's."""

from __future__ import annotations

import os
from pathlib import Path

from softcl.data.image_set import DataError, Listing, printable

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)
TRAIN, TESTS = "train", ("test", "val")
TINY_SIGNS = (("val/val_annotations.txt",),)


def list_files(folder: Path) -> list[tuple[str, ...]]:
    """Paths of the images under a folder as tuples of names, sorted; links are followed."""
    found: list[tuple[str, ...]] = []

    def walk(folder: str, prefix: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> None:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back to a folder that contains it
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                try:
                    is_folder, is_file = entry.is_dir(), entry.is_file()
                except OSError:  # a link that leads only to itself
                    continue
                path = (*prefix, entry.name)
                if is_folder:
                    walk(entry.path, path, (*above, here))
                elif is_file and os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    found.append(path)

    try:
        walk(os.fspath(folder), (), ())
    except OSError as error:
        place = printable(error.filename or folder)
        raise DataError(f"{place}: {error.strerror or error}") from error
    return sorted(found)


def _split_folders(root: Path, notes: list[str]) -> dict[str, Path]:
    """{"train": ..., "test": ...} where the folder is divided so, else {}.

    train/ beside test/ or val/ divides it, or those names alone: a set of classes may well have
    one called "train".
    """
    try:
        names = {e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")}
    except OSError as error:
        raise DataError(f"{printable(root)}: {error.strerror or error}") from error
    tests = [name for name in TESTS if name in names]
    divided = bool(names) and names <= {TRAIN, *TESTS}
    if not (divided or (TRAIN in names and tests)):
        return {}
    others = sorted(names - {TRAIN, *TESTS} - {"__MACOSX"})
    if others:
        notes.append(f"ignored beside {TRAIN}/: " + ", ".join(printable(n) + "/" for n in others))
    folders = {TRAIN: root / TRAIN} if TRAIN in names else {}
    if tests:
        # ImageNet's test/ has no labels and its val/ has.
        labelled = [name for name in tests if any(len(p) > 1 for p in list_files(root / name))]
        folders["test"] = root / (labelled or tests)[0]
    return folders


def list_folder(root: Path, split: str) -> Listing:
    """The images of split "train", "test" or "all".

    train/ and test/ (or val/) are honoured. Without them "train" is everything, except that with
    class subfolders every tenth image of each class is held out for "test". The first folder
    level gives the classes when every image lies in a subfolder and there are at least two of
    them; classes are numbered in the sorted order of all splits' names together.

    Raises:
        DataError: there is no such folder, or it has no images for that split.
    """
    if not root.is_dir():
        reason = "not a folder" if root.exists() else "no such folder"
        raise DataError(f"{printable(root)}: {reason}")
    notes: list[str] = []
    folders = _split_folders(root, notes)
    parts = {name: list_files(folder) for name, folder in folders.items()} or {"": list_files(root)}
    if not any(parts.values()):
        kinds = " ".join(sorted(e[1:] for e in EXTENSIONS))
        raise DataError(f"{printable(root)}: no images in this folder (looked for {kinds})")

    classes = sorted({p[0] for paths in parts.values() for p in paths if len(p) > 1})
    wanted = [name for name in parts if split in (name, "all") or name == ""]
    chosen = [(name, path) for name in wanted for path in parts[name]]
    if not chosen:
        name = "train/" if split == "train" else "test/ or val/"
        raise DataError(f"{printable(root)}: no images in {name}, asked for split {split!r}")
    labels = None
    if len(classes) > 1 and all(len(path) > 1 for _, path in chosen):
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[path[0]] for _, path in chosen]
    elif len(classes) > 1:
        notes.append("some images lie outside the class subfolders: no labels")
    files = ["/".join((folders[name].name, *path) if name else path) for name, path in chosen]
    listing = Listing(root, files, labels, classes if labels else [], notes)
    if not folders:
        listing.hold_out(split, "no test/ or val/ subfolder")
    return listing


def list_tiny_imagenet(folder: Path, split: str) -> Listing:
    """Tiny-ImageNet-200 as it is published; "test" is val/, whose labels stand in a text file.

    train/<class>/images/*.JPEG, val/images/*.JPEG with val/val_annotations.txt; test/ has no labels
    and is left alone.

    Raises:
        DataError: the annotations lack an image or name an unknown class.
    """
    train = folder / "train"
    entries = train.iterdir() if train.is_dir() else ()
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    number = {name: place for place, name in enumerate(classes)}
    listing = Listing(folder, [], [], classes, statistics="tiny-imagenet")
    if split in ("train", "all"):
        for path in list_files(train):
            listing.files.append("/".join(("train", *path)))
            listing.labels.append(number[path[0]])
    if split in ("test", "all"):
        file = folder / "val" / "val_annotations.txt"
        lines = [line.split("\t") for line in file.read_text(errors="replace").splitlines()]
        class_of = {words[0]: words[1] for words in lines if len(words) > 1}
        for path in list_files(folder / "val"):
            if path[-1] not in class_of:
                raise DataError(f"{file}: has no line for {path[-1]}")
            if class_of[path[-1]] not in number:
                raise DataError(
                    f"{file}: class {class_of[path[-1]]!r} of {path[-1]} is not in train/"
                )
            listing.files.append("/".join(("val", *path)))
            listing.labels.append(number[class_of[path[-1]]])
    if not listing.files:
        raise DataError(f"{folder}: no images for split {split!r}")
    return listing
