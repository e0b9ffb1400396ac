"""SEED: a small student learns what a large frozen teacher knows, without labels.

Fang et al., ICLR 2021, arXiv 2101.04731. "Code" below is github.com/jacobswan1/SEED.

    student   z = normalise(projector(backbone(view)))                gradient
    teacher   t = normalise(teacher(the same view))                   no gradient; evaluation mode
    y    = softmax([t . t, t . Q_1, .., t . Q_K] / teacher_temperature)
    p    = softmax([z . t, z . Q_1, .., z . Q_K] / temperature)
    loss = - mean over the batch of sum_j y_j log p_j

Label rule: the teacher's softmax over its own embedding and the queue. Order: forward passes, loss,
SGD, then t into the queue. The teacher never changes: its batch norm has its stored statistics, and
there is no moving average.

t is the teacher's pooled feature, so D is its width; the student's projector maps to that. (The
code's teacher keeps the projector it was trained with, which ends in 128 dimensions.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcl.labels import DistillationLabels, LabelRule
from softcl.methods.defaults import Defaults, mnn_bench_defaults, shapes_defaults
from softcl.methods.method import QueueMethod, View


@dataclass(frozen=True)
class SEED(QueueMethod):
    """The method's numbers; the defaults are the paper's.

    Attributes:
        projection_dim: D, the width of the teacher's features, from which it follows.
        num_splits: splits of the student's batch norm; 1 for plain batch norm.
        student_view: recipe of the view that both see.
    """

    temperature: float = 0.2
    teacher_temperature: float = 0.01
    queue_size: int = 65536
    num_splits: int = 1

    # Numbers of the other methods: this teacher does not move, and sees the student's view.
    momentum: ClassVar[float] = 1.0
    momentum_schedule: ClassVar[str] = "constant"
    teacher_view: ClassVar[str] = ""
    symmetric: ClassVar[bool] = False

    teacher_follows = "never"
    shuffles = False

    def views(self) -> dict[str, View]:
        return {"query": View(self.student_view)}

    def teacher_sees(self) -> tuple[str, ...]:
        return ("query",)

    def rule(self) -> LabelRule:
        return DistillationLabels()


DEFAULTS: dict[str, Defaults] = {
    # There are no published settings for small images. Those of the MNN bench, with the code's
    # head, whose hidden layer is as wide as the student's features, and a queue that is no longer
    # than the set.
    "cifar10": mnn_bench_defaults(SEED(queue_size=16384, projector_hidden=512), 32),
    # Code, main_small-patch.py and tools/opts.py: K 65536, temperature 0.2, lr 0.03 at 256 images,
    # weight decay 1e-4, 200 epochs, 5 of warm-up, cosine. The teacher's temperature is the paper's
    # 0.01; the code's default is 1e-4, at which the nearest row takes nearly all.
    "imagenet": Defaults(
        SEED(projector_hidden=512), "resnet18", 224, 200, 256, 0.03, 0.9, 1e-4, 5,
    ),
    "shapes": shapes_defaults(SEED(queue_size=512, projector_hidden=512)),
}  # fmt: skip
