"""Few labels: which of a set's images are learned from, the same on every machine.

The images of a class are put into an order that depends on the seed, the class and their number
alone (softcl.data.stream), and the first of them are taken: so 1 % are among the 10 %.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from softcl.data import ImageSet
from softcl.data.stream import mix, words
from softcl.errors import ConfigError, DataError
from softcl.files import read_file, user_path

_PER_CLASS = "-per-class"


class Amount(NamedTuple):
    """A share of each class's images, or a number of them; of `file`, the images that it names."""

    share: float | None = None
    per_class: int | None = None
    file: Path | None = None

    def of(self, count: int) -> int:
        """How many of a class of `count` images: of a share the nearest number, but one at least.

        Raises:
            ValueError: there are not so many.
        """
        if self.share is not None:
            return min(max(round(self.share * count), 1), count)
        if self.per_class > count:
            raise ValueError(f"has {count} images, not {self.per_class}")
        return self.per_class


def read_amount(text: str) -> Amount:
    """What --labels says: "1%", "25-per-class", or the name of a file that lists images.

    Raises:
        ConfigError: it is none of these.
    """
    share = re.fullmatch(r"(\d+(?:\.\d*)?) ?%", text)
    if share is not None and 0.0 < float(share[1]) <= 100.0:
        return Amount(share=float(share[1]) / 100.0)
    count = re.fullmatch(r"0*([1-9]\d{0,8})" + _PER_CLASS, text)
    if count is not None:
        return Amount(per_class=int(count[1]))
    try:
        if not text.endswith(("%", _PER_CLASS)) and user_path(text).exists():
            return Amount(file=user_path(text))
    except OSError:
        pass
    reason = f"must be a share as 10%, a number as 25{_PER_CLASS}, or a file that lists images"
    raise ConfigError("labels", text, reason)


def choose(images: ImageSet, amount: Amount, seed: int) -> Tensor:
    """Indices, ascending, of the labelled images that are learned from: (n,) int64.

    Raises:
        DataError: a class has no image, or too few; a file names other images.
    """
    if amount.file is not None:
        chosen = _listed(images, amount.file)
    else:
        chosen = torch.cat(
            [_of_class(images, label, amount, seed) for label in range(len(images.classes))]
        )
    counts = images.labels[chosen].cpu().bincount(minlength=len(images.classes))
    if bool((counts == 0).any()):
        missing = images.classes[int((counts == 0).nonzero()[0])]
        raise DataError(f"{images.name}: no image of class {missing!r} to learn from")
    return chosen.sort().values


def raised(images: ImageSet, amount: Amount) -> str:
    """What a user is told whose share is less than one image of some classes; "" where of none."""
    if amount.share is None:
        return ""
    counts = images.labels.cpu().bincount(minlength=len(images.classes)).tolist()
    few = sum(amount.share * count < 1.0 for count in counts)
    if not few:
        return ""
    return (
        f"{100 * amount.share:g}% is less than one image of {few} of {len(counts)} classes; "
        "one of each is taken"
    )


def _of_class(images: ImageSet, label: int, amount: Amount, seed: int) -> Tensor:
    places = (images.labels.cpu() == label).nonzero().flatten()
    try:
        count = amount.of(len(places))
    except ValueError as error:
        raise DataError(f"{images.name}: class {images.classes[label]!r} {error}") from error
    keys = words(mix(seed, label), max(len(places), 1))[0]
    return places[torch.from_numpy(np.argsort(keys[: len(places)], kind="stable"))][:count]


def _listed(images: ImageSet, file: Path) -> Tensor:
    place = {name: index for index, name in enumerate(images.names)}
    names = read_file(file).decode("utf-8", "replace").splitlines()
    found = []
    for name in filter(None, names):
        if name not in place:
            raise DataError(f"{file}: lists {name[:100]!r}, which is not in {images.name}")
        found.append(place[name])
    return torch.tensor(sorted(set(found)), dtype=torch.int64)


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places among labels (n,) to learn from and to choose by; each class is in both.

    Raises:
        ValueError: a class has one image alone.
    """
    rest, held = [], []
    for label in labels.unique().tolist():
        places = (labels == label).nonzero().flatten()
        if len(places) < 2:
            raise ValueError("to choose by, each class needs two images or more")
        keys = words(mix(seed, label, 1), len(places))[0]
        places = places[torch.from_numpy(np.argsort(keys, kind="stable"))]
        count = min(max(round(share * len(places)), 1), len(places) - 1)
        held.append(places[:count])
        rest.append(places[count:])
    return torch.cat(rest).sort().values, torch.cat(held).sort().values
