"""How tests call a backend, and hold what it returns to the dense formula. Not a test file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softcl.labels import LabelRule
from softcl.ops import QueueStatistics, reference
from softcl.ops.call import LossCall, StatisticsCall
from softcl.testing import (
    ENTROPY_TOLERANCE,
    LossOracle,
    Problem,
    assert_loss_close,
    loss_oracle,
    relative_error,
    unit,
)


def run_loss(
    backend,
    p: Problem,
    rule: LabelRule,
    temperature: float = 0.1,
    teacher_temperature: float = 0.05,
    **options,
) -> LossOracle:
    """The six results of a backend's loss, all wanted if nothing is said."""
    wanted = dict(
        positive=True, normalize=False, excluded=None, gradient=True, diagnostics=True
    ) | options  # fmt: skip
    call = LossCall(p.query, p.key, p.queue, rule, temperature, teacher_temperature, **wanted)
    return LossOracle(*backend.run(call))


def run_statistics(
    backend,
    vectors: Tensor,
    queue: Tensor,
    temperature: float = 0.1,
    num_neighbors: int = 0,
    *,
    sums: bool = True,
    excluded: Tensor | None = None,
) -> QueueStatistics:
    call = StatisticsCall(vectors, queue, temperature, num_neighbors, sums, excluded)
    return QueueStatistics(*backend.run(call))


def exact_statistics(vectors: Tensor, queue: Tensor, *numbers, **options) -> QueueStatistics:
    """The reference's, of float64 vectors and queue."""
    return run_statistics(reference, vectors.double(), queue.double(), *numbers, **options)


def pairs(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Few cases in which any two values of different parameters meet.

    Each case starts from a pair that is still missing, and takes of every other parameter the value
    that adds most of those.
    """
    places = {name: range(len(options)) for name, options in values.items()}
    missing = {
        frozenset([(a, i), (b, j)]): None
        for a in places for b in places if a < b for i in places[a] for j in places[b]
    }  # fmt: skip
    draw, cases = random.Random(0), []
    while missing:
        case = dict(next(iter(missing)))
        for name in draw.sample(sorted(places), len(places)):
            if name not in case:
                gains = [
                    (sum(frozenset([(name, i), held]) in missing for held in case.items()), i)
                    for i in draw.sample(places[name], len(places[name]))
                ]
                case[name] = max(gains, key=lambda gain: gain[0])[1]
        for a in case.items():
            for b in case.items():
                missing.pop(frozenset([a, b]), None)
        cases.append({name: values[name][case[name]] for name in values})
    return cases


def check_loss(
    got: LossOracle,
    oracle: LossOracle,
    p: Problem,
    rule: LabelRule,
    dtype: torch.dtype,
    *,
    temperature: float = 0.1,
    excluded: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """All six results within the promises for inputs of ``dtype``; of unit rows."""
    assert_loss_close(got.loss, got.dquery, oracle, dtype, temperature=temperature, scale=scale)
    if rule.needs_softmax:
        assert relative_error(got.confidence, oracle.confidence) <= scale * ENTROPY_TOLERANCE
        assert relative_error(got.entropy, oracle.entropy) <= scale * ENTROPY_TOLERANCE
    else:
        assert got.confidence.shape == got.entropy.shape == (0,)
    assert_ranks_close(got.positive_rank, p, excluded)
    assert_nearest_close(got.neighbor_indices, oracle.neighbor_indices, p, excluded)


def scale_at(*temperatures: float) -> float:
    """One rounding of a cosine, 6e-8, moves a logit by 6e-8 / temperature: what is promised for
    temperatures in use grows below them."""
    return max(1.0, 0.05 / min(temperatures))


def rounded_units(p: Problem) -> Problem:
    """What normalize=True makes of rows of any length: unit rows, rounded to their own type."""
    dtype = p.query.dtype
    rows = (unit(x.double()).float().to(dtype) for x in (p.query, p.key))
    return Problem(*rows, p.queue)


def normalized_oracle(p: Problem, rule: LabelRule, **options) -> LossOracle:
    """The oracle of `rounded_units`, its gradient times the rows' norms: rows of different lengths
    have gradients of different lengths, and are judged alike so."""
    units = rounded_units(p)
    oracle = loss_oracle(units, rule, **options)
    z = units.query.double()
    along = (z * oracle.dquery).sum(1, keepdim=True)
    return oracle._replace(dquery=oracle.dquery - z * along)


def stretched(p: Problem, shortest: float = 0.01, longest: float = 50.0) -> Problem:
    """The problem with rows of all lengths between these."""
    lengths = torch.logspace(0, 1, len(p.query), base=longest / shortest, dtype=torch.float64)
    lengths = shortest * lengths[:, None].to(p.query.device)
    rows = ((p.query * lengths), (p.key * lengths.flip(0)))
    return Problem(*(x.to(p.query.dtype) for x in rows), p.queue)


def exact_cosines(rows: Tensor, queue: Tensor, excluded: Tensor | None = None) -> Tensor:
    """(N, K), minus infinity where a row is excluded."""
    cosines = rows.double() @ queue.double().T
    if excluded is not None:
        n = (excluded >= 0).nonzero().squeeze(1)
        cosines[n, excluded[n]] = -torch.inf
    return cosines


def assert_ranks_close(rank: Tensor, p: Problem, excluded: Tensor | None = None) -> None:
    """Cosines within 1e-6 of the positive's may count either way; excluded rows do not count."""
    cosines = exact_cosines(p.query, p.queue, excluded)
    positive = (p.query.double() * p.key.double()).sum(1, keepdim=True)
    assert bool((rank >= (cosines > positive + 1e-6).sum(1)).all())
    assert bool((rank <= (cosines > positive - 1e-6).sum(1)).all())


def assert_nearest_close(
    indices: Tensor, expected: Tensor, p: Problem, excluded: Tensor | None = None
) -> None:
    """The nearest rows of the keys, distinct; cosines within 2e-6 may change places."""
    assert indices.shape == expected.shape
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    cosines = exact_cosines(p.key, p.queue, excluded)
    found = cosines.gather(1, indices).sort(1, descending=True).values
    assert bool(((found - cosines.gather(1, expected)).abs() <= 2e-6).all())
