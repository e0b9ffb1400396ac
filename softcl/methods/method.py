"""What a method is: the views it wants, the vectors and queues it compares, and its loss.

A method is a frozen dataclass of numbers, derived from `Method` or, for those that compare two
views with one queue under a label rule, from `QueueMethod`. It holds no network, no queue and no
loop: `softcl.train.step.train_step` does for every method

    views     = views() of the images, then prepare() (CutMix, for one)
    EMA         of the teacher, if teacher_follows is "before"
    batch     = student's vectors of student_sees(), teacher's of teacher_sees()
    queues    <- keys(batch), if enqueue is "before"
    loss      = mean of loss(batch).rows; backward; optimiser
    EMA         if teacher_follows is "after"
    queues    <- keys(batch), if enqueue is "after"
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from softcl.distributed import ALONE, ShardedRows, World
from softcl.labels import LabelRule
from softcl.methods.values import plain_value
from softcl.ops import Diagnostics, soft_contrastive_loss

NORMS = ("none", "hidden", "unbiased", "all", "plain")
SCHEDULES = ("constant", "cosine")
WIDEST = 1 << 20  # units of a layer


@dataclass(frozen=True)
class View:
    """One random view of a batch of images.

    Attributes:
        recipe: of ``softcl.data.VIEWS``, such as "strong" or "weak".
        share: its side as a share of the run's image size, rounded (multi-crop).
        scale: area of its crop as a share of the image's, from .. to; None for the recipe's own.
    """

    recipe: str
    share: float = 1.0
    scale: tuple[float, float] | None = None


@dataclass(frozen=True)
class Batch:
    """What a loss sees. Vectors are (N, D) and not normalised.

    Attributes:
        student: the student's projection of each view that it saw, with gradient.
        predicted: what the predictor makes of it; the projection itself where there is none.
        teacher: the teacher's projection of each view that it saw, constant.
        queues: the queues (``softcl.nn.MemoryQueue``), or their rows (K, D).
        heads: trained modules besides the student, by name.
        notes: what `prepare` left for the loss.
        backend: of the operator.
        world: the processes that the batch is divided among; the vectors are this one's.
    """

    student: Mapping[str, Tensor]
    predicted: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    queues: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    world: World = ALONE

    def rows(self, name: str = "queue") -> Tensor | ShardedRows:
        """The rows of a queue that may take part in a loss, (K, D)."""
        queue = self.queues[name]
        return queue.rows[: queue.filled] if hasattr(queue, "filled") else queue

    # A loss that reads the whole batch asks these two: where several processes have a part each,
    # they tell of all.

    def all_gather(self, rows: Tensor, queue: Tensor | None = None) -> Tensor | ShardedRows:
        """Rows (N, D) of this batch as the set to compare with, and a queue's after them.

        Gradients reach the rows, in the process that has them.
        """
        world = self.world
        if world.alone:
            return rows if queue is None else torch.cat([rows, queue])
        if queue is None:  # constant rows travel once and are then at hand
            return ShardedRows(rows, world) if rows.requires_grad else world.all_gather_rows(rows)
        # Row j of the queue stands in place W N + j: with process j % W, as a part of a queue does.
        part = queue.local if isinstance(queue, ShardedRows) else queue[world.rank :: world.size]
        return ShardedRows(torch.cat([rows, part]), world, len(rows) * world.size + len(queue))

    def row_indices(self, rows: Tensor) -> Tensor:
        """The place of each of these rows in the whole batch, (N,) int64."""
        return self.world.row_indices(len(rows), rows.device)


class Result(NamedTuple):
    """The loss of every row, and what the operator saw on the way (or None)."""

    rows: Tensor
    shown: Diagnostics | None = None


@dataclass(frozen=True)
class Method:
    """Numbers that methods share; each has its own defaults.

    The lines below, and those of each method, are the help of the flags that the numbers are.

    Attributes:
        temperature: of the student's softmax.
        momentum: of the teacher: share of it kept at each step.
        momentum_schedule: "constant", or "cosine" to 1 at the end of the run.
        queue_size: K, rows of the memory queue.
        projection_dim: D, length of the vectors compared.
        projector_layers: linear layers of the projector.
        projector_hidden: width between the projector's layers.
        projector_norm: its batch norm: "none"; "hidden", after the hidden layers; "unbiased", as
            "hidden" with no bias; "all", after the last one too; "plain", as "all" with no bias
            and the last one not affine (MoCo v3).
        predictor_hidden: width of the predictor's hidden layer; 0 for no predictor.
        predictor_norm: as `projector_norm`.
        num_splits: splits of the batch norm in both encoders, with the teacher's batch shuffled;
            1 for plain batch norm.
        split_student: whether the student's batch norm is split too, or plain.
        student_view: recipe of the student's view.
        teacher_view: recipe of the teacher's view.
    """

    temperature: float = 0.1
    momentum: float = 0.99
    momentum_schedule: str = "constant"
    queue_size: int = 4096
    projection_dim: int = 128
    projector_layers: int = 2
    projector_hidden: int = 2048
    projector_norm: str = "none"
    predictor_hidden: int = 0
    predictor_norm: str = "hidden"
    num_splits: int = 8
    split_student: bool = True
    student_view: str = "strong"
    teacher_view: str = "weak"

    teacher_follows: ClassVar[str] = (
        "before"  # the forward passes; "after" the optimiser's step; "never"
    )
    enqueue: ClassVar[str] = "after"  # the loss; or "before" it
    # Values that a field may have; a field that is not here is checked by its range.
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        for each in fields(self):
            value = plain_value(each.name, getattr(self, each.name), each.type)
            object.__setattr__(self, each.name, value)
        for name, allowed in self.choices().items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("queue_size", "num_splits"):
            self.check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("projection_dim", "projector_hidden"):
            self.check(name, 1 <= getattr(self, name) <= WIDEST, f"in [1, {WIDEST}]")
        self.check("projector_layers", 1 <= self.projector_layers <= 8, "in [1, 8]")
        self.check("predictor_hidden", 0 <= self.predictor_hidden <= WIDEST, f"in [0, {WIDEST}]")
        self.check("momentum", 0.0 <= self.momentum <= 1.0, "in [0, 1]")
        for name, value in vars(self).items():
            if name.endswith("temperature"):
                self.check(name, 0.0 < value < math.inf, "positive and finite")
            elif name.endswith("weight"):
                self.check(name, 0.0 <= value < math.inf, "at least 0 and finite")
            elif name == "num_neighbors":
                allowed = f"in [0, queue_size={self.queue_size}]"
                self.check(name, 0 <= value <= self.queue_size, allowed)

    def check(self, name: str, good: bool, allowed: str) -> None:
        """Refuse the value of a field, in the line that every number of a method gets.

        Raises:
            ValueError: it is not good.
        """
        if not good:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The values that fields of words may have."""
        common = {"projector_norm": NORMS, "predictor_norm": NORMS, "momentum_schedule": SCHEDULES}
        return {**common, **cls.CHOICES}

    # What follows is the common case: one view for the student, one for the teacher, one queue.

    def views(self) -> dict[str, View]:
        """The views of a step, by name."""
        return {"query": View(self.student_view), "key": View(self.teacher_view)}

    def student_sees(self) -> tuple[str, ...]:
        """The views that the student encodes."""
        return ("query",)

    def teacher_sees(self) -> tuple[str, ...]:
        """The views that the teacher encodes; () for a method without a teacher."""
        return ("key",)

    def queues(self) -> dict[str, int]:
        """The rows K of each queue, by name."""
        return {"queue": self.queue_size}

    def keys(self, batch: Batch) -> dict[str, Tensor]:
        """What enters each queue, (N, D)."""
        return {"queue": batch.teacher["key"]}

    def prepare(
        self, views: dict[str, Tensor], generator: torch.Generator, world: World = ALONE
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The views, perhaps with more made of them, and notes for the loss.

        The generator is on the CPU, so that its numbers can be read without waiting for a device;
        it is the same in every process of the world.
        """
        return views, {}

    def heads(self) -> dict[str, nn.Module]:
        """Trained modules besides backbone, projector and predictor; the teacher has none."""
        return {}

    @property
    def student_splits(self) -> int:
        """Splits of the student's batch norm."""
        return self.num_splits if self.split_student else 1

    @property
    def shuffles(self) -> bool:
        """Whether the teacher sees the batch in another order than the student."""
        return self.num_splits > 1

    def rule(self) -> LabelRule | None:
        """The label rule, where the loss is `soft_contrastive_loss` with one."""
        return None

    @property
    def excludes(self) -> bool:
        """Whether rows leave a candidate out (``excluded``), which not every backend can."""
        return False

    def loss(self, batch: Batch) -> Result:
        """The loss of every row; the step takes their mean."""
        raise NotImplementedError


@dataclass(frozen=True)
class SymmetricMethod(Method):
    """A method of a student's and a teacher's view that may also run with the two swapped.

    Attributes:
        symmetric: both views go through both encoders, and the loss is the mean of the two
            directions against one snapshot of the queue; the keys of both enter it together.
    """

    symmetric: bool = False

    def student_sees(self) -> tuple[str, ...]:
        return ("query", "key") if self.symmetric else ("query",)

    def teacher_sees(self) -> tuple[str, ...]:
        return ("key", "query") if self.symmetric else ("key",)

    def keys(self, batch: Batch) -> dict[str, Tensor]:
        return {"queue": torch.cat([batch.teacher[name] for name in self.teacher_sees()])}


@dataclass(frozen=True)
class QueueMethod(SymmetricMethod):
    """A method whose loss is a label rule's over one queue.

    Attributes:
        teacher_temperature: of the teacher's softmax over the queue.
    """

    teacher_temperature: float = 0.05

    positive: ClassVar[bool] = True  # whether the positive is in the student's denominator

    def loss(self, batch: Batch) -> Result:
        return self.queue_loss(batch)

    def queue_loss(self, batch: Batch) -> Result:
        """The loss of the views stacked as rows of one call; the crops of a view share its key."""
        query = torch.cat([batch.predicted[name] for name in self.student_sees()])
        key = torch.cat([batch.teacher[name] for name in self.teacher_sees()])
        crops = len(query) // len(key)
        key = key.repeat(crops, 1) if crops > 1 else key
        return self.rule_loss(batch, query, key, batch.rows())

    def rule_loss(
        self, batch: Batch, query: Tensor, key: Tensor, candidates: Tensor, **options: Any
    ) -> Result:
        """The label rule's loss of query and key against candidates (K, D)."""
        rows, shown = soft_contrastive_loss(
            query,
            key,
            candidates,
            self.rule(),
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            positive=self.positive,
            reduction="none",
            normalize=True,
            diagnostics=True,
            backend=batch.backend,
            **options,
        )
        return Result(rows, shown)


@dataclass(frozen=True)
class RelationalMethod(QueueMethod):
    """A method of the teacher's relations, which may be those to the batch's other keys as well.

    Attributes:
        use_keys: the other keys of the batch stand beside the queue's rows, in the student's
            softmax and in the teacher's; a row's own key is in neither, but as its positive
            (github.com/juliendenize/eztorch). K is then the queue's rows + N - 1.
    """

    use_keys: bool = False

    @property
    def excludes(self) -> bool:
        return self.use_keys

    def loss(self, batch: Batch) -> Result:
        return self.keys_loss(batch) if self.use_keys else self.queue_loss(batch)

    def keys_loss(self, batch: Batch) -> Result:
        """Each direction against its own keys and the queue; the crops of a view share theirs."""
        teachers, views = self.teacher_sees(), self.student_sees()
        crops = len(views) // len(teachers)
        found = []
        for number, name in enumerate(teachers):
            query = torch.cat([batch.predicted[view] for view in views[number :: len(teachers)]])
            key = batch.teacher[name]
            candidates = batch.all_gather(normalize(key, dim=1), batch.rows())
            indices = batch.row_indices(key).repeat(crops)
            key = key.repeat(crops, 1)
            found.append(self.rule_loss(batch, query, key, candidates, excluded=indices))
        return Result(torch.cat([part.rows for part in found]), found[0].shown)
