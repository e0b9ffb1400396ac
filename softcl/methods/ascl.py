"""ASCL: Adaptive Soft Contrastive Learning, in its MoCo form.

Chen Feng and Ioannis Patras, ICPR 2022, arXiv 2207.11163. "Code" below is the authors' release,
github.com/MrChenFeng/ASCL_ICPR2022; where paper and code differ, the code is followed.

Instead of calling every other image a negative, ASCL lets the teacher say how similar the queue's
images are, and trusts it as far as it is sure.

    student   z = normalise(projector(backbone(strong view)))         gradient
    teacher   t = normalise(EMA copy on the weak view)                no gradient
    queue     Q_1 .. Q_K, the last K keys t                           no gradient

    q_j = softmax_j(t . Q_j / teacher_temperature)                    over the queue rows only
    H   = - sum_j q_j log q_j
    c   = 1 - H / log K                                               confidence

    y_0 = 1 (the positive) and, for queue row j,
        labels = "soft"     min(1, c n q_j)                           ASCL proper, n = num_neighbors
        labels = "ahcl"     c    for the n nearest rows, else 0       adaptive hard
        labels = "hard"     1    for the n nearest rows, else 0       neighbours as positives
        labels = "normal"   0                                         MoCo
    y  <- y / sum(y)                                                  the positive included

    p    = softmax([z . t, z . Q_1 .. z . Q_K] / temperature)         the positive included
    loss = - mean over the batch of sum_j y_j log p_j

Order of a step: EMA update of the teacher; student and teacher forward; loss against the queue as
it is; backward; SGD; then the keys t enter the queue.

Both encoders use split batch norm with 8 splits, and the teacher sees the batch shuffled. K counts
the queue's rows even while they are still random, so training starts close to MoCo (c is about 0.18
for K = 4096, D = 128) and the soft part grows as the teacher sharpens.
"""

from __future__ import annotations

from dataclasses import dataclass

from softcl.labels import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    HardLabels,
    LabelRule,
    NeighborLabels,
)
from softcl.methods.defaults import Defaults

LABELS = ("soft", "ahcl", "hard", "normal")
VIEWS = ("strong", "weak")


@dataclass(frozen=True)
class ASCL:
    """The method's numbers; the defaults are the code's for CIFAR, STL-10 and Tiny-ImageNet.

    Attributes:
        labels: "soft", "ahcl", "hard" or "normal", see the module's formulas.
        num_neighbors: n; unused with labels="normal". n <= queue_size.
        temperature: of the student's softmax.
        teacher_temperature: of the teacher's softmax over the queue.
        momentum: of the teacher, constant.
        queue_size: K.
        projection_dim: D.
        projector_hidden: width of the projector's hidden layer.
        num_splits: splits of the batch norm in both encoders; 1 for plain batch norm.
        student_view, teacher_view: "strong" or "weak".
        positive: whether the positive is in the student's denominator.
    """

    labels: str = "soft"
    num_neighbors: int = 1
    temperature: float = 0.1
    teacher_temperature: float = 0.05
    momentum: float = 0.99
    queue_size: int = 4096
    projection_dim: int = 128
    projector_hidden: int = 2048
    num_splits: int = 8
    student_view: str = "strong"
    teacher_view: str = "weak"
    positive: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("labels", LABELS),
            ("student_view", VIEWS),
            ("teacher_view", VIEWS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("queue_size", "projection_dim", "projector_hidden", "num_splits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.num_neighbors <= self.queue_size:
            raise ValueError(
                f"num_neighbors must be in [0, queue_size={self.queue_size}], "
                f"got {self.num_neighbors}"
            )
        for name in ("temperature", "teacher_temperature"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0.0 <= self.momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {self.momentum}")

    def rule(self) -> LabelRule:
        """The label rule for ``softcl.soft_contrastive_loss``."""
        if self.labels == "soft":
            return AdaptiveSoftLabels(self.num_neighbors)
        if self.labels == "ahcl":
            return AdaptiveNeighborLabels(self.num_neighbors)
        if self.labels == "hard":
            return NeighborLabels(self.num_neighbors)
        return HardLabels()


def _small(arch: str, image_size: int, **changes: float) -> Defaults:
    """The code's main.py defaults, which it uses for every small data set."""
    return Defaults(
        method=ASCL(**changes),  # the class defaults are main.py's
        arch=arch,  # --arch resnet18
        image_size=image_size,
        epochs=200,  # --epochs
        batch_size=256,  # --batch_size
        lr=0.03,  # --lr; a reader's reproduction (issue 3 of the release) used 0.06
        sgd_momentum=0.9,
        weight_decay=5e-4,  # on all parameters; the same reproduction used 1e-4
        warmup_epochs=5,
    )


DEFAULTS: dict[str, Defaults] = {
    # Code, main.py. Sizes: its data loaders. num_neighbors 1 is the code's default.
    "cifar10": _small("resnet18", 32),
    # The README's example command for CIFAR-100 has 5 neighbours.
    "cifar100": _small("resnet18", 32, num_neighbors=5),
    # 64 px, trained on train + unlabeled.
    "stl10": _small("resnet18", 64),
    "tiny_imagenet": _small("resnet18", 64),
    "imagenet": Defaults(
        # Code, ImageNet-1K/builder.py: K 65536, m 0.999, the MoCo v2 head of width 2048,
        # temperatures 0.1 and 0.05, one neighbour. num_splits: 8 real devices in MoCo.
        method=ASCL(queue_size=65536, momentum=0.999, projector_hidden=2048),
        arch="resnet50",
        image_size=224,
        # The release has no ImageNet training script. These are MoCo's own settings
        # (github.com/facebookresearch/moco), into which builder.py is to be placed; the paper's are
        # not known to agree.
        epochs=200,
        batch_size=256,
        lr=0.03,
        sgd_momentum=0.9,
        weight_decay=1e-4,
        warmup_epochs=0,
    ),
    # The generated set: no paper. Ours, for a run of minutes on two CPU cores, where a backbone
    # that small needs no wide projector. The method's other numbers stay the small-data ones.
    "shapes": Defaults(
        method=ASCL(projector_hidden=512),
        arch="resnet_tiny",
        image_size=32,
        epochs=8,
        batch_size=256,
        lr=0.06,
        sgd_momentum=0.9,
        weight_decay=5e-4,
        warmup_epochs=1,
    ),
}
