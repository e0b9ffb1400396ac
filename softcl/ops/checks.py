"""What the operator's arguments must satisfy: each unusable one gets one error that names it."""

from __future__ import annotations

import math
import numbers
import operator

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")

# Beyond them a logit of unit rows is no longer what its products were: all rows are equal to
# float32, or all but one have vanished.
COLDEST, HOTTEST = 1e-6, 1e6


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_rows(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be a matrix of row vectors, got shape {shape_of(tensor)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor, got dtype {tensor.dtype}")
    if tensor.shape[0] < 1 or tensor.shape[1] < 1:
        raise ValueError(f"{name} must not be empty, got shape {shape_of(tensor)}")


def check_rows_like(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    check_rows(name, tensor)
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but {like_name} is on {like.device}")
    if tensor.shape[1] != like.shape[1]:
        raise ValueError(
            f"{name} must have {like_name}'s dimension D={like.shape[1]}, "
            f"got shape {shape_of(tensor)}"
        )


def check_constant_rows(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    check_rows_like(name, tensor, like, like_name)
    if tensor.requires_grad and torch.is_grad_enabled():
        found = "requires grad"
    elif has_tangent(tensor):
        found = "has a tangent"
    else:
        return
    raise ValueError(
        f"{name} {found}, but only {like_name} has a gradient here: the labels and the "
        f"softmax treat {name} as constant; pass {name}.detach()"
    )


def has_tangent(tensor: Tensor) -> bool:
    """Whether it is a dual number (torch.func.jvp, torch.autograd.forward_ad)."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def check_excluded(excluded: Tensor | None, like: Tensor, num_rows: int) -> None:
    if excluded is None:
        return
    if not isinstance(excluded, Tensor):
        raise TypeError(f"excluded must be a tensor or None, got {type(excluded).__name__}")
    if excluded.dtype != torch.int64 or excluded.shape != like.shape[:1]:
        raise ValueError(
            f"excluded must be int64 of shape ({like.shape[0]},), one queue row or -1 for each "
            f"vector, got {excluded.dtype} of shape {shape_of(excluded)}"
        )
    if excluded.device != like.device:
        raise ValueError(f"excluded is on {excluded.device}, the vectors are on {like.device}")
    if num_rows < 2:
        raise ValueError(f"excluded needs a queue of at least 2 rows, got {num_rows}")
    if values_are_at_hand(excluded):
        low, high = int(excluded.min()), int(excluded.max())
        if low < -1 or high >= num_rows:
            raise ValueError(
                f"excluded must be between -1 and {num_rows - 1}, got {low if low < -1 else high}"
            )


def temperature_of(name: str, value: float | Tensor) -> float | Tensor:
    """A temperature as a float. A 0-dim tensor stays one: it is read, and checked, in the call."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(
                f"{name} must be a number or a 0-dim tensor, got {value.dtype} of shape "
                f"{shape_of(value)}"
            )
        if value.requires_grad and torch.is_grad_enabled() or has_tangent(value):
            raise ValueError(
                f"{name} requires grad or has a tangent, but no gradient here; pass {name}.detach()"
            )
        return value
    # float and int first: what comes after them is slow, and unknown to torch.compile.
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        value = float(value)
    check_temperature(name, value)
    return value


def check_temperature(name: str, value: float) -> None:
    if not COLDEST <= value <= HOTTEST:
        raise ValueError(
            f"{name} must be positive and finite, in [{COLDEST:g}, {HOTTEST:g}], got {value!r}"
        )


def integer_of(name: str, value: int) -> int:
    """An integer of any type as an int: numpy's and 0-dim tensors too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, Tensor) and (value.dim() or value.dtype == torch.bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def check_count(name: str, value: int, limit: int) -> None:
    if value < 0 or value > limit:
        raise ValueError(f"{name} must be between 0 and the queue's {limit} rows, got {value}")


def filled_rows(queue, filled: int | None):
    """The first ``filled`` rows of a queue, or all."""
    if filled is None:
        return queue
    filled = integer_of("filled", filled)
    if filled < 1 or filled > queue.shape[0]:
        raise ValueError(
            f"filled must be between 1 and the queue's {queue.shape[0]} rows, got {filled}"
        )
    return queue[:filled]


def values_are_at_hand(tensor: Tensor) -> bool:
    # A fake or traced tensor has no values, and a GPU's would have to be waited for.
    if torch.compiler.is_compiling():
        return False
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def all_finite(*tensors: Tensor) -> bool:
    for tensor in tensors:
        values = tensor.detach()
        # One operation in place of two: a sum of finite values is finite, or they are huge.
        if not math.isfinite(float(values.sum())) and not bool(torch.isfinite(values).all()):
            return False
    return True


def explain_non_finite(**tensors: Tensor) -> None:
    """Raise with the argument, and its first row, that made a result NaN or infinite."""
    for name, tensor in tensors.items():
        bad = (~torch.isfinite(tensor.detach()).all(1)).nonzero()
        if len(bad) > 0:
            raise ValueError(
                f"{name} has {len(bad)} row(s) that are not finite, the first is row {int(bad[0])}"
            )
    norms = {name: float(x.detach().double().norm(dim=1).max()) for name, x in tensors.items()}
    largest = max(norms, key=norms.get)
    raise ValueError(
        f"the result is not finite although every input is: {largest} has a row of norm "
        f"{norms[largest]:.3g}, and rows must have unit norm"
    )
