"""The batches of a run in order, with the time spent waiting for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from softcl.data import ImageSet, batch_indices, batches
from softcl.data.image_set import CropOrder
from softcl.distributed import ALONE, World
from softcl.training.step import Images, View
from softcl.training.views import crop_order


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
        views: Mapping[str, View] | None = None,
    ) -> None:
        self.images, self.batch_size, self.seed, self.device = images, batch_size, seed, device
        self.world, self.views = world, views
        self.steps_per_epoch = len(images) // batch_size
        self.waited = 0.0

    def indices(self, step: int) -> Tensor:
        """The images of a step that this process reads, (N / W,) int64."""
        epoch, within = divmod(step, self.steps_per_epoch)
        batch = batch_indices(len(self.images), self.batch_size, self.seed, epoch, within)
        return batch[self.world.rank :: self.world.size]

    def _wanted(self, step: int) -> Tensor | CropOrder:
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
