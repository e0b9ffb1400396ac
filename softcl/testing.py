"""Inputs, oracle and tolerances shared by tests/ and bench/.

The oracle is the dense formula in float64 on the same rounded inputs, with every N x K matrix, from
the definition of the labels. The tolerances are the project's promises, measured against it; see
:func:`assert_loss_close`.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softcl.labels import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    DistillationLabels,
    HardLabels,
    LabelRule,
    MixedLabels,
    NeighborLabels,
    RelationalLabels,
)

NAMED_RULES: dict[str, LabelRule] = {
    "hard": HardLabels(),
    "relational": RelationalLabels(),
    "mixed": MixedLabels(0.3),
    "adaptive_soft-1": AdaptiveSoftLabels(1),
    "adaptive_soft-7": AdaptiveSoftLabels(7),
    "adaptive_neighbors-5": AdaptiveNeighborLabels(5),
    "neighbors-3": NeighborLabels(3),
    "distillation": DistillationLabels(),
    "unnamed": LabelRule(positive=0.5, mean=0.25, confident_neighbor=0.5, num_neighbors=4),
}
RULES: tuple[LabelRule, ...] = tuple(NAMED_RULES.values())

KINDS = ("random", "clustered", "duplicates")

# Relative error of lse, loss and entropy against float64, and error of the gradient as a fraction
# of its largest entry. Inputs in half precision are compared after their rounding, on tensor cores.
LSE_TOLERANCE = 2e-6
ENTROPY_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Problem:
    """Inputs of one call: unit rows query (N, D), key (N, D), queue (K, D)."""

    query: Tensor
    key: Tensor
    queue: Tensor

    def double(self) -> Problem:
        """The same, already rounded, values in float64: the oracle's inputs."""
        return Problem(self.query.double(), self.key.double(), self.queue.double())


def make_problem(
    N: int,
    K: int,
    D: int,
    *,
    kind: str = "random",
    dtype: torch.dtype = torch.float32,
    queue_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Unit rows to test on.

    Kinds: "random" are Gaussian directions; "clustered" lie around a few centres, the key close to
    its query, so that the teacher's softmax is sharp and soft labels are clipped; "duplicates" is
    clustered with every queue row occurring several times, so that the nearest rows tie.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(rows: int) -> Tensor:
        return torch.randn(rows, D, generator=generator, dtype=torch.float64)

    if kind == "random":
        query, key, queue = gaussian(N), gaussian(N), gaussian(K)
    elif kind in ("clustered", "duplicates"):
        centers = gaussian(max(2, min(8, K // 4 + 1)))
        spread = 0.3
        base = centers[torch.randint(len(centers), (N,), generator=generator)]
        query, key = base + spread * gaussian(N), base + spread * gaussian(N)
        queue = centers[torch.randint(len(centers), (K,), generator=generator)]
        queue = queue + spread * gaussian(K)
        if kind == "duplicates":
            queue = queue[torch.randint(max(1, K // 3), (K,), generator=generator)]
    else:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    query, key, queue = (normalize(x, dim=1).to(device) for x in (query, key, queue))
    return Problem(query.to(dtype), key.to(dtype), queue.to(queue_dtype or dtype))


def rule_name(rule: LabelRule) -> str:
    """The rule's name among NAMED_RULES, or its numbers."""
    return next((name for name, named in NAMED_RULES.items() if named == rule), repr(rule))


def fitting(rule: LabelRule, num_rows: int) -> LabelRule:
    """The rule with no more neighbours than there are rows."""
    return dataclasses.replace(rule, num_neighbors=min(rule.num_neighbors, num_rows))


def random_rules(count: int, seed: int) -> list[LabelRule]:
    """Rules that nobody named."""
    draw = random.Random(seed)

    def number(chance: float, low: float = 0.1, high: float = 3.0) -> float:
        return round(draw.uniform(low, high), 3) if draw.random() < chance else 0.0

    rules: list[LabelRule] = []
    while len(rules) < count:
        clip = draw.random() < 0.4
        numbers = dict(
            positive=number(0.8) or 0.5 * clip,
            mean=number(0.6),
            confident_mean=number(0.6, high=6.0),
            neighbor=0.0 if clip else number(0.4),
            confident_neighbor=0.0 if clip else number(0.4),
            clip=clip,
            num_neighbors=draw.choice((0, 1, 4, 6)),
        )
        if numbers["mean"] + numbers["confident_mean"] > 0.0:
            numbers["teacher_positive"] = draw.choice((None, "zero", "self"))
        if numbers["positive"] + numbers["mean"] > 0.0:
            rules.append(LabelRule(**numbers))
    return rules


class Labels(NamedTuple):
    """The labels (N, 1 + K), positive first, rows summing to one, and what they were made of."""

    labels: Tensor
    confidence: Tensor  # (N,)
    entropy: Tensor  # (N,)
    nearest: Tensor  # (N, n)


def dense_labels(
    rule: LabelRule,
    logits: Tensor,  # (N, K) t . Q_j / teacher_temperature; -inf where a row takes no part
    own: Tensor,  # (N, 1) t . t / teacher_temperature
) -> Labels:
    """The labels as their definition reads: p on the positive, a q_j on every queue row, and w_j
    more, or p at most, on each of the n nearest."""
    q = logits.softmax(1)
    entropy = -torch.special.xlogy(q, q).sum(1, keepdim=True)
    rows = logits.isfinite().sum(1, keepdim=True).to(logits.dtype)
    confidence = torch.where(rows > 1, 1.0 - entropy / rows.clamp(min=2).log(), 0.0).clamp(0.0, 1.0)
    nearest = logits.sort(dim=1, descending=True, stable=True).indices[:, : rule.num_neighbors]
    share = torch.zeros_like(own)
    if rule.teacher_positive is not None:
        own = own if rule.teacher_positive == "self" else torch.zeros_like(own)
        q = torch.cat([own, logits], 1).softmax(1)
        share, q = q[:, :1], q[:, 1:]
    mass = rule.mean + rule.confident_mean * confidence
    labels = mass * q
    near = labels.gather(1, nearest)
    if rule.clip:
        near = near.clamp(max=rule.positive)
    else:
        near = near + rule.neighbor + rule.confident_neighbor * confidence
    labels = torch.cat([rule.positive + mass * share, labels.scatter(1, nearest, near)], 1)
    labels = labels / labels.sum(1, keepdim=True)
    return Labels(labels, confidence.squeeze(1), entropy.squeeze(1), nearest)


class LossOracle(NamedTuple):
    """What a call of the loss should give, in float64; dquery is of the sum of the losses."""

    loss: Tensor  # (N,)
    dquery: Tensor  # (N, D)
    confidence: Tensor  # (N,)
    entropy: Tensor  # (N,)
    positive_rank: Tensor  # (N,)
    neighbor_indices: Tensor  # (N, n)


def loss_oracle(
    problem: Problem,
    rule: LabelRule,
    *,
    temperature: float = 0.1,
    teacher_temperature: float = 0.05,
    positive: bool = True,
    normalize: bool = False,
    excluded: Tensor | None = None,
) -> LossOracle:
    """The cross-entropy against `dense_labels`, its gradient by autograd, and the diagnostics."""
    p = problem.double()
    query = p.query.detach().clone().requires_grad_()
    with torch.enable_grad():
        z, t = (unit(x) if normalize else x for x in (query, p.key))
        cosines, teacher = z @ p.queue.T, t @ p.queue.T  # (N, K)
        if excluded is not None:
            places = torch.arange(len(p.queue), device=excluded.device) == excluded[:, None]
            cosines, teacher = (x.masked_fill(places, -torch.inf) for x in (cosines, teacher))
        own = (z * t).sum(1, keepdim=True)
        made = dense_labels(
            rule, teacher / teacher_temperature, (t * t).sum(1, keepdim=True) / teacher_temperature
        )
        logits = torch.cat([own, cosines], 1) / temperature
        total = (logits if positive else logits[:, 1:]).logsumexp(1)
        # An excluded row has no label: 0 times its infinity is left out.
        loss = total - torch.where(made.labels > 0.0, made.labels * logits, 0.0).sum(1)
        (dquery,) = torch.autograd.grad(loss.sum(), query)
    rank = (cosines > own).sum(1)
    return LossOracle(loss.detach(), dquery, made.confidence, made.entropy, rank, made.nearest)


class StatisticsOracle(NamedTuple):
    """What a call of the statistics should give, in float64 and differentiable."""

    lse: Tensor  # (N,)
    mean: Tensor  # (N, D)
    entropy: Tensor  # (N,)
    neighbor_logits: Tensor  # (N, k)
    neighbor_indices: Tensor  # (N, k)


def statistics_oracle(
    vectors: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    temperature: float,
    num_neighbors: int = 0,
    *,
    excluded: Tensor | None = None,  # (N,)
) -> StatisticsOracle:
    """The softmax of every vector over the queue's rows, written out."""
    queue = queue.double()
    logits = vectors.double() @ queue.T / temperature  # (N, K)
    if excluded is not None:
        places = torch.arange(len(queue), device=excluded.device) == excluded[:, None]
        logits = logits.masked_fill(places, -torch.inf)
    share, lse = logits.softmax(1), logits.logsumexp(1)
    # Of a row that takes no part p log p has no derivative: 0 times infinity is left out.
    entropy = lse - (share * torch.where(logits.isfinite(), logits, 0.0)).sum(1)
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :num_neighbors]
    return StatisticsOracle(lse, share @ queue, entropy, logits.gather(1, order), order)


def unit(rows: Tensor) -> Tensor:
    """Rows divided by their norms; rows of norm 1e-12 or less have no gradient."""
    norm = rows.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-12, rows / norm, rows.detach() / 1e-12)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest |actual - expected| / max(1, |expected|)."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float(((actual - expected).abs() / expected.abs().clamp(min=1.0)).max())


def gradient_error(actual: Tensor, expected: Tensor, temperature: float | None = None) -> float:
    """Largest |actual - expected| as a fraction of the largest |expected|.

    A gradient is the difference of two means of unit rows divided by the temperature. Where they
    cancel, a typical entry of such a mean, 1 / (sqrt(D) temperature), stands in for its size.
    """
    floor = 0.0 if temperature is None else actual.shape[1] ** -0.5 / temperature
    actual, expected = actual.detach().double(), expected.detach().double()
    return float(
        (actual - expected).abs().max() / expected.abs().max().clamp(min=max(floor, 1e-30))
    )


def assert_loss_close(
    loss: Tensor,
    dquery: Tensor | None,
    oracle,
    dtype: torch.dtype,
    *,
    temperature: float = 0.1,
    scale: float = 1.0,
) -> None:
    """Hold a loss (N,) and its gradient (N, D) to the promises for inputs of ``dtype``.

    ``oracle`` is what :func:`loss_oracle` returned. ``scale`` widens the bounds where a test says
    why.
    """
    error = relative_error(loss, oracle[0])
    assert error <= scale * LSE_TOLERANCE, f"loss is off by {error:.2e}"
    if dquery is not None:
        error = gradient_error(dquery, oracle[1], temperature)
        assert error <= scale * GRADIENT_TOLERANCE[dtype], f"gradient is off by {error:.2e}"


def assert_neighbors_close(
    values: Tensor,  # (N, k)
    indices: Tensor,  # (N, k)
    vectors: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    temperature: float,
    tolerance: float = 2e-6,
) -> None:
    """The k neighbours are a top-k of the exact cosines, near-ties within ``tolerance`` excused.

    Checks that the indices are distinct, that the values belong to them and descend, and that no
    row left out is better than the worst one kept.
    """
    exact = vectors.double() @ queue.double().T / temperature  # (N, K)
    k = indices.shape[1]
    slack = tolerance / temperature
    own = exact.gather(1, indices)
    assert all(len(set(row)) == k for row in indices.tolist()), "an index occurs twice"
    assert float((own - values.double()).abs().max()) <= slack, "values are not their rows' logits"
    assert bool((values[:, 1:] <= values[:, :-1]).all()), "values do not descend"
    best = exact.topk(k, dim=1).values
    assert float((best - own.sort(dim=1, descending=True).values).abs().max()) <= slack, (
        "a better row was left out"
    )


def available_backends(problem: Problem, rule: LabelRule | None = None) -> list[str]:
    """The backends that run ``problem`` here, in order of preference."""
    from softcl.ops import BACKENDS, UnsupportedBackendError, choose_backend

    names = []
    for name in BACKENDS:
        try:
            choose_backend(problem.query, problem.queue, rule=rule, backend=name)
        except UnsupportedBackendError:
            continue
        names.append(name)
    return names
