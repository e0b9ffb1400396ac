"""Named shapes and rules, and what they cost: the arithmetic that a measurement is compared with.

    product of the student's or the teacher's rows with the queue    2 N K D flop each
    sum of queue rows weighted by a softmax                          2 N K D flop each
    softmax weights                                                  N K exponentials each

Hard labels need the first two for the student, neighbours one product for the teacher as well, and
rules that read the teacher's mean all four; where the queue is so short that softmax weights can
be kept until their shares are known, three: both means are one. Every input is read once and every
result written once. ceilings.py turns a cost into the time that this machine needs at least.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from softcl.labels import AdaptiveSoftLabels, LabelRule
from softcl.testing import NAMED_RULES

DENSE = AdaptiveSoftLabels(5)  # the rule that needs everything
RULES: dict[str, LabelRule] = NAMED_RULES | {"adaptive_soft-5": DENSE}


class Shape(NamedTuple):
    """N rows against K queue rows of dimension D."""

    N: int
    K: int
    D: int

    def __str__(self) -> str:
        return f"{self.N}x{self.K}x{self.D}"


SMALL = Shape(256, 4096, 128)  # CIFAR: MoCo's and ASCL's queue
LONG = Shape(256, 65536, 128)  # ImageNet: MoCo's queue, one GPU's share of the batch
LARGE = Shape(1024, 65536, 128)

QUICK = (SMALL, Shape(256, 16384, 128))
MAIN = (SMALL, LONG, LARGE)
GRID = tuple(
    Shape(N, K, D)
    for D, N, K in itertools.product((128, 256), (256, 1024, 4096), (4096, 16384, 65536, 131072))
)

KNN = Shape(10_000, 50_000, 512)  # CIFAR's test images against its training images, ResNet-18


def name_of(rule: LabelRule) -> str:
    """The rule's name among RULES, or its numbers."""
    return next((name for name, named in RULES.items() if named == rule), repr(rule))


def is_hard(rule: LabelRule) -> bool:
    """All mass on the positive."""
    return not rule.needs_mean and not rule.adds_neighbors


class Cost(NamedTuple):
    flop: float
    exponentials: float = 0.0
    bytes: float = 0.0


def loss_cost(
    shape: Shape, rule: LabelRule, element_bytes: int = 4, keeps_weights: bool = False
) -> Cost:
    """Of the loss with its gradient."""
    teacher = 1 if rule.needs_softmax or rule.num_neighbors > 0 else 0
    if rule.needs_mean and not keeps_weights:
        teacher = 2
    softmaxes = 2 if rule.needs_softmax else 1
    pairs = float(shape.N) * shape.K
    flop = 2.0 * pairs * shape.D * (2 + teacher)
    return Cost(flop, pairs * softmaxes, least_bytes(shape, element_bytes))


def search_cost(shape: Shape, k: int) -> Cost:
    """Of the k nearest rows alone, float32: indices have 8 bytes."""
    moved = 4.0 * (shape.N + shape.K) * shape.D + 12.0 * shape.N * k
    return Cost(2.0 * shape.N * shape.K * shape.D, 0.0, moved)


def least_bytes(shape: Shape, element_bytes: int) -> float:
    """Read once: queue, query and key; written once: losses and gradient."""
    rows = shape.K + 3.0 * shape.N
    return element_bytes * rows * shape.D + 4.0 * shape.N


def eager_bytes(shape: Shape, rule: LabelRule) -> float:
    """About the peak memory of the N x K formula: so many float32 matrices live at once."""
    return 4.0 * shape.N * shape.K * (4 if is_hard(rule) else 8)
