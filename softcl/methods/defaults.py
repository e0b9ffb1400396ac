"""Defaults: a method together with the training settings published with it."""

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
        sgd_momentum, weight_decay: of the optimiser.
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
