"""Batches in a given order, with those that are decoded on demand prepared ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from softcl.data.image_set import CropOrder, ImageSet

Wanted = torch.Tensor | CropOrder
Pixels = torch.Tensor | dict[str, torch.Tensor]


def batches(
    image_set: ImageSet,
    order: Iterable[Wanted],
    *,
    device: torch.device | str = "cpu",
    depth: int = 2,
) -> Iterator[tuple[Wanted, Pixels]]:
    """Yield (wanted, its pixels on `device`) for each entry of `order`.

    An index tensor (N,) gives uint8 images (N, 3, H, W), a `CropOrder` a dictionary of crops. A
    resident set without files is indexed directly. Where images are decoded on demand, one thread
    keeps `depth` batches ready, unless the set was told to use no threads; order and content are
    those of `order`, whatever the number of workers.
    An error while decoding is raised at the batch concerned.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    device = torch.device(device)
    source = image_set.images if image_set.files is None else image_set.files
    if isinstance(source, torch.Tensor) or getattr(source, "workers", 1) == 0:
        for wanted in order:
            yield wanted, _moved(image_set.read(wanted), device)
        return

    def read(wanted: Wanted) -> Pixels:
        pixels = image_set.read(wanted)
        return _pinned(pixels) if device.type == "cuda" else pixels

    waiting: deque[tuple[Wanted, Future]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="softcl-prefetch") as thread:
        try:
            for wanted in order:
                waiting.append((wanted, thread.submit(read, wanted)))
                if len(waiting) > depth:
                    wanted, future = waiting.popleft()
                    yield wanted, _moved(future.result(), device)
            while waiting:
                wanted, future = waiting.popleft()
                yield wanted, _moved(future.result(), device)
        finally:
            for _, future in waiting:
                future.cancel()


def _moved(pixels: Pixels, device: torch.device) -> Pixels:
    if isinstance(pixels, dict):
        return {name: part.to(device, non_blocking=True) for name, part in pixels.items()}
    return pixels.to(device, non_blocking=True)


def _pinned(pixels: Pixels) -> Pixels:
    if isinstance(pixels, dict):
        return {name: part.pin_memory() for name, part in pixels.items()}
    return pixels.pin_memory()
