"""SCE: similarity contrastive estimation, as in the paper and as in the released code.

Denize et al., WACV 2023, arXiv 2111.14585. "Code" below is github.com/CEA-LIST/SCE and
github.com/juliendenize/eztorch.

    student   z = normalise(predictor(projector(backbone(strong view))))   gradient
    teacher   t = normalise(projector(EMA backbone(weak view)))            no gradient
    q_j  = softmax_j(t . Q_j / teacher_temperature)                   over the queue rows only
    y    = w on the positive, (1 - w) q_j on queue row j              w = positive_weight
    p    = softmax([z . t, z . Q_1 .. z . Q_K] / temperature)
    loss = - mean over the batch of sum_j y_j log p_j

form = "paper" is this. form = "code": with a queue, the code's teacher softmax keeps a place for
the positive, of logit 0 and not -infinity: over [0, t.Q_1 .. t.Q_K] / teacher_temperature. A share
1 / (1 + sum_j exp(t.Q_j / teacher_temperature)) of the mass 1 - w so leaks to the positive.

use_keys: the batch's other keys stand beside the queue's rows in both softmaxes (eztorch). The code
masks the own key in the teacher's softmax there, so nothing leaks: both forms are the paper's.

The defaults that name the code take its form, too; the class's own form is the paper's. On CIFAR
the code shuffles, and splits batch norm, for the teacher alone (``split_student`` off). Its linear
probe has rate 30, divided by 10 after epochs 60 and 80, on padded random crops and flips: it is not
that of softcl.evaluate (see softcl/evaluation/probe.py), and their accuracies do not compare.

Label rule: the mixture y. Order: forward passes, loss, optimiser, then the EMA of the teacher
(after the step, other than MoCo), keys into the queue. Symmetric: both directions against one
snapshot of the queue, then both views' keys enter it.
"""

from __future__ import annotations

from dataclasses import dataclass

from softcl.labels import LabelRule, MixedLabels
from softcl.methods.defaults import Defaults, mnn_bench_defaults, shapes_defaults
from softcl.methods.method import RelationalMethod


@dataclass(frozen=True)
class SCE(RelationalMethod):
    """The method's numbers; the fields' own values are the code's for CIFAR-10, unsplit.

    Attributes:
        form: "paper" or "code": the paper's labels or the released code's.
        positive_weight: w, the positive's share of the labels, in [0, 1].
    """

    form: str = "paper"
    positive_weight: float = 0.5
    projector_hidden: int = 512
    projector_norm: str = "hidden"
    num_splits: int = 1

    teacher_follows = "after"
    CHOICES = {"form": ("paper", "code")}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rule()  # checks the weight

    def rule(self) -> LabelRule:
        leaks = self.form == "code" and not self.use_keys
        return MixedLabels(self.positive_weight, teacher_positive="zero" if leaks else None)


_CIFAR = SCE(form="code", num_splits=8, split_student=False)

DEFAULTS: dict[str, Defaults] = {
    # Code, CIFAR-10: head 512-512-128, K 4096, m 0.99, temperatures 0.1 and 0.05, lr 0.06, eight
    # splits in the teacher.
    "cifar10": Defaults(_CIFAR, "resnet18", 32, 200, 256, 0.06, 0.9, 5e-4, 5),
    "cifar100": Defaults(_CIFAR, "resnet18", 32, 200, 256, 0.06, 0.9, 5e-4, 5),
    # MNN bench: D 256, head of width 2048 without batch norm, K 16384, m 0.996.
    "tiny-imagenet": mnn_bench_defaults(
        SCE(
            queue_size=16384, momentum=0.996, projection_dim=256, projector_hidden=2048,
            projector_norm="none", num_splits=8, symmetric=True,
        ),
        image_size=64,
    ),
    # Code, ImageNet: projector 2048-2048-2048-256 with batch norm, predictor 256-4096-256 without
    # any bias and with none at its end, LARS with 0.3 x 4096 / 256, m 0.99 -> 1. Its two views are
    # the asymmetric pair of MoCo v3, whose LARS leaves biases and norms alone, but with crops of
    # 0.2 .. 1 of the area and no flip in the second.
    "imagenet": Defaults(
        SCE(
            form="code", queue_size=65536, momentum=0.99, momentum_schedule="cosine",
            teacher_temperature=0.07, projection_dim=256, projector_layers=3,
            projector_hidden=2048, projector_norm="plain", predictor_hidden=4096,
            predictor_norm="unbiased", symmetric=True,
            student_view="sce_first", teacher_view="sce_second",
        ),
        "resnet50", 224, 200, 4096, 4.8, 0.9, 1e-6, 10, "lars", False,
    ),
    "shapes": shapes_defaults(SCE(queue_size=512)),
}  # fmt: skip
