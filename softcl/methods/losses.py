"""Methods as loss modules, to be used inside any training loop.

    queue = MemoryQueue(4096, 128)
    criterion = ASCLLoss(num_neighbors=5)
    loss = criterion(query, key, queue)      # query, key: (N, D) raw projections
    loss.backward()
    queue.enqueue(key)

A module owns its numbers and, if one is given, refers to queues. It never writes to a queue:
enqueue the keys yourself, after the loss (MSF: before it). Vectors are raw projections (N, D), and
are normalised inside; gradient flows to the student's alone. A queue is a ``MemoryQueue``, whose
filled rows take part, or a tensor (K, D) of unit rows; None takes the module's own.

Every class takes the numbers of its method by name (``temperature``, ``num_neighbors``, ...; see
the method's page), and

    reduction    "mean", "sum" or "none" (one loss per row)
    backend      of ``softcl.soft_contrastive_loss``
    queue        used when forward gets none
    world        ``softcl.distributed.World.joined()`` in a DDP program: methods that compare within
                 the batch then compare with that of all processes
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from softcl.distributed import ALONE, World
from softcl.methods.ascl import ASCL
from softcl.methods.method import Batch, Method
from softcl.methods.moco import MoCo
from softcl.methods.msf import MSF
from softcl.methods.nnclr import NNCLR
from softcl.methods.reco import ReCo
from softcl.methods.ressl import ReSSL
from softcl.methods.sce import SCE
from softcl.methods.snclr import SNCLR
from softcl.nn import MemoryQueue
from softcl.ops import REDUCTIONS

__all__ = [
    "ASCLLoss",
    "MSFLoss",
    "MethodLoss",
    "MoCoLoss",
    "NNCLRLoss",
    "ReCoLoss",
    "ReSSLLoss",
    "SCELoss",
    "SNCLRLoss",
]

Queue = MemoryQueue | Tensor
Pair = tuple[Tensor, Tensor]


class MethodLoss(nn.Module):
    """Base of the loss modules: numbers, queue, reduction."""

    method_class: ClassVar[type[Method]]

    def __init__(
        self,
        *,
        reduction: str = "mean",
        backend: str = "auto",
        queue: MemoryQueue | None = None,
        world: World = ALONE,
        **numbers: Any,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        # The queue's real length is known in forward; the operator checks there.
        numbers.setdefault("queue_size", 1 << 40)
        self.method = self.method_class(**numbers)
        self.reduction = reduction
        self.backend = backend
        self.queue = queue
        self.world = world

    def extra_repr(self) -> str:
        default = type(self.method)(queue_size=self.method.queue_size)
        changed = {
            name: getattr(self.method, name)
            for name in self.method.__dataclass_fields__
            if getattr(self.method, name) != getattr(default, name)
        }
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())

    def _rows_of(self, queue: Queue | None, name: str = "queue") -> Queue:
        queue = self.queue if queue is None else queue
        if queue is None:
            raise ValueError(f"{name} is missing: give one to forward or to the constructor")
        if isinstance(queue, MemoryQueue) and queue.filled == 0:
            raise ValueError(f"{name} is empty: enqueue keys first, or make it with init='random'")
        return queue

    def _reduced(
        self,
        student: dict[str, Tensor],
        teacher: dict[str, Tensor],
        queues: dict[str, Queue],
        predicted: dict[str, Tensor] | None = None,
        **rest: Any,
    ) -> Tensor:
        teacher = {name: rows.detach() for name, rows in teacher.items()}
        predicted = student if predicted is None else predicted
        batch = Batch(
            student, predicted, teacher, queues, backend=self.backend, world=self.world, **rest
        )
        rows = self.method.loss(batch).rows
        if self.reduction == "none":
            return rows
        return rows.mean() if self.reduction == "mean" else rows.sum()


class _QueueLoss(MethodLoss):
    """Query against key and queue."""

    def forward(
        self, query: Tensor | Pair, key: Tensor | Pair, queue: Queue | None = None
    ) -> Tensor:
        """The loss of query (N, D) with key (N, D) against the queue; gradient to query alone.

        With ``symmetric=True`` query and key are pairs: what the student and what the teacher make
        of the first and of the second view; the keys of both enter the queue.
        """
        queues = {"queue": self._rows_of(queue)} if self.method.queues() else {}
        if not self.method.symmetric:
            return self._reduced({"query": query}, {"key": key}, queues)
        student, teacher = (dict(zip(("query", "key"), x, strict=True)) for x in (query, key))
        return self._reduced(student, teacher, queues)


class ASCLLoss(_QueueLoss):
    """ASCL's loss (``softcl.methods.ascl``): ``criterion(query, key, queue)``.

    With ``form="byol"`` the query is the predictor's output and no queue is needed.
    """

    method_class = ASCL

    def __init__(
        self,
        labels: str = "soft",
        num_neighbors: int = 1,
        temperature: float = 0.1,
        teacher_temperature: float = 0.05,
        **rest: Any,
    ) -> None:
        super().__init__(
            labels=labels,
            num_neighbors=num_neighbors,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            **rest,
        )


class MoCoLoss(_QueueLoss):
    """MoCo's loss (``softcl.methods.moco``): ``criterion(query, key, queue)``."""

    method_class = MoCo


class SCELoss(_QueueLoss):
    """SCE's loss (``softcl.methods.sce``): ``criterion(query, key, queue)``.

    With ``use_keys=True`` the other keys of the batch take part beside the queue's rows.
    """

    method_class = SCE


class MSFLoss(_QueueLoss):
    """MSF's loss (``softcl.methods.msf``): ``criterion(query, key, queue)``.

    The query is the predictor's output. Enqueue the key before the loss.
    """

    method_class = MSF


class ReSSLLoss(_QueueLoss):
    """ReSSL's loss (``softcl.methods.ressl``): ``criterion(query, key, queue)``.

    query (V N, D) may be the projections of V strong crops stacked, V = ``crops``, crop by crop,
    with key (N, D) of the one weak view. ``use_keys`` is as in :class:`SCELoss`.
    """

    method_class = ReSSL

    def forward(
        self, query: Tensor | Pair, key: Tensor | Pair, queue: Queue | None = None
    ) -> Tensor:
        if self.method.symmetric:
            return super().forward(query, key, queue)
        names = self.method.student_sees()
        crops = dict(zip(names, query.chunk(len(names)), strict=True))
        return self._reduced(crops, {"key": key}, {"queue": self._rows_of(queue)})


class NNCLRLoss(MethodLoss):
    """NNCLR's loss (``softcl.methods.nnclr``), both directions."""

    method_class = NNCLR

    def forward(
        self,
        projections: tuple[Tensor, Tensor],
        predictions: tuple[Tensor, Tensor],
        queue: Queue | None = None,
    ) -> Tensor:
        """The loss of the projections and predictions of two views; gradient to predictions.

        Enqueue ``projections[0]`` afterwards.
        """
        student = dict(zip(("query", "key"), projections, strict=True))
        predicted = dict(zip(("query", "key"), predictions, strict=True))
        return self._reduced(student, {}, {"queue": self._rows_of(queue)}, predicted)


class SNCLRLoss(MethodLoss):
    """SNCLR's loss (``softcl.methods.snclr``), both directions.

    With ``form="paper"`` it also owns the attention's two maps f1 and f2, which must be trained
    with the rest; say the vectors' dimension with ``projection_dim``.
    """

    method_class = SNCLR

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.attention = nn.ModuleDict(self.method.heads())

    def forward(
        self,
        projections: tuple[Tensor, Tensor],
        predictions: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor],
        queue: Queue | None = None,
    ) -> Tensor:
        """The loss of two views' projections, predictions and teacher's projections.

        Enqueue ``keys[1]`` afterwards.
        """
        student, predicted, teacher = (
            dict(zip(("first", "second"), pair, strict=True))
            for pair in (projections, predictions, keys)
        )
        queues = {"queue": self._rows_of(queue)}
        return self._reduced(student, teacher, queues, predicted, heads=self.attention)


class ReCoLoss(MethodLoss):
    """ReCo's loss (``softcl.methods.reco``).

    ``order`` and ``share`` say how the mixed images were made: a share of image i of the query's
    view, the rest from image order[i] of the key's view (see ``softcl.methods.mixing``).
    """

    method_class = ReCo

    def __init__(self, *, weak_queue: MemoryQueue | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.weak_queue = weak_queue

    def forward(
        self,
        query: Tensor,
        mixed: Tensor,
        key: Tensor,
        weak_key: Tensor,
        order: Tensor,
        share: float,
        queue: Queue | None = None,
        weak_queue: Queue | None = None,
    ) -> Tensor:
        """The loss of query and mixed (N, D) with key and weak_key (N, D) against both queues.

        Enqueue ``key`` and ``weak_key`` afterwards, each in its queue.
        """
        weak_queue = self.weak_queue if weak_queue is None else weak_queue
        if weak_queue is None:
            raise ValueError("weak_queue is missing: give one to forward or to the constructor")
        queues = {
            "queue": self._rows_of(queue),
            "weak queue": self._rows_of(weak_queue, "weak_queue"),
        }
        return self._reduced(
            {"query": query, "mixed": mixed},
            {"key": key, "weak": weak_key},
            queues,
            notes={"order": order, "share": share},
        )
