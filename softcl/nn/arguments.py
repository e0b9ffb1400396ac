"""Numbers as callers have them: of Python, of NumPy, or in a tensor without dimensions."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch


def as_int(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int: an integer of Python or NumPy, or a 0-dim integer tensor on the CPU.

    Raises:
        TypeError: it is none of these; a bool and a float are none.
        ValueError: it is below ``least``.
    """
    if isinstance(value, torch.Tensor):
        whole = value.dtype != torch.bool and not (value.is_floating_point() or value.is_complex())
        known = whole and _is_number_at_hand(value)
    else:
        # An array of one element has __index__ too, and so has NumPy's bool in old versions.
        known = hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0 and not _bool(value)
    if not known:
        raise TypeError(f"{name} must be an int, got {value!r}")
    number = operator.index(value)
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def as_float(name: str, value: Any) -> float:
    """``value`` as a float: a real number of Python or NumPy, or a 0-dim tensor on the CPU.

    A tensor on another device is refused: reading it would make the host wait.

    Raises:
        TypeError: it is none of these; a bool is none.
    """
    if isinstance(value, float):  # torch.compile can follow this line, not the next ones
        return value
    if isinstance(value, torch.Tensor):
        real = value.dtype != torch.bool and not value.is_complex()
        if real and _is_number_at_hand(value):
            return float(value.detach())
    elif isinstance(value, numbers.Real) and not _bool(value):
        return float(value)
    raise TypeError(f"{name} must be a number (a tensor: 0-dim, on the CPU), got {value!r}")


def _is_number_at_hand(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 0 and tensor.device.type == "cpu"


def _bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b"
