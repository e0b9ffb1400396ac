"""Shuffling without state: the batch of (seed, epoch, step) is a pure function of these numbers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from softcl.data.counter import mix, words


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    # Sorting by 64-bit random keys is an unbiased shuffle that needs no library's generator, so the
    # order stays the same across torch and numpy versions. Cached: steps of one epoch share it.
    keys = words(mix(seed, epoch), num_samples)[0]
    return torch.from_numpy(np.argsort(keys, kind="stable"))


def num_batches(num_samples: int, batch_size: int) -> int:
    """Whole batches in an epoch; the last incomplete one is dropped."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_samples < 0:
        raise ValueError(f"num_samples must be at least 0, got {num_samples}")
    return num_samples // batch_size


def batch_indices(
    num_samples: int, batch_size: int, seed: int, epoch: int, step: int
) -> torch.Tensor:
    """Indices (batch_size,) int64 of batch number `step` of an epoch.

    Every epoch is a fresh permutation of range(num_samples), cut into num_samples // batch_size
    batches; the samples left over are dropped in that epoch. `seed` is any integer (modulo 2^64).

    Raises ValueError where no such batch exists.
    """
    steps = num_batches(num_samples, batch_size)
    if steps == 0:
        raise ValueError(
            f"batch_size={batch_size} is larger than the {num_samples} samples: "
            "an epoch has no whole batch"
        )
    if epoch < 0:
        raise ValueError(f"epoch must be at least 0, got {epoch}")
    if not 0 <= step < steps:
        raise ValueError(f"step must be in [0, {steps}), got {step}")
    order = _epoch_order(num_samples, seed, epoch)
    return order[step * batch_size : (step + 1) * batch_size].clone()
