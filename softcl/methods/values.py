"""What a method's fields hold: plain Python values, whatever sort of number was given for them."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from torch import Tensor

_WANTED = {
    "float": (numbers.Real, "a number"),
    "int": (numbers.Integral, "an integer"),
    "bool": (bool, "True or False"),
    "str": (str, "a word"),
}
_KINDS = {"float": float, "int": int, "bool": bool, "str": str}


def plain_value(name: str, value: Any, annotation: Any) -> Any:
    """The value of a field as its annotation says: float, int, bool or str.

    NumPy's numbers and CPU tensors of no dimension are numbers; bools are none. Fields of other
    types are left as they are.

    Raises:
        TypeError: the value is of another type, or a tensor that would have to be waited for or
            that wants a gradient.
    """
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    if kind not in _WANTED:
        return value
    given, shown = value, repr(value)
    if isinstance(value, Tensor):
        shown = f"a tensor of shape {tuple(value.shape)} on {value.device}"
        if value.requires_grad:
            raise TypeError(f"{name} is a constant of the loss, got a tensor that requires grad")
        given = value.item() if value.dim() == 0 and value.device.type == "cpu" else value
    elif isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        given = value.item()
    wanted, what = _WANTED[kind]
    if not isinstance(given, wanted) or (isinstance(given, bool) and kind != "bool"):
        raise TypeError(f"{name} must be {what}, got {shown}")
    return _KINDS[kind](given)
