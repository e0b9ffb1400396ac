"""Which images a folder holds: its splits, its classes, in a fixed order."""

from __future__ import annotations

import os
from pathlib import Path

from softcl.data.image_set import DataError
from softcl.data.listing import Listing, printable
from softcl.data.splits import HOLD_OUT, held_out

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)
TRAIN = "train"
TESTS = ("test", "val")


def _walk(
    folder: str, prefix: tuple[str, ...], above: tuple[tuple[int, int], ...], out: list
) -> None:
    """Append the images under `folder`, as tuples of names after `prefix`; links are followed."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link back to a folder that contains it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = (*prefix, entry.name)
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link that leads only to itself
                continue
            if is_folder:
                _walk(entry.path, path, (*above, here), out)
            elif is_file and os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                out.append(path)


def list_files(folder: Path) -> list[tuple[str, ...]]:
    """Paths of the images under a folder as tuples of names, sorted."""
    found: list[tuple[str, ...]] = []
    try:
        _walk(os.fspath(folder), (), (), found)
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
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    if not root.exists():
        raise DataError(f"{printable(root)}: no such folder")
    if not root.is_dir():
        raise DataError(f"{printable(root)}: not a folder")
    notes: list[str] = []
    folders = _split_folders(root, notes)
    parts = {name: list_files(folder) for name, folder in folders.items()} or {"": list_files(root)}
    if not any(parts.values()):
        kinds = " ".join(sorted(e[1:] for e in EXTENSIONS))
        raise DataError(f"{printable(root)}: no images in this folder (looked for {kinds})")

    classes = sorted({p[0] for paths in parts.values() for p in paths if len(p) > 1})
    wanted = [name for name in parts if split in (name, "all") or name == ""]
    chosen = [(name, path) for name in wanted for path in parts[name]]
    labelled = len(classes) > 1 and all(len(path) > 1 for _, path in chosen)
    if len(classes) > 1 and chosen and not labelled:
        notes.append("some images lie outside the class subfolders: no labels")
    if parts.get("") and split != "all" and (labelled or split == "test"):
        chosen = _hold_out(chosen, split, labelled, root, notes)
    if not chosen:
        name = "train/" if split == "train" else "test/ or val/"
        raise DataError(f"{printable(root)}: no images in {name}, asked for split {split!r}")
    files = ["/".join((folders[name].name, *path) if name else path) for name, path in chosen]
    labels = None
    if labelled:
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[path[0]] for _, path in chosen]
    return Listing(root, files, labels, classes if labelled else [], notes)


def _hold_out(chosen: list, split: str, labelled: bool, root: Path, notes: list[str]) -> list:
    """The part of an undivided folder that belongs to `split`."""
    if not labelled:
        raise DataError(
            f"{printable(root)}: no test/ or val/ subfolder, and no class subfolders "
            "to hold images out of"
        )
    number = {name: place for place, name in enumerate(sorted({path[0] for _, path in chosen}))}
    places = held_out([number[path[0]] for _, path in chosen], split)
    result = [chosen[place] for place in places]
    notes.append(
        f"no test/ or val/ subfolder: every {HOLD_OUT}th image of a class is held out for test"
    )
    return result
