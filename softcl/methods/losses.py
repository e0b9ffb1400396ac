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

The numbers are attributes too: reading one gives its value, and a new value is checked as the
method checks it and is used from then on. A schedule of the temperature:

    for step, (query, key) in enumerate(batches):
        criterion.temperature = 0.2 - 0.1 * step / len(batches)
        loss = criterion(query, key, queue)

torch.compile makes one more graph when the temperature first changes, and then no more.

Any other method has its module as well: ``MethodLoss(YourMethod, temperature=0.2)``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from softcl.methods.ascl import ASCL
from softcl.methods.method import Method
from softcl.methods.moco import MoCo
from softcl.methods.module import MethodLoss, Queue
from softcl.methods.msf import MSF
from softcl.methods.nnclr import NNCLR
from softcl.methods.reco import ReCo
from softcl.methods.ressl import ReSSL
from softcl.methods.sce import SCE
from softcl.methods.seed import SEED
from softcl.methods.snclr import SNCLR
from softcl.methods.vectors import check_order, check_share
from softcl.nn import MemoryQueue
from softcl.ops.call import check_rows, shape_of

__all__ = [
    "ASCLLoss",
    "MSFLoss",
    "MethodLoss",
    "MoCoLoss",
    "NNCLRLoss",
    "ReCoLoss",
    "ReSSLLoss",
    "SCELoss",
    "SEEDLoss",
    "SNCLRLoss",
]

Pair = tuple[Tensor, Tensor]


class _NamedLoss(MethodLoss):
    """A method's module whose arguments have the method's own words."""

    method_class: ClassVar[type[Method]]

    def __init__(self, **options: Any) -> None:
        super().__init__(self.method_class, **options)


class _QueueLoss(_NamedLoss):
    """Query against key and queue."""

    def forward(
        self, query: Tensor | Pair, key: Tensor | Pair, queue: Queue | None = None
    ) -> Tensor:
        """The loss of query (N, D) with key (N, D) against the queue; gradient to query alone.

        With ``symmetric=True`` query and key are pairs: what the student and what the teacher make
        of the first and of the second view; the keys of both enter the queue.
        """
        student = self._vectors("query", query, self.method.student_sees())
        return self._loss(student, self._keys(key), queue=queue)

    def _keys(self, key: Tensor | Pair) -> dict[str, Tensor]:
        return self._vectors("key", key, self.method.teacher_sees())


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


class SEEDLoss(_QueueLoss):
    """SEED's loss (``softcl.methods.seed``): ``criterion(query, key, queue)``.

    The key is the frozen teacher's embedding of the very view that the query was made of.
    """

    method_class = SEED


class ReSSLLoss(_QueueLoss):
    """ReSSL's loss (``softcl.methods.ressl``): ``criterion(query, key, queue)``.

    query (V N, D) may be the projections of V strong crops stacked, V = ``crops``, crop by crop,
    with key (N, D) of the one weak view. ``use_keys`` is as in :class:`SCELoss`.
    """

    method_class = ReSSL

    def forward(
        self, query: Tensor | Pair, key: Tensor | Pair, queue: Queue | None = None
    ) -> Tensor:
        crops = self.method.crops
        if crops == 1 or not isinstance(query, Tensor):
            return super().forward(query, key, queue)
        keys = self._keys(key)
        check_rows("query", query)
        check_rows("key", key)
        if query.shape[0] != crops * key.shape[0]:
            raise ValueError(
                f"query must have crops={crops} times key's {key.shape[0]} rows, "
                f"got shape {shape_of(query)}"
            )
        student = {f"query[{n}]": rows for n, rows in enumerate(query.chunk(crops))}
        return self._loss(student, keys, queue=queue)


class NNCLRLoss(_NamedLoss):
    """NNCLR's loss (``softcl.methods.nnclr``), both directions."""

    method_class = NNCLR

    def forward(self, projections: Pair, predictions: Pair, queue: Queue | None = None) -> Tensor:
        """The loss of the projections and predictions of two views; gradient to predictions.

        Enqueue ``projections[0]`` afterwards.
        """
        sees = self.method.student_sees()
        student = self._vectors("projections", projections, sees)
        return self._loss(student, {}, self._vectors("predictions", predictions, sees), queue=queue)


class SNCLRLoss(_NamedLoss):
    """SNCLR's loss (``softcl.methods.snclr``), both directions.

    With ``form="paper"`` it also owns the attention's two maps f1 and f2, which must be trained
    with the rest; say the vectors' dimension with ``projection_dim``.
    """

    method_class = SNCLR

    @property
    def attention(self) -> nn.ModuleDict:
        """The maps f1 and f2; empty with ``form="code"``."""
        return self.heads

    def forward(
        self, projections: Pair, predictions: Pair, keys: Pair, queue: Queue | None = None
    ) -> Tensor:
        """The loss of two views' projections, predictions and teacher's projections.

        Enqueue ``keys[1]`` afterwards.
        """
        sees = self.method.student_sees()
        return self._loss(
            self._vectors("projections", projections, sees),
            self._vectors("keys", keys, self.method.teacher_sees()),
            self._vectors("predictions", predictions, sees),
            queue=queue,
        )


class ReCoLoss(_NamedLoss):
    """ReCo's loss (``softcl.methods.reco``).

    ``order`` and ``share`` say how the mixed images were made: a share of image i of the query's
    view, the rest from image order[i] of the key's view (see ``softcl.methods.mixing``). Without
    the local term ``mixed``, ``order`` and ``share`` may be None, without the global one
    ``weak_key`` and its queue.
    """

    method_class = ReCo

    def __init__(self, *, weak_queue: MemoryQueue | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.weak_queue = weak_queue

    def forward(
        self,
        query: Tensor,
        mixed: Tensor | None,
        key: Tensor,
        weak_key: Tensor | None,
        order: Tensor | None,
        share: float | None,
        queue: Queue | None = None,
        weak_queue: Queue | None = None,
    ) -> Tensor:
        """The loss of query and mixed (N, D) with key and weak_key (N, D) against both queues.

        Enqueue ``key`` and ``weak_key`` afterwards, each in its queue.
        """
        student, teacher = {"query": query}, {"key": key}
        if self.method.local_weight:
            student["mixed"] = mixed
            check_rows("query", query)
            check_order(order, query, self.world)
            check_share(share)
        if self.method.global_weight:
            teacher["weak_key"] = weak_key
        weak_queue = self.weak_queue if weak_queue is None else weak_queue
        queues = {"queue": self.queue if queue is None else queue, "weak queue": weak_queue}
        notes = {"order": order, "share": share}
        return self._loss(student, teacher, queue=queues, notes=notes)
