"""Tiny-ImageNet-200 as it is published: the labels of val/ stand in val_annotations.txt.

train/<class>/images/*.JPEG, val/images/*.JPEG with val/val_annotations.txt, wnids.txt. test/ has no
labels and is left alone; "test" means val/.
"""

from __future__ import annotations

from pathlib import Path

from softcl.data.folder import list_files
from softcl.data.image_set import DataError
from softcl.data.listing import Listing

ANNOTATIONS = "val_annotations.txt"
FOLDER = "tiny-imagenet-200"


def find(root: Path) -> Path | None:
    """The folder of the set, `root` or the one in it, or None."""
    for folder in (root, root / FOLDER):
        if (folder / "val" / ANNOTATIONS).is_file() and (folder / "train").is_dir():
            return folder
    return None


def list_images(folder: Path, split: str) -> Listing:
    """The images of split "train", "test" (which is val/) or "all".

    Raises:
        DataError: the annotations lack an image or name an unknown class.
    """
    classes = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    number = {name: place for place, name in enumerate(classes)}
    files: list[str] = []
    labels: list[int] = []
    if split in ("train", "all"):
        for path in list_files(folder / "train"):
            files.append("/".join(("train", *path)))
            labels.append(number[path[0]])
    if split in ("test", "all"):
        annotated = _annotations(folder, number)
        for path in list_files(folder / "val"):
            if path[-1] not in annotated:
                raise DataError(f"{folder / 'val' / ANNOTATIONS}: has no line for {path[-1]}")
            files.append("/".join(("val", *path)))
            labels.append(annotated[path[-1]])
    if not files:
        raise DataError(f"{folder}: no images for split {split!r}")
    return Listing(folder, files, labels, classes)


def _annotations(folder: Path, number: dict[str, int]) -> dict[str, int]:
    """File name -> label, from lines "name, class, box", separated by tabs."""
    file = folder / "val" / ANNOTATIONS
    found = {}
    for line in file.read_text(errors="replace").splitlines():
        words = line.split("\t")
        if len(words) < 2:
            continue
        if words[1] not in number:
            raise DataError(f"{file}: class {words[1]!r} of {words[0]} is not in train/")
        found[words[0]] = number[words[1]]
    return found
