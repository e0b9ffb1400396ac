"""A call of an operator as one record: its tensors, its numbers, and what is wanted of it.

The public functions check the arguments and make it, once. A backend gets it whole: it may decline
anything it sees there, and reads what it needs by name. What torch.library has to know of the two
operators is derived from the records' fields (library.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from softcl.labels import TEACHER_POSITIVES, LabelRule
from softcl.native import ELEMENT_TYPES


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


class StatisticsCall(NamedTuple):
    """Statistics of softmax_j(v . Q_j / temperature) for every row v, and its k nearest rows.

    Attributes:
        query: (N, D) the vectors v.
        queue: (K, D).
        temperature: > 0.
        num_neighbors: k.
        sums: log-sum-exp, mean and entropy are wanted; a search for neighbours alone otherwise.
        excluded: (N,) int64, a queue row that takes no part for this vector, or -1; or None.
        backend: "auto" or a backend's name.
    """

    query: Tensor
    queue: Tensor
    temperature: float
    num_neighbors: int
    sums: bool
    excluded: Tensor | None = None
    backend: str = "auto"

    operation = "queue_statistics"

    def empty_results(self) -> dict[str, Tensor]:
        """lse (N,), mean (N, D), entropy (N,), neighbor_logits and neighbor_indices (N, k).

        Without ``sums`` the first three have no rows.
        """
        (n, d), k = self.query.shape, self.num_neighbors
        rows = n if self.sums else 0
        make, dtype = self.query.new_empty, sum_dtype(self.query, self.queue)
        return {
            "lse": make((rows,), dtype=dtype),
            "mean": make((rows, d), dtype=dtype),
            "entropy": make((rows,), dtype=dtype),
            "neighbor_logits": make((n, k), dtype=dtype),
            "neighbor_indices": make((n, k), dtype=torch.int64),
        }


class LossCall(NamedTuple):
    """The loss of a label rule against the student's softmax, and its gradient.

    Attributes:
        query, key: (N, D), of one dtype.
        queue: (K, D).
        rule: see :mod:`softcl.labels`.
        temperature, teacher_temperature: > 0.
        positive: the positive takes part in the student's softmax.
        normalize: query and key are divided by their norms first, rounded to their dtype.
        excluded: (N,) int64, a queue row that takes no part for this row, or -1; or None.
        gradient: the gradient in ``query`` is wanted.
        diagnostics: confidence, entropy, rank and neighbours are wanted.
        backend: "auto" or a backend's name.
    """

    query: Tensor
    key: Tensor
    queue: Tensor
    rule: LabelRule
    temperature: float
    teacher_temperature: float
    positive: bool
    normalize: bool
    excluded: Tensor | None
    gradient: bool
    diagnostics: bool
    backend: str = "auto"

    operation = "soft_contrastive"

    @property
    def num_neighbors(self) -> int:
        return self.rule.num_neighbors

    def empty_results(self) -> dict[str, Tensor]:
        """loss (N,), dquery (N, D), confidence, entropy, positive_rank (N,), neighbor_indices
        (N, n). What is not wanted, or what the rule does not compute, is empty."""
        n, d = self.query.shape
        diagnostics, rule = self.diagnostics, self.rule
        shown = n if diagnostics and rule.needs_softmax else 0
        make, dtype = self.query.new_empty, sum_dtype(self.query, self.queue)
        return {
            "loss": make((n,), dtype=dtype),
            "dquery": make((n, d) if self.gradient else (0,), dtype=dtype),
            "confidence": make((shown,), dtype=dtype),
            "entropy": make((shown,), dtype=dtype),
            "positive_rank": make((n if diagnostics else 0,), dtype=torch.int64),
            "neighbor_indices": make(
                (n, rule.num_neighbors if diagnostics else 0), dtype=torch.int64
            ),
        }


Call = StatisticsCall | LossCall


def coldest(call: Call) -> float:
    """The smallest temperature in use: unit rows bound the logits by its inverse."""
    if isinstance(call, LossCall) and call.rule.needs_softmax:
        return min(call.temperature, call.teacher_temperature)
    return call.temperature


# ---------------------------------------------------------------------------------- for C++


def unsupported_types(call: Call) -> str | None:
    for name, rows in (("vectors", call.query), ("queue", call.queue)):
        if rows.dtype not in ELEMENT_TYPES:
            return f"the {name} are {rows.dtype}, not float32, bfloat16 or float16"
    return None


_TENSORS = ("query", "key", "queue", "excluded")
# Fields that say what is wanted: C++ sees it by which results have an address.
_WANTED = ("sums", "gradient", "diagnostics", "backend", "num_neighbors")


def fields_of(call: Call, results: dict[str, Tensor]) -> dict[str, object]:
    """``call`` and its results as the fields of struct Call in csrc/include/softcl/call.h."""
    rule = (
        _rule_fields(call.rule)
        if isinstance(call, LossCall)
        else {"num_neighbors": call.num_neighbors}
    )
    fields = dict(zip(call._fields, call, strict=True), rule=rule)
    for name in _WANTED:
        fields.pop(name, None)
    for name in _TENSORS:
        if name in fields:
            tensor = fields[name]
            fields[name] = 0 if tensor is None else tensor.data_ptr()
    for name, result in results.items():
        fields[name] = result.data_ptr()
    fields["num_queries"], fields["dim"] = call.query.shape
    fields["queue_size"] = call.queue.shape[0]
    fields["vector_type"] = ELEMENT_TYPES[call.query.dtype]
    fields["queue_type"] = ELEMENT_TYPES[call.queue.dtype]
    return fields


@functools.lru_cache(maxsize=256)
def _rule_fields(rule: LabelRule) -> dict[str, object]:
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    fields["teacher_positive"] = TEACHER_POSITIVES.index(rule.teacher_positive)
    return fields


# ---------------------------------------------------------------------------------- checks

# Each unusable argument gets one error that names it.

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
