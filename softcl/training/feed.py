"""The batches of a run in order, with the time spent waiting for them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from softcl.data import ImageSet, batch_indices, batches
from softcl.distributed import ALONE, World


class BatchFeed:
    """The batch of every step: a pure function of (seed, step), whatever was read before.

    Args:
        images: the training set.
        batch_size: N, at most len(images).
        seed: of the shuffling.
        device: where the batches go.
        world: the processes; each reads its own images of a batch.

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
    ) -> None:
        self.images, self.batch_size, self.seed, self.device = images, batch_size, seed, device
        self.world = world
        self.steps_per_epoch = len(images) // batch_size
        self.waited = 0.0

    def indices(self, step: int) -> Tensor:
        """The images of a step that this process reads, (N / W,) int64."""
        epoch, within = divmod(step, self.steps_per_epoch)
        batch = batch_indices(len(self.images), self.batch_size, self.seed, epoch, within)
        return batch[self.world.rank :: self.world.size]

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        """The batches of the steps start .. stop - 1, uint8 (N / W, 3, H, W) on the device."""
        order = (self.indices(step) for step in range(start, stop))
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
