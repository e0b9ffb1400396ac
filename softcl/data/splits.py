"""Which images of a set belong to a split, and what their classes are: one rule for all formats.

A reader gives every image the part that its path or its file's name speaks of, and a label;
`choose` does the rest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softcl.data.columns import Words
from softcl.data.image_set import printable
from softcl.errors import DataError

HOLD_OUT = 10  # without a test part, every tenth image of a class is held out
TRAIN, TESTS = "train", ("test", "val")
WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "test": "test",
    "testing": "test",
    "t10k": "test",  # MNIST's
    "val": "val",
    "valid": "val",
    "validation": "val",
}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(WORDS, key=len, reverse=True))})(?![a-z])")
_LONGEST_WORD = 200
_LARGEST_NUMBER = 100_000  # labels above are names that happen to be numbers

Label = int | str | None


def part_in(name: str) -> str:
    """The part that a file's path speaks of: "train", "test", "val", or "" if none."""
    found = _WORD.findall(name.lower())
    return WORDS[found[-1]] if found else ""


def is_divided(parts: Iterable[str]) -> bool:
    """Whether any image is in a part "train", "test" or "val"."""
    return not {TRAIN, *TESTS}.isdisjoint(parts)


def as_label(value: object) -> Label:
    """A class as a number or a word, from a file's number or text; None if it is neither."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        value = value.strip()
        if not value.lstrip("-").isdecimal() or len(value) > 9:
            return value if value.isprintable() and 0 < len(value) <= _LONGEST_WORD else None
        value = int(value)
    return value if isinstance(value, int) and value >= 0 else None


@dataclass
class Choice:
    """The images of a split.

    places:  among all of the set, (n,) int64
    labels:  a number for each, -1 where it has none; or None where none has one
    classes: their names, by number
    notes:   what was left out, and what has no label
    """

    places: np.ndarray
    labels: np.ndarray | None
    classes: list[str]
    notes: list[str]


def choose(
    root: Path,
    split: str,
    parts: Sequence[str],
    labels: Sequence[Label],
    names: Sequence[str] = (),
    why_unlabelled: str = "",
) -> Choice:
    """The images of split "train", "test" or "all".

    A set is divided where any image is in a part "train", "test" or "val". Of the last two that one
    is the test part whose classes are those of the training part. Of an undivided set with labels
    every tenth image of a class is held out for "test".

    Args:
        parts, labels: of each image; classes are numbered over both parts, words in sorted order.
        names: of the classes whose labels are numbers.
        why_unlabelled: what to say where no image has a label.

    Raises:
        DataError: the split has no images.
    """
    parts, labels = Words.of(parts), Words.of(labels)
    width = len(labels.values)
    counts: dict[str, Counter[Label]] = {}
    pairs, numbers = np.unique(
        parts.codes.astype(np.int64) * width + labels.codes, return_counts=True
    )
    for pair, count in zip(pairs.tolist(), numbers.tolist(), strict=True):
        part, label = parts.values[pair // width], labels.values[pair % width]
        counts.setdefault(part, Counter())[label] = count
    notes: list[str] = []
    divided = is_divided(counts)
    test = _test_part(root, split, counts, notes) if divided else None
    used = [part for part in (TRAIN, test) if part in counts] if divided else list(counts)
    wanted = {"train": [TRAIN], "test": [test], "all": used}[split] if divided else used
    codes = [parts.values.index(part) for part in wanted if part in counts]
    places = np.concatenate(
        [np.zeros(0, np.int64), *(np.flatnonzero(parts.codes == c) for c in codes)]
    )
    if not len(places):
        called = "train" if split == "train" else "test or val"
        raise DataError(f"{printable(root)}: no part called {called}, asked for split {split!r}")
    if divided and split != "test":
        for part in sorted(counts.keys() - {TRAIN, *TESTS}):
            where = f"{printable(part)}/" if part else "files that name no part"
            notes.append(f"left out: {counts[part].total()} images of {where}")
    number, classes = _numbered((label for part in used for label in counts[part]), names)
    table = np.array([number.get(label, -1) for label in labels.values], np.int64)
    found = table[labels.codes[places]]
    missing = int((found < 0).sum())
    if missing == len(found):
        notes += [f"no labels: {why_unlabelled}"] * bool(why_unlabelled)
    elif missing:
        notes.append(f"{missing} of {len(found)} images have no label")
    if not divided and split != "all":
        kept = _held_out(root, split, found, notes)
        places, found = places[kept], found[kept]
    if (found < 0).all():
        return Choice(places, None, [], notes)
    return Choice(places, found, classes, notes)


def _test_part(
    root: Path, split: str, counts: dict[str, Counter[Label]], notes: list[str]
) -> str | None:
    """The part to evaluate on: of those there are the one whose images have train's classes."""
    tests = [part for part in TESTS if part in counts]
    if not tests:
        return None
    trained = set(counts.get(TRAIN, ())) - {None}

    def shared(part: str) -> float:
        known = trained or set(counts[part]) - {None}
        return sum(counts[part][label] for label in known) / counts[part].total()

    test = max(tests, key=shared)  # the first of equal ones
    if split == "train":
        return test if shared(test) or not trained else None
    if trained and not shared(test):
        if split == "test":
            where = " or ".join(tests)
            raise DataError(f"{printable(root)}: no image of {where} has a class of train")
        test = None
    for other in tests:
        if other != test:
            why = f"the test images are those of {test}" if test else "its classes are not train's"
            notes.append(f"left out: {counts[other].total()} images of {other}: {why}")
    strange = {} if test is None or not trained else counts[test].keys() - trained - {None}
    if strange:
        words = ", ".join(sorted(printable(str(label)) for label in strange)[:5])
        number = sum(counts[test][label] for label in strange)
        notes.append(
            f"{number} images of {test} are of classes that train lacks, "
            f"for which nothing can vote: {words}{', ...' * (len(strange) > 5)}"
        )
    return test


def _numbered(labels: Iterable[Label], names: Sequence[str]) -> tuple[dict[Label, int], list[str]]:
    """The number of each label, -1 of None, and the names of the classes by number."""
    known = {label for label in labels if label is not None}
    number: dict[Label, int] = {None: -1}
    if all(isinstance(label, int) for label in known):
        largest = max(known, default=-1)
        if largest < max(len(names), _LARGEST_NUMBER):
            more = map(str, range(len(names), largest + 1))
            return number | {label: label for label in known}, [*names, *more]
        ordered = sorted(known)
    else:
        ordered = sorted(known, key=str)
    return number | {label: i for i, label in enumerate(ordered)}, [str(label) for label in ordered]


def _held_out(root: Path, split: str, labels: np.ndarray, notes: list[str]) -> np.ndarray:
    """The places of an undivided set that belong to "train" or "test"."""
    if (labels < 0).all():
        if split == "train":
            return np.arange(len(labels))
        reason = "no part called test or val, and no labels to hold images out by"
        raise DataError(f"{printable(root)}: {reason}")
    order = np.argsort(labels, kind="stable")
    _, first, lengths = np.unique(labels[order], return_index=True, return_counts=True)
    place_in_class = np.empty_like(order)
    place_in_class[order] = np.arange(len(labels)) - np.repeat(first, lengths)
    held = (labels >= 0) & (place_in_class % HOLD_OUT == HOLD_OUT - 1)
    kept = np.flatnonzero(held == (split == "test"))
    if not len(kept):
        raise DataError(f"{printable(root)}: too few images for split {split!r}")
    notes.append(f"no part called test or val: every {HOLD_OUT}th image of a class is held out")
    return kept
