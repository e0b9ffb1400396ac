"""The checkpoints of a run folder: the newest, the ones before it, the best.

last.pt       the newest
last-1.pt     the one before it; last-2.pt and so on where more are kept
best.pt       the one with the highest k-NN accuracy
set-aside.pt  a last.pt that was damaged, or that a run was not continued from

All but the newest are further names (hard links) of files that were last.pt once, so they cost no
writing, and last.pt is a whole checkpoint at every moment.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from softcl.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint

LAST, BEST = "last.pt", "best.pt"
SET_ASIDE = "set-aside.pt"
_EARLIER = re.compile(r"last-([1-9]\d*)\.pt")


def write_rotating(folder: Path, content: dict[str, Any], *, keep: int) -> None:
    """Write last.pt and keep `keep` - 1 earlier ones, after the new one is safely on the disk.

    Raises:
        CheckpointError: the disk refuses it; everything is as it was.
    """
    write_checkpoint(folder / LAST, content, before_replacing=lambda: _shift(folder, keep))


def _shift(folder: Path, keep: int) -> None:
    """Name last.pt last-1.pt too, and what had such a name by the next number."""
    for number, path in reversed(earlier(folder)):
        if number + 1 >= keep:
            path.unlink(missing_ok=True)
        else:
            os.replace(path, folder / f"last-{number + 1}.pt")
    if keep > 1 and (folder / LAST).exists():
        name_too(folder / LAST, folder / "last-1.pt")


def earlier(folder: Path) -> list[tuple[int, Path]]:
    """The numbered checkpoints of a folder, newest first."""
    found = ((_EARLIER.fullmatch(path.name), path) for path in folder.glob("last-*.pt"))
    return sorted((int(match[1]), path) for match, path in found if match)


def name_too(path: Path, other: Path) -> None:
    """Make `other` a further name of the file `path`, replacing what had it, in one moment."""
    temporary = other.with_name(f".{other.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)
    # Where both were names of one file, rename does nothing and leaves the temporary name.
    temporary.unlink(missing_ok=True)


def read_newest(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole.

    Returns:
        Its path, its content and, for each newer one that was passed over, the reason in a line.

    Raises:
        CheckpointError: none is whole; the reason is that of the newest.
    """
    refused: list[CheckpointError] = []
    candidates = [folder / LAST, *(path for _, path in earlier(folder))]
    for path in candidates:
        if not path.exists() and len(candidates) > 1:
            continue
        try:
            return path, read_checkpoint(path), list(map(str, refused))
        except CheckpointError as error:
            refused.append(error)
    raise refused[0]


def put_back(folder: Path, path: Path) -> None:
    """Make the checkpoint `path` the newest again; the last.pt in its place is set aside."""
    if path.name == LAST:
        return
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / SET_ASIDE)
    name_too(path, folder / LAST)
