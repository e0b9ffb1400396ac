"""The images of a run in their order: random numbers without state, batches, reading ahead.

Random numbers are pure functions of integers, the same on every machine. A stream has a 64-bit key
made by `mix` from integers (seed, epoch, index, ...). Its i-th word is the finaliser of SplitMix64
(Steele, Lea, Flood, OOPSLA 2014) applied to key + (i + 1) * GOLDEN. Nothing has to be drawn in
order, so a sample never depends on how many others were made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from softcl.data.image_set import ImageSet, Pixels, Wanted
from softcl.memory import moved, pinned

AHEAD = 2  # batches that are decoded before they are asked for
LANES, WINDOW = 8, 512  # shards that are read at a time, and images of each that are mixed
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _finalise(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Keys (uint64) from integers or integer arrays that broadcast; the order of values matters.

    Negative integers are taken modulo 2^64.
    """
    key = np.zeros(1, dtype=np.uint64)
    for value in values:
        if isinstance(value, int):
            value = np.array([value % 2**64], dtype=np.uint64)
        key = _finalise(key + np.asarray(value).astype(np.uint64) + GOLDEN)
    return key


def words(keys: np.ndarray, count: int) -> np.ndarray:
    """The first `count` words of each stream: keys (n,) uint64 -> (n, count) uint64."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return _finalise(keys[:, None] + steps)


# ------------------------------------------------------------------------------------------- order


@lru_cache(maxsize=2)
def _epoch_order(
    num_samples: int, seed: int, epoch: int, shards: tuple[int, ...] = ()
) -> torch.Tensor:
    # Sorting by 64-bit random keys is an unbiased shuffle that needs no library's generator, so the
    # order stays the same across torch and numpy versions. Cached: steps of one epoch share it.
    keys = words(mix(seed, epoch), num_samples)[0]
    if shards:
        keys = _in_lanes(keys, shards, words(mix(seed, epoch, 1), len(shards))[0])
    return torch.from_numpy(np.argsort(keys, kind="stable"))


def _in_lanes(keys: np.ndarray, shards: tuple[int, ...], shard_keys: np.ndarray) -> np.ndarray:
    """Keys to sort by so that LANES shards at a time are read from front to back, mixed.

    Shards in random order are put behind each other in LANES lanes, each into the one that is the
    shortest so far. An image comes as late as its place in its lane says, and up to WINDOW places,
    or an average shard, later.
    """
    ends = [*shards[1:], len(keys)]
    result, lengths = np.empty(len(keys)), np.zeros(LANES)
    for shard in np.argsort(shard_keys, kind="stable"):
        start, stop = shards[shard], ends[shard]
        lane = lengths.argmin()
        result[start:stop] = lengths[lane] + np.arange(stop - start)
        lengths[lane] += stop - start
    window = min(WINDOW, len(keys) / len(shards))
    return result + keys * (window / 2.0**64)


def batch_indices(
    num_samples: int,
    batch_size: int,
    seed: int,
    epoch: int,
    step: int,
    shards: tuple[int, ...] = (),
) -> torch.Tensor:
    """Indices (batch_size,) int64 of batch number `step` of an epoch.

    Every epoch is a fresh permutation of range(num_samples), cut into num_samples // batch_size
    batches; the samples left over are dropped in that epoch. `seed` is any integer (modulo 2^64).
    With `shards`, the first index of each, it is one in which shards are read nearly from front to
    back, LANES at a time.

    Raises ValueError where no such batch exists.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    steps = num_samples // batch_size
    if steps == 0:
        raise ValueError(
            f"batch_size={batch_size} is larger than the {num_samples} samples: "
            "an epoch has no whole batch"
        )
    if epoch < 0:
        raise ValueError(f"epoch must be at least 0, got {epoch}")
    if not 0 <= step < steps:
        raise ValueError(f"step must be in [0, {steps}), got {step}")
    order = _epoch_order(num_samples, seed, epoch, shards)
    return order[step * batch_size : (step + 1) * batch_size].clone()


# ----------------------------------------------------------------------------------- reading ahead


def batches(
    image_set: ImageSet,
    order: Iterable[Wanted],
    *,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Wanted, Pixels]]:
    """Yield (wanted, its pixels on `device`) for each entry of `order`.

    An index tensor (N,) gives uint8 images (N, 3, H, W), a `CropOrder` a dictionary of crops. A
    resident set without files is indexed directly. Where images are decoded on demand, one thread
    keeps AHEAD batches ready, unless the set was told to use no threads; order and content are
    those of `order`, whatever the number of workers.
    An error while decoding is raised at the batch concerned.
    """
    device = torch.device(device)
    source = image_set.images if image_set.files is None else image_set.files
    if isinstance(source, torch.Tensor) or source.workers == 0:
        for wanted in order:
            yield wanted, _each(moved, image_set.read(wanted), device)
        return

    def read(wanted: Wanted) -> Pixels:
        return _each(pinned, image_set.read(wanted), device)

    waiting: deque[tuple[Wanted, Future]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="softcl-prefetch") as thread:
        try:
            for wanted in order:
                waiting.append((wanted, thread.submit(read, wanted)))
                if len(waiting) > AHEAD:
                    wanted, future = waiting.popleft()
                    yield wanted, _each(moved, future.result(), device)
            while waiting:
                wanted, future = waiting.popleft()
                yield wanted, _each(moved, future.result(), device)
        finally:
            for _, future in waiting:
                future.cancel()


def _each(function: Callable, pixels: Pixels, device: torch.device) -> Pixels:
    if isinstance(pixels, dict):
        return {name: function(part, device) for name, part in pixels.items()}
    return function(pixels, device)
