"""ReSSL: relational self-supervised learning, with one strong crop or several.

Zheng et al., NeurIPS 2021, arXiv 2107.09282. "Code" below is github.com/KyleZheng1997/ReSSL.

    student   z = normalise(projector(backbone(strong view)))         gradient
    teacher   t = normalise(EMA copy on the weak view)                no gradient
    q    = softmax_j(t . Q_j / teacher_temperature)                   over the queue rows
    p    = softmax_j(z . Q_j / temperature)                           over the queue rows: the
    loss = - mean over the batch of sum_j q_j log p_j                 positive is in neither

Label rule: the teacher's softmax. Order: EMA, forward passes, loss, SGD, keys into the queue.

Several crops: the student sees ``crops`` strong views of falling size, each compared with the one
weak view of the teacher; the loss is their mean. The code's crops at 224 px have sides 224, 192,
160, 128 and 96 and area ranges from (0.2, 1) down to (0.086, 0.429): the side's share of 224 times
(0.2, 1). Here the same shares are taken of the run's image size.

On ImageNet the code evaluates Resize 256 and CenterCrop 224: softcl.evaluate's --crop-share, whose
default at 224 px that is.

use_keys: the batch's other keys stand beside the queue's rows in both softmaxes, the own key in
neither (github.com/juliendenize/eztorch).
"""

from __future__ import annotations

from dataclasses import dataclass

from softcl.labels import LabelRule, RelationalLabels
from softcl.methods.defaults import Defaults, mnn_bench_defaults, shapes_defaults
from softcl.methods.method import RelationalMethod, View

SHARES = tuple(side / 224 for side in (224, 192, 160, 128, 96))


@dataclass(frozen=True)
class ReSSL(RelationalMethod):
    """The method's numbers; the defaults are those for CIFAR.

    Attributes:
        crops: strong views for the student, 1 to 5.
    """

    teacher_temperature: float = 0.04
    crops: int = 1

    positive = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("crops", 1 <= self.crops <= len(SHARES), f"in [1, {len(SHARES)}]")
        if self.crops > 1 and self.symmetric:
            raise ValueError("symmetric needs one crop for each view, got crops > 1")

    def views(self) -> dict[str, View]:
        crops = {
            f"query {number}": View(self.student_view, share, (0.2 * share, share))
            for number, share in enumerate(SHARES[1 : self.crops], start=2)
        }
        return {**super().views(), **crops}

    def student_sees(self) -> tuple[str, ...]:
        return super().student_sees() + tuple(f"query {n + 1}" for n in range(1, self.crops))

    def rule(self) -> LabelRule:
        return RelationalLabels()


DEFAULTS: dict[str, Defaults] = {
    # The authors' issue 11 quotes weight decay 5e-4 from the paper; K, momentum, lr and the head
    # are the MNN bench's, not confirmed against the paper.
    "cifar10": mnn_bench_defaults(ReSSL(), 32),
    "cifar100": mnn_bench_defaults(ReSSL(), 32),
    "stl10": mnn_bench_defaults(ReSSL(queue_size=16384, momentum=0.996), 64),
    "tiny-imagenet": mnn_bench_defaults(ReSSL(queue_size=16384, momentum=0.996), 64),
    # Code, R50: head 2048-4096-512, K 131072, m 0.999, lr 0.05 at 256 images, 5 epochs of warm-up;
    # weight decay 1e-4, but for biases and batch norm. In the code the norms of the four
    # down-sampling branches decay all the same; here none does.
    "imagenet": Defaults(
        ReSSL(queue_size=131072, momentum=0.999, projector_hidden=4096, projection_dim=512),
        "resnet50", 224, 200, 256, 0.05, 0.9, 1e-4, 5, "sgd", False,
    ),
    # Chosen on shapes: without batch norm at the projector's end the relations are uniform after an
    # epoch, and stay so.
    "shapes": shapes_defaults(
        ReSSL(queue_size=512, projector_hidden=512, projector_norm="all", num_splits=1)
    ),
}  # fmt: skip
