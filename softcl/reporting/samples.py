"""What pictures are made of: features of some images, from a run or a file, and their images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from softcl.data import ImageSet, load_dataset, training_split
from softcl.errors import CheckpointError, DataError
from softcl.evaluation import NUM_NEIGHBORS
from softcl.evaluation.features import extract, sampled
from softcl.evaluation.table import SUFFIXES
from softcl.train.checkpoint import Stored, features_of
from softcl.train.config import TrainConfig
from softcl.train.given import is_object

MOST_IMAGES = 2000  # that are looked at, unless said otherwise
BANK_SHARE = 5  # so many times as many vote
_HELD_OUT = 10  # of a set without test images each tenth, as in training

Show = Callable[[int], Tensor]  # from the place of a row to its image, uint8 (3, H, W)


@dataclass(frozen=True)
class Part:
    """Unit rows (n, F), their labels (n,) where there are any, their names and images."""

    rows: Tensor
    labels: Tensor | None
    show: Show | None = None
    names: list[str] | None = None


@dataclass(frozen=True)
class Sample:
    """Features of images that are looked at, and of others among which their neighbours are.

    Attributes:
        classes: names, in the order of the labels; empty without labels.
        num_neighbors: that vote.
        words: what the two parts are: "test images", "training images".
        mapped: what the map shows, if not the first of them.
    """

    name: str
    queries: Part
    bank: Part
    classes: list[str]
    num_neighbors: int
    words: tuple[str, str] = ("test images", "training images")
    mapped: Part | None = None

    @property
    def labelled(self) -> bool:
        return self.queries.labels is not None and self.bank.labels is not None


# ---------------------------------------------------------------------------------------- of a run


@dataclass(frozen=True)
class Sets:
    """Images of a run: for training, and others to be looked at, or the same if there are none."""

    train: ImageSet
    test: ImageSet

    def normalised(self, as_in: Sequence[Sequence[float]] | None) -> Sets:
        """The same, with the means and deviations that the network was trained with, if named."""
        if as_in is None:
            return self
        mean, std = map(tuple, as_in)
        train = replace(self.train, mean=mean, std=std)
        same = self.test is self.train
        return Sets(train, train if same else replace(self.test, mean=mean, std=std))


def read_sets(config: TrainConfig) -> Sets:
    """The images of a run, decoded when they are needed: a picture takes few of them.

    Raises:
        DataError: they are not there any more.
    """
    if is_object(config.data) or is_object(config.eval_data):
        raise DataError(f"{config.data}: the images were an object of the program that trained")
    given = {"image_size": config.image_size, "workers": config.workers, "memory_limit": 0}
    own = {"data_format": config.data_format, **given}
    split = config.split or training_split(config.data, config.data_format)
    train = load_dataset(config.data, "train" if "unlabeled" in split else split, **own).labelled()
    if config.eval_data is not None:
        return Sets(train, load_dataset(config.eval_data, "test", whole=True, **given).labelled())
    try:
        return Sets(train, load_dataset(config.data, "test", **own).labelled())
    except DataError:
        return Sets(train, train)


def sample_run(
    name: str, stored: Stored, sets: Sets, device: torch.device, limit: int = MOST_IMAGES
) -> Sample:
    """Features of at most `limit` test images, and of BANK_SHARE times as many training images.

    Raises:
        CheckpointError: they are not finite.
    """
    backbone, size = features_of(stored.backbone, device), stored.config.image_size
    words = ("test images", "training images")
    train, test = torch.arange(len(sets.train)), torch.arange(len(sets.test))
    if sets.test is sets.train:
        held_out = train % _HELD_OUT == 0
        train, test = train[~held_out], train[held_out]
        words = ("training images held out", "other training images")
    parts = []
    for images, indices, most in ((sets.test, test, 1), (sets.train, train, BANK_SHARE)):
        indices = indices[sampled(len(indices), most * limit)]
        rows = extract(images, indices, backbone, size, device)
        if not rows.isfinite().all():
            raise CheckpointError(f"{stored.path}: gives features that are not finite")
        labels = None if images.labels is None else images.labels[indices].to(device)
        parts.append(Part(rows, labels, _shower(images, indices)))
    k = min(stored.config.knn_k or NUM_NEIGHBORS, len(parts[1].rows))
    return Sample(name, *parts, sets.train.classes, k, words)


def _shower(images: ImageSet, indices: Tensor) -> Show:
    return lambda place: images.batch(indices[place : place + 1])[0].cpu()


# --------------------------------------------------------------------------------------- of a file


def is_embedding(path: Path) -> bool:
    return path.suffix in SUFFIXES and not path.is_dir()


def read_embedding(path: Path, limit: int = MOST_IMAGES) -> tuple[Sample, str | None]:
    """What `softcl embed` wrote, or any file with the column "features"; a note where images miss.

    Each tenth row is looked at, and has its neighbours among the others.

    Raises:
        DataError: it holds no features.
        OSError: it cannot be read.
    """
    columns, metadata = _read_columns(path)
    rows, labels, names = _checked(path, columns)
    classes = [] if labels is None else _class_names(metadata, int(labels.max()) + 1)
    places = torch.arange(len(rows))
    if labels is not None:
        places = places[torch.from_numpy(labels >= 0)]
    held_out = torch.arange(len(places)) % _HELD_OUT == 0
    note, find = None, None
    try:
        find = _finder(metadata, names)
    except DataError as error:
        note = f"{path.name}: neighbours by name, without their images ({error})"
    parts = []
    for chosen, most in ((places[held_out], 1), (places[~held_out], BANK_SHARE), (places, 1)):
        chosen = chosen[sampled(len(chosen), most * limit)]
        if not np.isfinite(rows[chosen.numpy()]).all():
            raise DataError(f"{path}: its features are not finite")
        unit = F.normalize(torch.from_numpy(np.array(rows[chosen.numpy()], np.float32)), dim=1)
        own = None if labels is None else torch.from_numpy(labels[chosen.numpy()])
        called = [names[place] for place in chosen.tolist()]
        parts.append(Part(unit, own, None if find is None else _by_name(find, called), called))
    k = min(NUM_NEIGHBORS, len(parts[1].rows))
    words = ("images, each tenth of the file", "others")
    return Sample(path.name, *parts[:2], classes, k, words, parts[2]), note


def _checked(
    path: Path, columns: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Features, labels where there is a usable one, and names.

    Raises:
        DataError: there are no features.
    """
    rows, labels, names = (columns.get(name) for name in ("features", "labels", "paths"))
    if rows is None or rows.ndim != 2 or len(rows) < 4 or rows.dtype.kind != "f":
        raise DataError(f"{path}: holds no features of four images or more")
    if labels is not None:
        usable = labels.shape == rows.shape[:1] and labels.dtype.kind in "iu"
        # Of fewer than four labelled images there is nothing to compare.
        labels = labels.astype(np.int64) if usable and (labels >= 0).sum() >= 4 else None
    if names is None or len(names) != len(rows):
        names = np.arange(len(rows))
    return rows, labels, list(map(str, names))


def _read_columns(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns by name, and the metadata."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as content:
                columns = {name: content[name] for name in content.files}
            text = columns.pop("metadata", None)
            return columns, {} if text is None else json.loads(str(text))
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        from pyarrow import parquet

        table = parquet.read_table(path)
        columns = {
            name: np.stack(table[name].to_numpy()) if name == "features" else table[name].to_numpy()
            for name in table.column_names
        }
        metadata = table.schema.metadata or {}
        return columns, {key.decode(): json.loads(value) for key, value in metadata.items()}
    except ImportError as error:
        raise DataError(f"{path}: needs {error.name}, which is not installed") from error
    except OSError:
        raise
    except Exception as error:  # three libraries, and many kinds
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "numpy") as content:
        columns = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        text = content.metadata() or {}
    if "paths" in columns:
        columns["paths"] = np.array(json.loads(bytes(columns["paths"])))
    metadata = {}
    for key, value in text.items():
        try:
            metadata[key] = json.loads(value)
        except ValueError:
            metadata[key] = value
    return columns, metadata


def _class_names(metadata: dict[str, Any], count: int) -> list[str]:
    found = metadata.get("classes") or []
    return [str(found[n]) if n < len(found) else f"class {n}" for n in range(count)]


def _finder(metadata: dict[str, Any], names: list[str]) -> tuple[ImageSet, dict[str, int]]:
    """The images that a file was made of, and their places by name.

    Raises:
        DataError: they are not there.
    """
    if not metadata.get("data"):
        raise DataError("it does not name the images")
    images = load_dataset(
        str(metadata["data"]), "all", image_size=metadata.get("image_size"), memory_limit=0
    )
    found = {name: place for place, name in enumerate(images.names)}
    if "0" in found and len(found) != len(names):  # pixels without names: of a part of the set
        raise DataError(f"{images.name}: has {len(found)} images, and the file {len(names)}")
    if not found.keys() >= set(names):
        raise DataError(f"{images.name}: has no longer all of them")
    return images, found


def _by_name(find: tuple[ImageSet, dict[str, int]], names: list[str]) -> Show:
    images, places = find

    return lambda place: images.batch(torch.tensor([places[names[place]]]))[0].cpu()
