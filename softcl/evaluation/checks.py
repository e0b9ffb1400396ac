"""What the measures' arguments must satisfy: each unusable one gets one line that names it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from softcl.ops.call import (
    all_finite,
    check_rows,
    explain_non_finite,
    shape_of,
    values_are_at_hand,
)


def check_vectors(
    name: str, vectors: Tensor, other_name: str, others: Tensor, *, wait: bool = False
) -> None:
    """Refuse what are not rows (N, F) and rows (M, F); they may be on two devices.

    NaN and infinity are looked for where that waits for no device, or, with `wait`, everywhere.
    """
    check_rows(name, vectors)
    check_rows(other_name, others)
    if others.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"{other_name} must have {name}'s dimension {vectors.shape[1]}, got {shape_of(others)}"
        )
    given = {name: vectors, other_name: others}
    if not all(all_finite(rows) for rows in given.values() if wait or values_are_at_hand(rows)):
        explain_non_finite(**given)


def check_whole(name: str, value: int, most: int | None = None, limit: str = "{}") -> int:
    """A whole number from 1 to `most`, which `limit` tells; NumPy's too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1 or (most is not None and value > most):
        allowed = "at least 1" if most is None else f"between 1 and {limit.format(most)}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return int(value)


def check_positive(name: str, value: float) -> float:
    """A positive and finite number; NumPy's too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def check_labels(
    name: str, labels: Tensor, shape: Sequence[int], num_classes: int | None = None
) -> None:
    """Refuse what are not integers of a shape, and in [0, num_classes)."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got dtype {labels.dtype}")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {shape_of(labels)}")
    if num_classes is None or labels.numel() == 0:
        return
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= num_classes:
        worst = least if least < 0 else most
        raise ValueError(f"{name} must be in [0, num_classes={num_classes}), got {worst}")
