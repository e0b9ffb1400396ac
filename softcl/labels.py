"""Label rules: how much of each row's label mass goes to its positive and to the queue.

A rule is numbers. What a pass over the queue knows about the teacher's similarities
``d_j = t . Q_j`` is

    q    = softmax_j(d_j / teacher_temperature)      over the queue rows; the positive is not in it
    mu   = sum_j q_j Q_j                             the teacher's mean over the queue
    H    = - sum_j q_j log q_j                       its entropy, in nats
    c    = clamp(1 - H / log K, 0, 1)                its confidence; 0 for a queue of one row
    N_n  = the n queue rows most similar to t

and every rule makes one label mean ``m = sum_j y_j v_j`` of it, over the candidates
``v in {positive t, queue rows Q_1 .. Q_K}``:

    m   = (p t + a mu + sum_{j in N_n} w_j Q_j) / (p + a + sum_j w_j)
    p   = positive
    a   = mean + confident_mean c
    w_j = neighbor + confident_neighbor c

In words: the positive has the label p, every queue row a q_j, and each of the n nearest w_j more.
With ``clip`` the labels of the n nearest are at most p instead, ``w_j = min(0, p - a q_j)``. That
clips every label above p where a <= p n, since fewer than a / p rows can have one. The labels are
then divided by their sum, never see a gradient, and the loss is the cross-entropy
``- sum_j y_j log p_j`` against the student's softmax.

With ``teacher_positive`` the teacher's softmax has one more entry, of the positive, whose share of
``a`` goes to the positive: its logit is 0 ("zero"), or the key's with itself, t . t /
teacher_temperature ("self"). With r the queue's share of that softmax, q_j and mu above become
r q_j and r mu, and p + a (1 - r) takes the place of p in front of t. H and c stay the queue's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
from dataclasses import dataclass

__all__ = [
    "AdaptiveNeighborLabels",
    "AdaptiveSoftLabels",
    "DistillationLabels",
    "HardLabels",
    "LabelRule",
    "MixedLabels",
    "NeighborLabels",
    "RelationalLabels",
]

# In the order of enum TeacherPositive in csrc/include/softcl/labels.h.
TEACHER_POSITIVES = (None, "zero", "self")


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """The numbers of a label rule; see the module's text for the formula.

    ``LabelRule(positive=0.5, mean=0.25, confident_neighbor=0.5, num_neighbors=4)`` runs in every
    backend, as the rules that have names do.

    Attributes:
        positive: p, the positive's label before the division by the sum.
        mean, confident_mean: the queue's label mass a = mean + confident_mean c.
        neighbor, confident_neighbor: what each of the n nearest has besides, neighbor +
            confident_neighbor c.
        clip: the labels of the n nearest are at most p, in place of that.
        num_neighbors: n.
        teacher_positive: None, "zero" or "self", the positive's entry in the teacher's softmax.

    Raises:
        TypeError, ValueError: a number is unusable; the message names it.
    """

    positive: float = 1.0
    mean: float = 0.0
    confident_mean: float = 0.0
    neighbor: float = 0.0
    confident_neighbor: float = 0.0
    clip: bool = False
    num_neighbors: int = 0
    teacher_positive: str | None = None

    def __post_init__(self) -> None:
        for name in ("positive", "mean", "confident_mean", "neighbor", "confident_neighbor"):
            object.__setattr__(self, name, _weight(name, getattr(self, name)))
        object.__setattr__(self, "num_neighbors", _count("num_neighbors", self.num_neighbors))
        if not isinstance(self.clip, bool):
            raise TypeError(f"clip must be True or False, got {self.clip!r}")
        if self.teacher_positive not in TEACHER_POSITIVES:
            raise ValueError(
                f'teacher_positive must be None, "zero" or "self", got {self.teacher_positive!r}'
            )
        if self.clip and self.positive == 0.0:
            raise ValueError("clip=True needs a positive above 0 to clip at, got positive=0.0")
        if self.clip and (self.neighbor > 0.0 or self.confident_neighbor > 0.0):
            raise ValueError(
                "clip=True takes the place of neighbor and confident_neighbor, got "
                f"neighbor={self.neighbor}, confident_neighbor={self.confident_neighbor}"
            )
        if self.teacher_positive is not None and not self.needs_mean:
            raise ValueError(
                "teacher_positive shares the mass of mean and confident_mean, got 0.0 for both"
            )
        if self.positive + self.mean + self.neighbor * self.num_neighbors == 0.0:
            raise ValueError(
                "positive + mean + neighbor * num_neighbors must be above 0, got 0.0: a confidence "
                "of 0 would leave no label"
            )

        # Made once: every call asks for them.
        values = [getattr(self, name) for name in _FIELDS[:-1]]
        place = TEACHER_POSITIVES.index(self.teacher_positive)
        object.__setattr__(self, "_numbers", [*map(float, values), float(place)])

    @property
    def needs_mean(self) -> bool:
        """The teacher's mean mu takes part: a second product over the queue."""
        return self.mean > 0.0 or self.confident_mean > 0.0

    @property
    def needs_softmax(self) -> bool:
        """The teacher's softmax takes part, through mu, c or q_j."""
        return self.needs_mean or (self.confident_neighbor > 0.0 and self.num_neighbors > 0)

    @property
    def num_weighted(self) -> int:
        """How many of the n nearest rows can have a weight: labels above p are fewer than a / p."""
        if self.clip and self.needs_mean:
            fewer = self.mean + self.confident_mean <= self.positive * self.num_neighbors
            return max(0, self.num_neighbors - fewer)
        weighs = self.neighbor > 0.0 or self.confident_neighbor > 0.0
        return self.num_neighbors if weighs else 0

    @property
    def adds_neighbors(self) -> bool:
        """The nearest rows take part."""
        return self.num_weighted > 0

    def to_numbers(self) -> list[float]:
        """All of it in the order of the fields, as an operator of torch.library takes it."""
        return self._numbers

    @classmethod
    def from_numbers(cls, numbers: list[float]) -> LabelRule:
        """The rule that `to_numbers` took apart."""
        return _rule_of(tuple(numbers))

    def __repr__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"LabelRule({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


_FIELDS = tuple(field.name for field in dataclasses.fields(LabelRule))


@functools.lru_cache(maxsize=256)
def _rule_of(values: tuple[float, ...]) -> LabelRule:
    *weights, clip, num_neighbors, teacher_positive = values
    return LabelRule(
        **dict(zip(_FIELDS, weights, strict=False)),
        clip=bool(clip),
        num_neighbors=int(num_neighbors),
        teacher_positive=TEACHER_POSITIVES[int(teacher_positive)],
    )


def _weight(name: str, value: float) -> float:
    if getattr(value, "ndim", None) == 0 and not isinstance(value, numbers.Real):
        value = value.item()  # a tensor or an array of one number
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (0.0 <= value < math.inf):
        raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")
    return float(value)


def _count(name: str, value: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if count < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return count


def HardLabels() -> LabelRule:
    """All mass on the positive: ``m = t`` (InfoNCE; MoCo, arXiv 1911.05722)."""
    return LabelRule()


def RelationalLabels() -> LabelRule:
    """All mass on the queue, as the teacher's softmax: ``m = mu`` (ReSSL, arXiv 2107.09282).

    ReSSL has no positive in the student's softmax either: call the loss with ``positive=False``.
    """
    return LabelRule(positive=0.0, mean=1.0)


def MixedLabels(positive_weight: float = 0.5, *, teacher_positive: str | None = None) -> LabelRule:
    """A fixed mixture: ``m = w t + (1 - w) mu`` (SCE, arXiv 2111.14585).

    Args:
        positive_weight: ``w`` in [0, 1]. 1 is :func:`HardLabels`, 0 is :func:`RelationalLabels`.
        teacher_positive: "zero" is SCE's released code, whose teacher has an entry of logit 0 for
            the positive.
    """
    w = _weight("positive_weight", positive_weight)
    if w > 1.0:
        raise ValueError(f"positive_weight must be a number in [0, 1], got {positive_weight!r}")
    if w == 1.0:  # no mass is left to share
        teacher_positive = None
    return LabelRule(positive=w, mean=1.0 - w, teacher_positive=teacher_positive)


def AdaptiveSoftLabels(num_neighbors: int = 1) -> LabelRule:
    """Soft labels scaled by the teacher's confidence (ASCL, arXiv 2207.11163).

    ``y_j = min(1, c n q_j)`` for every queue row and 1 for the positive, then divided by their sum.

    Args:
        num_neighbors: ``n``, the label mass of the queue at full confidence, in positives.
            0 is :func:`HardLabels`.
    """
    n = _count("num_neighbors", num_neighbors)
    return LabelRule(confident_mean=n, clip=True, num_neighbors=n)


def AdaptiveNeighborLabels(num_neighbors: int = 1) -> LabelRule:
    """The n nearest rows, each weighted by the confidence (ASCL's AHCL, arXiv 2207.11163).

        m = (t + c sum_{j in N_n} Q_j) / (1 + c n)

    Args:
        num_neighbors: ``n``. 0 is :func:`HardLabels`.
    """
    return LabelRule(confident_neighbor=1.0, num_neighbors=num_neighbors)


def NeighborLabels(num_neighbors: int = 1) -> LabelRule:
    """The n nearest rows, each as good as the positive (ASCL's hard neighbours, arXiv 2207.11163).

        m = (t + sum_{j in N_n} Q_j) / (1 + n)

    Args:
        num_neighbors: ``n``. 0 is :func:`HardLabels`.
    """
    return LabelRule(neighbor=1.0, num_neighbors=num_neighbors)


def DistillationLabels() -> LabelRule:
    """The teacher's softmax over its own embedding and the queue (SEED, arXiv 2101.04731).

    y = softmax([t . t, t . Q_1, .., t . Q_K] / teacher_temperature)
    """
    return LabelRule(positive=0.0, mean=1.0, teacher_positive="self")
