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

Label rule: y, of the teacher's similarities. Order of a step: EMA update of the teacher; student
and teacher forward; loss against the queue as it is; backward; SGD; then the keys t enter the
queue.

Both encoders use split batch norm with 8 splits, and the teacher sees the batch shuffled. K counts
the queue's rows even while they are still random, so training starts close to MoCo (c is about 0.18
for K = 4096, D = 128) and the soft part grows as the teacher sharpens.

form = "byol" is the code's second use. The relations are those of the batch, each row without
itself, so that c = 1 - H / log(N - 1); there is no queue and no softmax in the loss, and the
student has a predictor:

    h    = normalise(predictor(projector(backbone(strong view))))    gradient
    loss = mean over the batch of sum_j y_j (2 - 2 h . t_j) = 2 - 2 h . m,     y_ii = 1 before / sum

The predictor's hidden layer has 512 units and batch norm; the teacher's batch is not shuffled.
labels = "normal" is one-sided BYOL, which the code makes of "ahcl" and "hard" too: those are
refused here. The code returns the vector of losses, which cannot be differentiated; the mean is
meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softcl.labels import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    HardLabels,
    LabelRule,
    NeighborLabels,
)
from softcl.methods.defaults import Defaults, shapes_defaults
from softcl.methods.method import Batch, QueueMethod, Result
from softcl.ops import Diagnostics, label_mean

LABELS = ("soft", "ahcl", "hard", "normal")


@dataclass(frozen=True)
class ASCL(QueueMethod):
    """The method's numbers; the defaults are the code's for CIFAR, STL-10 and Tiny-ImageNet.

    Attributes:
        form: "moco", with a queue, or "byol", with a predictor and the batch's relations.
        labels: "soft", "ahcl" (adaptive hard), "hard" or "normal" (MoCo's).
        num_neighbors: n, at most queue_size; unused with labels "normal".
    """

    form: str = "moco"
    labels: str = "soft"
    num_neighbors: int = 1

    CHOICES = {"form": ("moco", "byol"), "labels": LABELS}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "byol" and self.labels not in ("soft", "normal"):
            raise ValueError(f"labels must be soft or normal in the byol form, got {self.labels!r}")
        if self.form == "byol" and self.predictor_hidden == 0:
            # The code's, and no choice: without a predictor this loss collapses.
            object.__setattr__(self, "predictor_hidden", 512)

    def rule(self) -> LabelRule:
        """The label rule for ``softcl.soft_contrastive_loss``."""
        if self.labels == "soft":
            return AdaptiveSoftLabels(self.num_neighbors)
        if self.labels == "ahcl":
            return AdaptiveNeighborLabels(self.num_neighbors)
        if self.labels == "hard":
            return NeighborLabels(self.num_neighbors)
        return HardLabels()

    @property
    def shuffles(self) -> bool:
        return self.form == "moco" and super().shuffles

    def queues(self) -> dict[str, int]:
        return super().queues() if self.form == "moco" else {}

    def keys(self, batch: Batch) -> dict[str, Tensor]:
        return super().keys(batch) if self.form == "moco" else {}

    @property
    def excludes(self) -> bool:
        return self.form == "byol" and self.labels == "soft"

    def loss(self, batch: Batch) -> Result:
        return super().loss(batch) if self.form == "moco" else self.batch_loss(batch)

    def batch_loss(self, batch: Batch) -> Result:
        """The BYOL form: 2 - 2 h . m with the label mean m over the batch's own keys."""
        rows, shown = [], []
        for view, other in zip(self.student_sees(), self.teacher_sees(), strict=True):
            h = normalize(batch.predicted[view], dim=1)
            t = normalize(batch.teacher[other], dim=1)
            indices, keys = batch.row_indices(t), batch.all_gather(t)
            self.check_batch(keys.shape[0])
            labels = label_mean(
                self.rule(), t, keys, teacher_temperature=self.teacher_temperature,
                excluded=indices if self.excludes else None, backend=batch.backend,
            )  # fmt: skip
            rows.append(2.0 - 2.0 * (h.to(labels.mean.dtype) * labels.mean).sum(1))
            shown.append(Diagnostics(labels.confidence, labels.entropy, None, None))
        return Result(torch.cat(rows), shown[0])

    def check_batch(self, size: int) -> None:
        """Refuse a batch (of all processes) too small for its rows to have relations."""
        least = max(self.num_neighbors, 1) + 1
        if self.labels == "soft" and size < least:
            raise ValueError(
                f"query must have at least {least} rows in the byol form with "
                f"num_neighbors={self.num_neighbors}, each row's neighbours being other rows, "
                f"got {size}"
            )


def _small(arch: str, image_size: int, **changes: Any) -> Defaults:
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
    "tiny-imagenet": _small("resnet18", 64),
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
    "shapes": shapes_defaults(ASCL(queue_size=512, projector_hidden=512, num_splits=1)),
}
