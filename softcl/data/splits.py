"""Which part of a set a file belongs to by its name, and which images are held out otherwise."""

from __future__ import annotations

import re
from pathlib import Path

from softcl.data.image_set import DataError

HOLD_OUT = 10  # without a test part, every tenth image of a class is held out
_TRAIN = re.compile(r"(^|[^a-z])(train|training)([^a-z]|$)")
_TEST = re.compile(r"(^|[^a-z])(test|val|valid|validation)([^a-z]|$)")


def by_name(root: Path, files: list[Path], split: str) -> tuple[list[Path], bool]:
    """The files of a split, going by the words train, test and val in their paths below `root`.

    Returns:
        The files; and whether the set is divided at all. If not, the files are all of them.

    Raises:
        DataError: the set is divided and has no such part.
    """
    names = [path.relative_to(root).as_posix().lower() for path in files]
    train = [path for path, name in zip(files, names, strict=True) if _TRAIN.search(name)]
    tests = [path for path, name in zip(files, names, strict=True) if _TEST.search(name)]
    if not train and not tests:
        return files, False
    chosen = {"train": train, "test": tests, "all": files}[split]
    if not chosen:
        raise DataError(f"{root}: no file with {split!r} in its name among {len(files)}")
    return chosen, True


def held_out(labels: list[int], split: str) -> list[int]:
    """Positions that belong to `split` when every tenth image of each class is the test part."""
    seen: dict[int, int] = {}
    places = []
    for place, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if split == "all" or (seen[label] % HOLD_OUT == 0) == (split == "test"):
            places.append(place)
    return places
