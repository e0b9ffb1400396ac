"""A call of an operator as one record: its tensors, its numbers, and what is wanted of it.

The public functions make it, once, of arguments that are checked. A backend gets it whole: it may
decline anything it sees there, and reads what it needs by name. What torch.library has to know of
the two operators is derived from the records' fields.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softcl.labels import LabelRule
from softcl.ops.checks import check_temperature


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


# ---------------------------------------------------------------------------------- torch.library

# Temperatures travel as tensors, so that one that changes every step is no constant of a
# compiled graph; a rule as its numbers.
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "LabelRule": "float[]",
    "float": "Tensor",
    "int": "SymInt",
    "bool": "bool",
    "str": "str",
}


def schema(kind: type[Call]) -> str:
    """The operator's parameters as torch.library writes them, in the order of the fields."""
    types = kind.__annotations__.items()
    return ", ".join(f"{_SCHEMA_TYPES[annotation(t)]} {name}" for name, t in types)


def annotation(hint) -> str:
    """A field's annotation as it was written."""
    return getattr(hint, "__forward_arg__", hint)


_ONE = torch.ones(1, dtype=torch.float64)  # of one dimension: a 0-dim tensor becomes a symbol
_scalars: dict[float, Tensor] = {}


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor of one element on the CPU; a tensor is one already."""
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():
        # A product keeps a number that changes from becoming a constant of the graph.
        return _ONE * value
    found = _scalars.get(value)
    if found is None or type(like) is not Tensor:  # fake tensors take no part in the cache
        found = torch.full((), value, dtype=torch.float64)
        if type(found) is Tensor and len(_scalars) < 64:
            _scalars[value] = found
    return found


def pack(call: Call) -> tuple:
    """The operator's arguments."""
    query = call.query
    if isinstance(call, StatisticsCall):
        return (*call[:2], scalar(call.temperature, query), *call[3:])
    return (
        *call[:3],
        call.rule.to_numbers(),
        scalar(call.temperature, query),
        scalar(call.teacher_temperature, query),
        *call[6:],
    )


def unpack(kind: type[Call], arguments: tuple) -> Call:
    """The call of an operator's arguments. Temperatures stay tensors: a fake one has no value."""
    if kind is StatisticsCall:
        return StatisticsCall(*arguments)
    return LossCall(*arguments[:3], LabelRule.from_numbers(arguments[3]), *arguments[4:])


def read_temperatures(call: Call) -> Call:
    """The call with its temperatures as numbers, checked once more."""
    return type(call)(*_read(call, _TEMPERATURES[type(call)], ()))


def read(call: Call) -> Call:
    """The call as a backend gets it: temperatures that are numbers, and contiguous tensors."""
    kind = type(call)
    return kind(*_read(call, _TEMPERATURES[kind], _TENSORS[kind]))


def _read(call: Call, temperatures: list[int], tensors: list[int]) -> list:
    values = list(call)
    for place in temperatures:
        values[place] = value = float(values[place])
        check_temperature(call._fields[place], value)
    for place in tensors:
        if values[place] is not None:
            values[place] = values[place].contiguous()
    return values


def _places(names: tuple[str, ...]) -> dict[type, list[int]]:
    return {
        kind: [place for place, name in enumerate(kind._fields) if name in names]
        for kind in (StatisticsCall, LossCall)
    }


_TENSORS = _places(("query", "key", "queue", "excluded"))
_TEMPERATURES = _places(("temperature", "teacher_temperature"))
