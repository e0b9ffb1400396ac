"""MoCo v2: momentum contrast with the head and the views of SimCLR.

Chen, Fan, Girshick and He, arXiv 2003.04297; MoCo: He et al., arXiv 1911.05722. "Code" below is
github.com/facebookresearch/moco.

    student   z = normalise(projector(backbone(strong view)))         gradient
    teacher   t = normalise(EMA copy on another strong view)          no gradient
    loss      = - log exp(z.t / temperature)
                      / [exp(z.t / temperature) + sum_j exp(z.Q_j / temperature)]

Label rule: all mass on the positive. Order: EMA, forward passes, loss, SGD, then the keys enter the
queue. ``symmetric`` is the code's optional form for CIFAR; it adds the two directions, where softcl
takes their mean: double the learning rate to have its steps.

On ImageNet the code evaluates Resize 256 and CenterCrop 224: softcl.evaluate's --crop-share, whose
default at 224 px that is.
"""

from __future__ import annotations

from dataclasses import dataclass

from softcl.labels import HardLabels, LabelRule
from softcl.methods.defaults import Defaults, mnn_bench_defaults, shapes_defaults
from softcl.methods.method import QueueMethod


@dataclass(frozen=True)
class MoCo(QueueMethod):
    """The method's numbers; the defaults are those of the code's CIFAR-10 notebook."""

    teacher_view: str = "strong"
    projector_layers: int = 1  # a linear layer to 128

    def rule(self) -> LabelRule:
        return HardLabels()


# K 4096, m 0.99, temperature 0.1, 8-way split batch norm with shuffling; crops of 0.08 .. 1 of the
# area, no blur.
_NOTEBOOK = MoCo(student_view="moco_cifar", teacher_view="moco_cifar")
_BENCH = {"temperature": 0.2, "projector_layers": 2, "symmetric": True}

DEFAULTS: dict[str, Defaults] = {
    # Code, CIFAR notebook: lr 0.06 at batch 512, weight decay 5e-4, 200 epochs, no warm-up. Its
    # k-NN reads the 128 numbers of the head, softcl's the backbone's features, as for all methods.
    "cifar10": Defaults(_NOTEBOOK, "resnet18", 32, 200, 512, 0.06, 0.9, 5e-4, 0),
    "cifar100": mnn_bench_defaults(MoCo(**_BENCH), 32),
    "tiny-imagenet": mnn_bench_defaults(
        MoCo(queue_size=16384, momentum=0.996, **_BENCH), image_size=64
    ),
    # Code, main_moco.py with --mlp --moco-t 0.2 --aug-plus --cos; its schedule steps per epoch.
    "imagenet": Defaults(
        MoCo(temperature=0.2, momentum=0.999, queue_size=65536, projector_layers=2),
        "resnet50", 224, 200, 256, 0.03, 0.9, 1e-4, 0,
    ),
    "shapes": shapes_defaults(
        MoCo(
            temperature=0.2, queue_size=512, projector_layers=2, projector_hidden=512, num_splits=1
        )
    ),
}  # fmt: skip
