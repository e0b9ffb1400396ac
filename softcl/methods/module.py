"""The loss module of any method: its numbers, its trained maps, and one call."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softcl.distributed import ALONE, World
from softcl.methods import METHODS
from softcl.methods.method import Batch, Method
from softcl.methods.vectors import check_finite, check_queue, check_same, vectors_of
from softcl.nn import MemoryQueue
from softcl.ops import REDUCTIONS

Queue = MemoryQueue | Tensor
Queues = Queue | Mapping[str, Queue]
Vectors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

# Where the queue's real length is known, in forward, the operator checks the number of neighbours.
_ANY_SIZE = 1 << 40


class MethodLoss(nn.Module):
    """The loss of a method: ``criterion(student, teacher, queue)``. Base of the named modules.

    Args:
        method: a class of ``softcl.methods.Method``, or one with its numbers.
        reduction: "mean", "sum" or "none" (one loss per row).
        backend: of the operator.
        queue: used when forward gets none; several by name, as ``method.queues()`` names them.
        world: the processes that the batch is divided among.
        numbers: of the method, by name.

    ``heads`` holds what the method trains besides the student (``method.heads()``): give its
    parameters to the optimiser. A subclass names attributes of its own in the class.

    Raises:
        TypeError, ValueError: a number is unknown or unusable; the message names it.
    """

    def __init__(
        self,
        method: Method | type[Method],
        *,
        reduction: str = "mean",
        backend: str = "auto",
        queue: Queues | None = None,
        world: World = ALONE,
        **numbers: Any,
    ) -> None:
        super().__init__()
        self.reduction = _checked_reduction(reduction)
        self.backend = backend
        self.queue = nn.ModuleDict(queue) if isinstance(queue, Mapping) else queue
        self.world = world
        made = _made(method, numbers, type(self).__name__)
        self.heads = nn.ModuleDict(made.heads())
        for name in _numbers(made):
            if hasattr(self, name):
                raise ValueError(f"{type(made).__name__}.{name} must have another name: a loss "
                                 "module has an attribute of that one")  # fmt: skip
        self.method = made

    def forward(
        self,
        student: Vectors,
        teacher: Vectors | None = None,
        queue: Queues | None = None,
        *,
        predicted: Vectors | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The loss of what student and teacher make of their views; gradient to the student's.

        Args:
            student: (N, D) for each view of ``method.student_sees()``: one tensor, or several in
                the order of ``method.views()``, or by name.
            teacher: the same for ``method.teacher_sees()``.
            queue: one, or several by name, as ``method.queues()`` names them.
            predicted: what the predictor makes of ``student``; None for that itself.
            notes: what ``method.prepare`` left for the loss.
        """
        sees = self.method.student_sees()
        return self._loss(
            self._vectors("student", student, sees),
            self._vectors("teacher", teacher, self.method.teacher_sees()),
            None if predicted is None else self._vectors("predicted", predicted, sees),
            queue=queue,
            notes=notes,
        )

    def _vectors(self, argument: str, given: Vectors, sees: tuple[str, ...]) -> dict[str, Tensor]:
        return vectors_of(self.method, argument, given, sees)

    def _loss(
        self,
        student: dict[str, Tensor],
        teacher: dict[str, Tensor],
        predicted: dict[str, Tensor] | None = None,
        *,
        queue: Queues | None,
        notes: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The reduced loss of vectors in the order of the views, by their names in messages."""
        method = self.method
        every = {**student, **(predicted or {}), **teacher}
        check_same(every)
        check_finite(every)
        queues = self._queues(queue)
        for name, rows in queues.items():
            check_queue(_argument(name), rows, *next(iter(student.items())))
        projected = dict(zip(method.student_sees(), student.values(), strict=True))
        batch = Batch(
            projected,
            dict(zip(projected, predicted.values(), strict=True)) if predicted else projected,
            {
                view: x.detach()
                for view, x in zip(method.teacher_sees(), teacher.values(), strict=True)
            },
            queues,
            heads=self.heads,
            notes=notes or {},
            backend=self.backend,
            world=self.world,
        )
        rows = method.loss(batch).rows
        if self.reduction == "none":
            return rows
        return rows.mean() if self.reduction == "mean" else rows.sum()

    def _queues(self, given: Queues | None) -> dict[str, Queue]:
        """The method's queues by name, of those given and the module's own."""
        queues = {}
        for name in self.method.queues():
            is_main_process = not queues  # which may be given without its name
            queues[name] = _named(given, name, is_main_process)
            if queues[name] is None:
                queues[name] = _named(self.queue, name, is_main_process)
            if queues[name] is None:
                raise ValueError(
                    f"{_argument(name)} is missing: give one to forward or to the constructor"
                )
        return queues

    def extra_repr(self) -> str:
        shown = [type(self.method).__name__] if type(self) is MethodLoss else []
        for field in dataclasses.fields(self.method):
            value = getattr(self.method, field.name)
            if value != field.default and (field.name, value) != ("queue_size", _ANY_SIZE):
                shown.append(f"{field.name}={value!r}")
        return ", ".join(shown)

    # The method's numbers are attributes of the module.

    def __getattr__(self, name: str) -> Any:
        method = self.__dict__.get("method")
        if method is not None and name in _numbers(method):
            return getattr(method, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        method = self.__dict__.get("method")
        if method is None:  # still being made
            super().__setattr__(name, value)
        elif name in _numbers(method):
            self.method = dataclasses.replace(method, **{name: value})
        else:
            if name == "method":
                self._check_method(value)
            elif name == "reduction":
                _checked_reduction(value)
            else:
                self._check_name(name, value)
            super().__setattr__(name, value)

    def _check_method(self, method: Method) -> None:
        if type(method) is not type(self.method):
            raise TypeError(f"method must be one of {type(self.method).__name__}, got {method!r}")
        before, after = _shapes(self.method), _shapes(method)
        if before != after:
            changed = [n for n in _numbers(method) if getattr(method, n) != getattr(self.method, n)]
            values = ", ".join(f"{name}={getattr(method, name)!r}" for name in changed)
            raise ValueError(f"{values} changes the trained maps in heads: make a new module")

    def _check_name(self, name: str, value: Any) -> None:
        """Refuse an attribute that nothing would read."""
        known = {*self.__dict__, *self._parameters, *self._buffers, *self._modules}
        if name.startswith("_") or name in known or hasattr(type(self), name):
            return
        plain = isinstance(value, (numbers.Number, str, bool)) or (
            isinstance(value, Tensor) and value.dim() == 0
        )
        if plain or any(name in _numbers(kind) for kind in METHODS.values()):
            raise AttributeError(_unknown(name, self.method, type(self).__name__))


def _numbers(method: Method | type[Method]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(method))


def _made(method: Method | type[Method], given: dict[str, Any], module: str) -> Method:
    """The method with the numbers given."""
    is_class = isinstance(method, type)
    if not (issubclass(method, Method) if is_class else isinstance(method, Method)):
        raise TypeError(f"method must be a softcl.methods.Method, got {method!r}")
    for name in given:
        if name not in _numbers(method):
            raise TypeError(_unknown(name, method, module))
    if is_class:
        return method(**{"queue_size": _ANY_SIZE, **given})
    return dataclasses.replace(method, **given)


def _unknown(name: str, method: Method | type[Method], module: str) -> str:
    """One line about a name that is no number of the method's."""
    own = _numbers(method)
    near = difflib.get_close_matches(name, [*own, "reduction", "backend", "queue", "world"], n=1)
    owners = [kind.__name__ for kind in METHODS.values() if name in _numbers(kind)]
    whose = f" (a number of {', '.join(owners)})" if owners else ""
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{module} has no {name!r}{whose}{hint}"


def _shapes(method: Method) -> dict[str, torch.Size]:
    """Of what the method's heads hold, by name."""
    with torch.device("meta"):  # no memory, no random numbers
        heads = nn.ModuleDict(method.heads())
    return {name: held.shape for name, held in heads.state_dict().items()}


def _checked_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return reduction


def _argument(queue: str) -> str:
    """A queue's name as an argument is spelled."""
    return queue.replace(" ", "_")


def _named(queues: Queues | None, name: str, is_main_process: bool) -> Queue | None:
    if isinstance(queues, (Mapping, nn.ModuleDict)):
        return queues[name] if name in queues else None
    return queues if is_main_process else None
