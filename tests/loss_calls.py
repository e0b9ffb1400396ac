"""How tests call one backend, with calls as the operators hand them over, and hold all that comes
back to float64. Not a test file."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from softcl.labels import LabelRule
from softcl.ops.call import LossCall, StatisticsCall
from softcl.ops.library import read
from softcl.testing import (
    ENTROPY_TOLERANCE,
    GRADIENT_TOLERANCE,
    LSE_TOLERANCE,
    LossOracle,
    Problem,
    assert_loss_close,
    assert_neighbors_close,
    gradient_error,
    loss_oracle,
    relative_error,
    rule_name,
    statistics_oracle,
)


class Loss(NamedTuple):
    """The results of a LossCall by name."""

    loss: Tensor
    dquery: Tensor
    confidence: Tensor
    entropy: Tensor
    positive_rank: Tensor
    neighbor_indices: Tensor


class Statistics(NamedTuple):
    """The results of a StatisticsCall by name."""

    lse: Tensor
    mean: Tensor
    entropy: Tensor
    neighbor_logits: Tensor
    neighbor_indices: Tensor


def run_loss(backend, p: Problem, rule, temperature=0.1, teacher_temperature=0.05, **options):
    """A backend's loss; all results are wanted if nothing is said."""
    defaults = dict(positive=True, normalize=False, excluded=None, gradient=True, diagnostics=True)
    options = defaults | options
    call = LossCall(p.query, p.key, p.queue, rule, temperature, teacher_temperature, **options)
    return Loss(*backend.run(read(call)))


def run_statistics(
    backend, query, queue, temperature, num_neighbors=0, *, sums=True, excluded=None
):
    """A backend's statistics of the queue."""
    call = StatisticsCall(query, queue, temperature, num_neighbors, sums, excluded)
    return Statistics(*backend.run(read(call)))


def pairs(*axes) -> list[tuple]:
    """Tuples of one value of each axis, in which every two values of two axes meet, and values of
    one axis come up about equally often."""
    places = list(itertools.combinations(range(len(axes)), 2))
    every = list(itertools.product(*map(range, map(len, axes))))
    met = [{(a, b, row[a], row[b]) for a, b in places} for row in every]
    used = [[0] * len(axis) for axis in axes]
    chosen, missing = [], set().union(*met)

    def worth(i: int) -> tuple[int, int]:
        return len(met[i] & missing), -sum(used[a][x] for a, x in enumerate(every[i]))

    while missing:
        best = max(range(len(every)), key=worth)
        chosen.append(tuple(axis[x] for axis, x in zip(axes, every[best], strict=True)))
        missing -= met[best]
        for a, x in enumerate(every[best]):
            used[a][x] += 1
    return chosen


def some_long(cases: list[tuple], keep) -> list:
    """The cases as pytest's parameters, marked long but where keep(case) is true."""
    return [pytest.param(*case, marks=() if keep(case) else pytest.mark.long) for case in cases]


def case_id(value) -> str:
    """A rule by its name, anything else as it prints."""
    return rule_name(value) if isinstance(value, LabelRule) else str(value)


def scale_of(*temperatures: float) -> float:
    """What the promises, made for temperatures in use, grow by at lower ones: a cosine's rounding,
    6e-8, moves a logit by 6e-8 / temperature, and below 0.05 nothing else is left of the error."""
    return max(1.0, 0.05 / min(temperatures))


def check_loss(
    backend,
    p: Problem,
    rule,
    temperature=0.1,
    teacher_temperature=0.05,
    *,
    gradient_tolerance=GRADIENT_TOLERANCE[torch.float32],
    scale=1.0,
    **options,
) -> Loss:
    """One call against the float64 oracle; everything that comes back is judged, and returned."""
    got = run_loss(backend, p, rule, temperature, teacher_temperature, **options)
    temperatures = dict(temperature=temperature, teacher_temperature=teacher_temperature)
    given = {name: options[name] for name in ("positive", "excluded") if name in options}
    unit, norm = p, None
    if options.get("normalize"):
        unit, norm = unit_problem(p)
    oracle = loss_oracle(unit, rule, **temperatures, **given)
    scale *= scale_of(temperature, teacher_temperature)
    assert_loss_close(got.loss, None, oracle, torch.float32, scale=scale)
    if options.get("gradient", True):
        dquery, expected = got.dquery, oracle.dquery
        if norm is not None:
            # Rows differ in length, and so do their gradients: each times its own.
            z, dquery = unit.query.double(), dquery * norm
            expected = expected - z * (z * expected).sum(1, keepdim=True)
            expected[norm.squeeze(1) <= 1e-12] = 0.0
        error = gradient_error(dquery, expected, temperature)
        assert error <= scale * gradient_tolerance, f"gradient is off by {error:.2e}"
    if options.get("diagnostics", True):
        assert_diagnostics_close(got, oracle, unit, rule, options.get("excluded"), scale)
    return got


def assert_diagnostics_close(got: Loss, oracle: LossOracle, p, rule, excluded, scale) -> None:
    if rule.needs_softmax:
        assert relative_error(got.confidence, oracle.confidence) <= scale * ENTROPY_TOLERANCE
        assert relative_error(got.entropy, oracle.entropy) <= scale * ENTROPY_TOLERANCE
    else:
        assert got.confidence.shape == got.entropy.shape == (0,)
    assert_ranks_close(got.positive_rank, p, excluded)
    k = rule.num_neighbors
    assert got.neighbor_indices.shape == (len(p.query), k)
    if k:
        # The nearest first, each once; near-ties may stand in any order.
        assert all(len(set(row)) == k for row in got.neighbor_indices.tolist())
        exact = cosines_of(p.key, p.queue, excluded)
        kept = exact.gather(1, got.neighbor_indices)
        assert float((kept - exact.topk(k, 1).values).abs().max()) <= 2e-6


def assert_ranks_close(rank: Tensor, p: Problem, excluded: Tensor | None = None) -> None:
    """Cosines within 1e-6 of the positive's may count either way; excluded rows do not count."""
    cosines = cosines_of(p.query, p.queue, excluded)
    positive = (p.query.double() * p.key.double()).sum(1, keepdim=True)
    assert bool((rank >= (cosines > positive + 1e-6).sum(1)).all())
    assert bool((rank <= (cosines > positive - 1e-6).sum(1)).all())


def cosines_of(rows: Tensor, queue: Tensor, excluded: Tensor | None) -> Tensor:
    """Exact ones (N, K), minus infinity where a column is excluded."""
    exact = rows.double() @ queue.double().T
    if excluded is not None:
        n = (excluded >= 0).nonzero()[:, 0]
        exact[n, excluded[n]] = -math.inf
    return exact


def stretched(p: Problem) -> Problem:
    """The problem with rows of lengths from 0.01 to 50: raw projections."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.rand(len(p.query), 1, generator=generator).to(p.query.device) * 50 + 0.01
    rows = (p.query * lengths, p.key * lengths.flip(0))
    return Problem(*(x.to(p.query.dtype) for x in rows), p.queue)


def unit_problem(raw: Problem) -> tuple[Problem, Tensor]:
    """What normalize=True makes of raw rows, and the query's norms (N, 1) in float64: rows divided
    by their true norms, or by 1e-12 if that is more, and rounded to their own dtype."""

    def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
        norm = rows.double().norm(dim=1, keepdim=True)
        return (rows.double() / norm.clamp(min=1e-12)).float().to(rows.dtype), norm

    (query, norm), (key, _) = unit(raw.query), unit(raw.key)
    return Problem(query, key, raw.queue), norm


def check_statistics(
    backend,
    query: Tensor,
    queue: Tensor,
    temperature: float,
    num_neighbors: int,
    *,
    mean_tolerance=2 * GRADIENT_TOLERANCE[torch.float32],
    excluded: Tensor | None = None,
) -> Statistics:
    """Sums and neighbours, and the search alone, against float64; the results with sums."""
    got = run_statistics(backend, query, queue, temperature, num_neighbors, excluded=excluded)
    want = statistics_oracle(query, queue, temperature, num_neighbors, excluded=excluded)
    scale = scale_of(temperature)
    assert relative_error(got.lse, want.lse) <= LSE_TOLERANCE
    assert gradient_error(got.mean, want.mean) <= scale * mean_tolerance
    assert relative_error(got.entropy, want.entropy) <= scale * ENTROPY_TOLERANCE
    alone = run_statistics(
        backend, query, queue, temperature, num_neighbors, sums=False, excluded=excluded
    )
    assert alone.lse.shape == alone.entropy.shape == (0,)
    assert alone.mean.shape == (0, query.shape[1])
    for found in (got, alone):
        if excluded is None:
            assert_neighbors_close(
                found.neighbor_logits, found.neighbor_indices, query, queue, temperature
            )
            continue
        assert not bool((found.neighbor_indices == excluded[:, None]).any())
        assert all(len(set(row)) == num_neighbors for row in found.neighbor_indices.tolist())
        error = (found.neighbor_logits - want.neighbor_logits) * temperature
        assert relative_error(error, torch.zeros_like(error)) <= 2e-6
    return got
