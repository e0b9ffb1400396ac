"""Label rules: how much of each row's label mass goes to its positive and to the queue.

Every rule makes one vector per row, the label mean ``m = sum_j y_j v_j`` over the candidates
``v in {positive t, queue rows Q_1 .. Q_K}``, from what a pass over the queue knows about the
teacher's similarities ``d_j = t . Q_j``:

    q    = softmax_j(d_j / teacher_temperature)      over the queue rows; the positive is not in it
    mu   = sum_j q_j Q_j                             the teacher's mean over the queue
    H    = - sum_j q_j log q_j                       its entropy, in nats
    c    = clamp(1 - H / log K, 0, 1)                its confidence; 0 for a queue of one row
    N_n  = the n queue rows most similar to t

The labels of every rule sum to one, never see a gradient, and the loss is the cross-entropy
``- sum_j y_j log p_j`` against the student's softmax. The rules differ in ``y`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "RULES",
    "AdaptiveNeighborLabels",
    "AdaptiveSoftLabels",
    "HardLabels",
    "LabelRule",
    "MixedLabels",
    "NeighborLabels",
    "RelationalLabels",
]


@dataclass(frozen=True)
class LabelRule:
    """Base of the label rules: what a backend must compute for them, and their numbers.

    Attributes:
        name: the word that names the rule in every backend.
        needs_softmax: the rule reads the teacher's softmax sums (entropy, confidence).
        needs_mean: the rule reads the teacher's mean ``mu`` (a second product over the queue).
        num_neighbors: how many nearest queue rows the rule reads; 0 where it reads none.
        positive_weight: share of the positive in a fixed mixture; 1 where there is no mixture.
    """

    name: ClassVar[str] = ""
    needs_softmax: ClassVar[bool] = False
    needs_mean: ClassVar[bool] = False
    num_neighbors: ClassVar[int] = 0
    positive_weight: ClassVar[float] = 1.0


def _check_num_neighbors(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"num_neighbors must be an integer >= 0, got {value!r}")


@dataclass(frozen=True)
class HardLabels(LabelRule):
    """All mass on the positive: ``m = t`` (InfoNCE; MoCo, arXiv 1911.05722)."""

    name: ClassVar[str] = "hard"


@dataclass(frozen=True)
class RelationalLabels(LabelRule):
    """All mass on the queue, as the teacher's softmax: ``m = mu`` (ReSSL, arXiv 2107.09282).

    ReSSL has no positive in the student's softmax either: call the loss with ``positive=False``.
    """

    name: ClassVar[str] = "relational"
    needs_softmax: ClassVar[bool] = True
    needs_mean: ClassVar[bool] = True


@dataclass(frozen=True)
class MixedLabels(LabelRule):
    """A fixed mixture: ``m = w t + (1 - w) mu`` (SCE, arXiv 2111.14585).

    Args:
        positive_weight: ``w`` in [0, 1]. 1 is :class:`HardLabels`, 0 is :class:`RelationalLabels`.
    """

    positive_weight: float = 0.5
    name: ClassVar[str] = "mixed"
    needs_softmax: ClassVar[bool] = True
    needs_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        w = self.positive_weight
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not 0.0 <= w <= 1.0:
            raise ValueError(f"positive_weight must be a number in [0, 1], got {w!r}")


@dataclass(frozen=True)
class AdaptiveSoftLabels(LabelRule):
    """Soft labels scaled by the teacher's confidence (ASCL, arXiv 2207.11163).

    ``y_j = min(1, c n q_j)`` for every queue row and 1 for the positive, then divided by their sum.
    With ``a = c n`` and ``C = {j : a q_j > 1}`` (fewer than n rows, all among ``N_n``):

        m = [t + a mu + sum_C (1 - a q_j) Q_j] / [1 + a + sum_C (1 - a q_j)]

    Args:
        num_neighbors: ``n``, the label mass of the queue at full confidence, in positives.
            0 is :class:`HardLabels`.
    """

    num_neighbors: int = 1
    name: ClassVar[str] = "adaptive_soft"
    needs_softmax: ClassVar[bool] = True
    needs_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_num_neighbors(self.num_neighbors)


@dataclass(frozen=True)
class AdaptiveNeighborLabels(LabelRule):
    """The n nearest rows, each weighted by the confidence (ASCL's AHCL, arXiv 2207.11163).

        m = (t + c sum_{j in N_n} Q_j) / (1 + c n)

    Args:
        num_neighbors: ``n``. 0 is :class:`HardLabels`.
    """

    num_neighbors: int = 1
    name: ClassVar[str] = "adaptive_neighbors"
    needs_softmax: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_num_neighbors(self.num_neighbors)


@dataclass(frozen=True)
class NeighborLabels(LabelRule):
    """The n nearest rows, each as good as the positive (ASCL's hard neighbours, arXiv 2207.11163).

        m = (t + sum_{j in N_n} Q_j) / (1 + n)

    Args:
        num_neighbors: ``n``. 0 is :class:`HardLabels`.
    """

    num_neighbors: int = 1
    name: ClassVar[str] = "neighbors"

    def __post_init__(self) -> None:
        _check_num_neighbors(self.num_neighbors)


RULES: dict[str, type[LabelRule]] = {
    rule.name: rule
    for rule in (
        HardLabels,
        RelationalLabels,
        MixedLabels,
        AdaptiveSoftLabels,
        AdaptiveNeighborLabels,
        NeighborLabels,
    )
}


def make_rule(name: str, num_neighbors: int = 0, positive_weight: float = 1.0) -> LabelRule:
    """The rule called ``name`` with the numbers that it takes; the others are ignored."""
    rule = RULES[name]
    if rule is MixedLabels:
        return MixedLabels(positive_weight)
    if rule in (AdaptiveSoftLabels, AdaptiveNeighborLabels, NeighborLabels):
        return rule(num_neighbors)
    return rule()
