"""Folders of image files: with or without parts, class subfolders, and tables of labels."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from softcl.data.columns import Names, Words
from softcl.data.decode import suffixes
from softcl.data.image_set import Listing, Stamp, printable
from softcl.data.splits import TRAIN, WORDS, Label, as_label
from softcl.data.walk import KINDS, counted, stamp, walk
from softcl.errors import DataError

TINY_SIGNS = (("val/val_annotations.txt",),)
LABEL_KEYS = ("label", "labels", "fine_label", "cls", "class", "target")
# Hugging Face's two, and Tiny-ImageNet's.
TABLES = ("metadata.csv", "metadata.jsonl", "val_annotations.txt")

Below = tuple[str, ...]  # a path below the root


def list_folder(root: Path) -> Listing:
    """The images of a folder.

    train/ and test/ (or val/) are its parts, in any case, also as training, testing, valid and
    validation: where both are there, or nothing else. The first folder level, below a part's, gives
    the classes where there are at least two; a table of TABLES gives those of the images beside and
    below it.

    Raises:
        DataError: there is no such folder, or it has no images.
    """
    if not root.is_dir():
        reason = "not a folder" if root.exists() else "no such file or folder"
        raise DataError(f"{printable(root)}: {reason}")
    left_out: Counter[str] = Counter()
    sources: dict[str, Stamp] = {}
    lists: list[Below] = []  # paths of tables

    def images() -> Iterator[str]:
        for path in walk(root, suffixes(), left_out, TABLES, sources):
            if path[-1] in TABLES:
                lists.append(path)
            else:
                yield "/".join(path)

    files = Names.of(images())
    if not files:
        raise DataError(f"{printable(root)}: no images in this folder{_instead(left_out)}")
    notes: list[str] = []
    tables = {}
    for path in lists:
        file = root.joinpath(*path)
        sources[os.fspath(file)] = stamp(file)
        table = _table(file, notes)
        if table is not None:
            tables[path[:-1]] = table
    tops = {name.partition("/")[0] for name in files if "/" in name}
    parts = {WORDS[name.lower()] for name in tops if name.lower() in WORDS}
    divided = bool(parts) and (
        all(name.lower() in WORDS for name in tops) or (TRAIN in parts and len(parts) > 1)
    )
    level = int(divided)  # of the classes

    def word(path: Below) -> Label:
        for place, table in tables.items():
            if path[: len(place)] == place:
                return table.get(path[len(place) :])
        return path[level] if len(path) > level + 1 else None

    def part(name: str) -> str:
        top, slash, _ = name.partition("/")
        return WORDS.get(top.lower(), top) if divided and slash else ""

    labels = Words.of(word(tuple(name.split("/"))) for name in files)
    if len(set(labels.values) - {None}) < 2:
        labels = Words([None], np.zeros(len(files), np.int32))
    return Listing(
        root,
        files,
        Words.of(part(name) for name in files),
        labels,
        notes=notes,
        left_out=left_out,
        why_unlabelled="fewer than two class subfolders",
        sources=sources,
    )


def _instead(left_out: Counter[str]) -> str:
    """What a folder without images has, and what may be done about it."""
    if not left_out:
        return ", which has no other files either"
    hints = dict.fromkeys(KINDS[kind] for kind, _ in left_out.most_common() if kind in KINDS)
    told = "".join(f"; {what}: {hint}" for what, hint in list(hints)[:2])
    return f" but {counted(left_out)}{told}"


def list_tiny_imagenet(root: Path) -> Listing:
    """Tiny-ImageNet-200 as it is published: the labels of val/ stand in a table, test/ has none."""
    listing = list_folder(root)
    listing.statistics = "tiny-imagenet"
    return listing


def _table(file: Path, notes: list[str]) -> dict[Below, Label] | None:
    """The labels in a table by the paths of the images, below the table's folder.

    None, with a note that says why, where it has none.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            if file.suffix == ".txt":  # name, class, and a box that nobody needs here
                rows = (line.split("\t") for line in stream)
                return {("images", row[0]): as_label(row[1]) for row in rows if len(row) > 1}
            records = csv.DictReader(stream) if file.suffix == ".csv" else _objects(stream)
            table, known = {}, set()
            for record in records:
                known.update(map(str, record))
                key = next((key for key in LABEL_KEYS if key in record), None)
                name = record.get("file_name")
                if key is not None and isinstance(name, str):
                    table[tuple(name.split("/"))] = as_label(record[key])
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        reason = " ".join(str(error).split())
        notes.append(f"{printable(file.name)}: not read: {reason}")
        return None
    if not table:
        columns = printable(", ".join(sorted(known))) or "nothing"
        wanted = f"file_name and one of {', '.join(LABEL_KEYS)}"
        notes.append(f"{printable(file.name)}: no labels: it has {columns}, not {wanted}")
    return table or None


def _objects(lines: Iterator[str]) -> Iterator[dict]:
    for line in lines:
        content = json.loads(line) if line.strip() else {}
        if isinstance(content, dict):
            yield content
