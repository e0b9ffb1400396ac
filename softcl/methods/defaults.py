"""Defaults: a method together with the training settings published with it (its recipe)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Defaults:
    """Settings of one method on one kind of data.

    Attributes:
        method: the method's dataclass with its numbers.
        arch: backbone name for ``softcl.nn.build_backbone``.
        image_size: pixels.
        epochs, batch_size: length of the training run, images per step.
        lr: peak learning rate, for ``batch_size`` (not scaled by it).
        sgd_momentum: momentum of SGD or LARS.
        weight_decay: of the optimiser.
        warmup_epochs: linear warm-up from 0; cosine to 0 afterwards, both per step.
        optimizer: "sgd", "lars" or "adamw".
        decay_norms: whether biases and the weights of norms decay as well.
    """

    method: Any
    arch: str
    image_size: int
    epochs: int
    batch_size: int
    lr: float
    sgd_momentum: float
    weight_decay: float
    warmup_epochs: int
    optimizer: str = "sgd"
    decay_norms: bool = True


def shapes_defaults(method: Any, lr: float = 0.06) -> Defaults:
    """The generated set, one budget for every method: no paper, ours, minutes on two CPU cores.

    A backbone this small needs no wide projector. Small batches, for the number of steps is what
    counts; plain batch norm; a queue of eight batches, whose keys are nearly those of the teacher
    as it is: a longer one is told apart by its age. Where a method differs from that, or from its
    own defaults, the number was chosen on this set.
    """
    return Defaults(
        method=method,
        arch="resnet_tiny",
        image_size=32,
        epochs=8,
        batch_size=64,
        lr=lr,
        sgd_momentum=0.9,
        weight_decay=5e-4,
        warmup_epochs=1,
    )


# What the small-data numbers of every method agree on in one third-party comparison (github.com/
# pc-cp/Benchmark-Methods-For-MNN, here "MNN bench"): ResNet-18 with the CIFAR stem, 200 epochs of
# batch 256, SGD 0.9 with lr 0.06, weight decay 5e-4, 5 epochs of warm-up, 8-way split batch norm.
# All but ReSSL train both directions there, which costs twice; its weak view flips with p 0.9.
def mnn_bench_defaults(method: Any, image_size: int) -> Defaults:
    """The MNN bench's settings for a method."""
    return Defaults(
        method=method,
        arch="resnet18",
        image_size=image_size,
        epochs=200,
        batch_size=256,
        lr=0.06,
        sgd_momentum=0.9,
        weight_decay=5e-4,
        warmup_epochs=5,
    )
