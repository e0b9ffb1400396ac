"""Batches in a given order, with those of a set decoded on demand prepared ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from softcl.data.image_set import ImageSet


def batches(
    image_set: ImageSet,
    order: Iterable[torch.Tensor],
    *,
    device: torch.device | str = "cpu",
    depth: int = 2,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (indices (N,), uint8 images (N, 3, H, W) on `device`) for each index tensor of `order`.

    A resident set is indexed directly. For a set decoded on demand, one thread keeps `depth`
    batches ready, unless it was told to use no threads; order and content are those of `order`,
    whatever the number of workers.
    An error while decoding is raised at the batch concerned.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    device = torch.device(device)
    if image_set.resident or getattr(image_set.images, "workers", 1) == 0:
        for indices in order:
            yield indices, image_set.batch(indices).to(device, non_blocking=True)
        return

    def read(indices: torch.Tensor) -> torch.Tensor:
        images = image_set.batch(indices)
        return images.pin_memory() if device.type == "cuda" else images

    waiting: deque[tuple[torch.Tensor, Future]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="softcl-prefetch") as thread:
        try:
            for indices in order:
                waiting.append((indices, thread.submit(read, indices)))
                if len(waiting) > depth:
                    indices, future = waiting.popleft()
                    yield indices, future.result().to(device, non_blocking=True)
            while waiting:
                indices, future = waiting.popleft()
                yield indices, future.result().to(device, non_blocking=True)
        finally:
            for _, future in waiting:
                future.cancel()
