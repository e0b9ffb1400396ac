"""What a run sees: its image sets, the views of a batch, and the batches in their order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from softcl.command import did_you_mean, from_flag, must_be_one_of
from softcl.data import (
    VIEWS,
    DataError,
    ImageSet,
    batch_indices,
    batches,
    image_set_of,
    load_dataset,
    training_split,
)
from softcl.data.image_set import CropOrder, Cut
from softcl.data.recipe import CROP_COLUMNS, RECIPE
from softcl.data.views import Images, RecipeTransform, Transform, make_view
from softcl.distributed import ALONE, World
from softcl.errors import ConfigError
from softcl.memory import moved
from softcl.methods import Method, View
from softcl.train.config import TrainConfig
from softcl.train.defaults import default_size
from softcl.train.given import NOTHING, Given
from softcl.train.step import derived_seed


def load_images(
    config: TrainConfig, given: Given = NOTHING
) -> tuple[ImageSet, ImageSet, ImageSet, str]:
    """Training images, bank and queries of the k-NN evaluation, and a line about the latter.

    The bank is the training set; where that has images without labels beside the labelled ones
    (STL-10), the labelled ones. Without a test split the queries are the bank itself, of which KNN
    holds images out; so are labelled images of which none is for training.

    Raises:
        DataError: the training images, or the images of --eval-data, cannot be read.
    """
    options = {"image_size": config.image_size, "workers": config.workers}
    train, bank = _training_images(config, given, options)
    if config.image_size is None:  # to be stored in one size with the training images
        options["image_size"] = train.size[1]
    bank = bank.labelled()
    own = {"data_format": config.data_format, "cache": config.cache}
    if given.eval_data is not None:
        queries = image_set_of(given.eval_data, **options)
    elif config.eval_data is not None:
        with from_flag("eval_data"):
            queries = load_dataset(
                config.eval_data, "test", whole=True, cache=config.cache, **options
            )
    elif given.data is not None:
        return train, bank, bank, "every tenth training image (no eval_data was given)"
    else:
        try:
            queries = load_dataset(config.data, "test", **own, **options)
        except DataError as error:
            return train, bank, bank, f"every tenth training image ({error})"
    queries = queries.labelled()
    queries.files = None  # seen whole
    train.notes += [f"evaluation: {x}" for x in queries.notes if x not in train.notes]
    if bank.labels is None and queries.labels is not None:
        return train, queries, queries, f"every tenth image, of {queries.describe()}"
    return train, bank, queries, queries.describe()


def _training_images(
    config: TrainConfig, given: Given, options: dict[str, int | None]
) -> tuple[ImageSet, ImageSet]:
    """The training set, and the bank of the evaluation."""
    own = {"data_format": config.data_format, "cache": config.cache}
    if given.data is not None:
        for name, usual in (("split", None), ("data_format", "auto")):
            if getattr(config, name) != usual:
                reason = "does not apply to data that is given as an object"
                raise ConfigError(name, getattr(config, name), reason)
        train = bank = image_set_of(given.data, **options)
    else:
        with from_flag("data"):
            try:
                split = config.split or training_split(config.data, config.data_format)
                train = bank = load_dataset(config.data, split, **own, **options)
            except DataError as error:
                hint = "" if Path(config.data).exists() else did_you_mean(config.data, ["shapes"])
                raise DataError(f"{error}{hint}") from error
        if split in ("unlabeled", "train+unlabeled"):
            labelled = {**options, "image_size": options["image_size"] or train.size[1]}
            bank = load_dataset(config.data, "train", **own, **labelled)
    if config.whole_images is False:
        train.files = None
    if config.shuffle == "shards":
        train.shards = None if train.listing is None else train.listing.shards()
        if train.shards is None:
            reason = "there are none: these images are neither in tar nor in parquet files"
            raise ConfigError("shuffle", config.shuffle, reason)
    return train, bank


def view_side(images: ImageSet, config: TrainConfig) -> int:
    """Side of the views: the one asked for, or that of the images.

    Where the method's defaults for these very images have a smaller one, that: STL-10's 96 px are
    trained on at 64.
    """
    if config.image_size is not None:
        return config.image_size
    own = images.size[1]
    usual = default_size(config.method, images)
    return own if usual is None else min(own, usual)


def fingerprint(images: ImageSet) -> str:
    """Changes when images are added or removed or their classes change (not their pixels)."""
    digest = hashlib.sha256(json.dumps([len(images), images.classes]).encode())
    if images.labels is not None:
        digest.update(images.labels.cpu().numpy().tobytes())
    return digest.hexdigest()


def check_same_images(images: ImageSet, spec: str, world: World) -> None:
    """Refuse to train where the processes, perhaps on several machines, read different images.

    Compared are names, classes, labels, and pixels: a row of each image in memory, or of files that
    are decoded on demand some whole.

    Raises:
        DataError: in every process.
    """
    if world.alone:
        return
    digest = hashlib.sha256(fingerprint(images).encode())
    if images.resident:
        pixels = images.images[:, :, images.size[0] // 2]
    else:
        digest.update("\n".join(images.images.listing.files).encode("utf-8", "surrogateescape"))
        pixels = images.batch(torch.arange(0, len(images), -(-len(images) // 64)))
    digest.update(pixels.cpu().contiguous().numpy())
    seen = world.all_gather_object((len(images), digest.hexdigest()))
    others = [rank for rank, its in enumerate(seen) if its != seen[0]]
    if others:
        other = world.rank if world.rank in others else others[0]
        its, first = seen[other][0], seen[0][0]
        what = "other names, labels or pixels" if its == first else f"{its} images, not {first}"
        raise DataError(f"{spec}: process {other} reads other images than process 0: {what}")


def make_resident(images: ImageSet, device: torch.device) -> None:
    """Keep the pixels on the device, where they take at most a quarter of its free memory."""
    if images.resident and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if images.images.numel() < free // 4:
            images.to(device)


# ---------------------------------------------------------------------------------------- views


def build_views(
    method: Method, images: ImageSet, size: int, kernel: bool | None = None
) -> dict[str, Transform]:
    """What makes each of the method's views of a batch.

    Raises:
        ConfigError: a recipe that there is not.
    """

    def make(view: View, field: str) -> Transform:
        if view.recipe not in VIEWS:
            raise must_be_one_of(field, view.recipe, VIEWS)
        function = VIEWS[view.recipe]
        recipe = getattr(function, "keywords", {}).get("recipe", RECIPE)
        if view.scale is not None:
            recipe = dataclasses.replace(recipe, scale=view.scale)
        side = side_of(view, size)
        return RecipeTransform(function, recipe, side, images.mean, images.std, kernel)

    teacher_only = set(method.teacher_sees()) - set(method.student_sees())
    return {
        name: make(view, "teacher_view" if name in teacher_only else "student_view")
        for name, view in method.views().items()
    }


def side_of(view: View, image_size: int) -> int:
    """Side of a view in pixels."""
    return max(round(image_size * view.share), 1)


def crop_order(
    indices: Tensor,  # (N / W,) of this process's images
    views: Mapping[str, Transform],
    seed: int,
    step: int,
    world: World = ALONE,
) -> CropOrder:
    """What a step needs of the files of its images: a random crop for each view.

    The boxes' numbers are a function of the seed and the step, whatever the device and the number
    of threads and of processes: sample i of the batch has row i of them.
    """
    cuts = {}
    for name, view in views.items():
        generator = torch.Generator().manual_seed(derived_seed(seed, step, f"crop {name}"))
        numbers = torch.rand((len(indices) * world.size, CROP_COLUMNS), generator=generator)
        cuts[name] = Cut(view.side, view.recipe, numbers[world.rank :: world.size])
    return CropOrder(indices, cuts)


# -------------------------------------------------------------------------------------- batches


def labelled_views(
    images: ImageSet,
    view: Transform,
    batch_size: int,
    seed: int,
    device: torch.device,
    start: int,
    stop: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (N, 3, S, S) and labels (N,) of the steps start .. stop - 1, for supervised training.

    A pure function of the seed and the step, as all that a run sees.
    """
    feed = BatchFeed(images, batch_size, seed, device, views={"view": view})
    labels = images.labels.to(device)
    for step, pixels in enumerate(feed.batches(start, stop), start):
        generator = torch.Generator().manual_seed(derived_seed(seed, step, "view"))
        made = make_view({"view": view}, "view", pixels, generator)
        made = made.contiguous(memory_format=torch.channels_last)
        yield made, labels[moved(feed.indices(step), device)]


class BatchFeed:
    """The batch of every step: a pure function of (seed, step), whatever was read before.

    Args:
        images: the training set.
        batch_size: N, at most len(images).
        seed: of the shuffling.
        device: where the batches go.
        world: the processes; each reads its own images of a batch.
        views: of a set whose files are cut (`ImageSet.files`): what for.

    Attributes:
        steps_per_epoch: whole batches in an epoch; the images left over sit that epoch out.
        waited: seconds that the iteration took so far, reading included.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int,
        device: torch.device,
        world: World = ALONE,
        views: Mapping[str, Transform] | None = None,
    ) -> None:
        self.images, self.batch_size, self.seed, self.device = images, batch_size, seed, device
        self.world, self.views = world, views
        self.steps_per_epoch = len(images) // batch_size
        self.waited = 0.0

    def indices(self, step: int) -> Tensor:
        """The images of a step that this process reads, (N / W,) int64."""
        epoch, within = divmod(step, self.steps_per_epoch)
        size, shards = len(self.images), self.images.shards or ()
        batch = batch_indices(size, self.batch_size, self.seed, epoch, within, shards)
        return batch[self.world.rank :: self.world.size]

    def _wanted(self, step: int) -> Tensor | CropOrder:
        """The same, or crops of them."""
        indices = self.indices(step)
        if self.images.files is None:
            return indices
        return crop_order(indices, self.views, self.seed, step, self.world)

    def batches(self, start: int, stop: int) -> Iterator[Images]:
        """The batches of the steps start .. stop - 1 on the device.

        uint8 (N / W, 3, H, W), or where files are cut a dictionary of (N / W, 3, S, S), by view.
        """
        order = (self._wanted(step) for step in range(start, stop))
        source = batches(self.images, order, device=self.device)
        while True:
            before = time.perf_counter()
            try:
                _, images = next(source)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - before
            yield images
