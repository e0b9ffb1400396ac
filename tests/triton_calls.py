"""Calls of the Triton backend, and what the float64 oracle holds them to."""

from __future__ import annotations

import math

from softcl.ops import triton
from softcl.ops.call import LossCall
from softcl.testing import (
    ENTROPY_TOLERANCE,
    Problem,
    assert_loss_close,
    loss_oracle,
    relative_error,
)


def on(device, p):
    return Problem(p.query.to(device), p.key.to(device), p.queue.to(device))


def run(p, rule, temperature=0.1, teacher_temperature=0.05, **options):
    options = {
        "positive": True,
        "normalize": False,
        "excluded": None,
        "gradient": True,
        "diagnostics": True,
        **options,
    }
    return triton.run(
        LossCall(p.query, p.key, p.queue, rule, temperature, teacher_temperature, **options)
    )


def check(
    p, rule, temperature=0.1, teacher_temperature=0.05, *, positive=True, scale=1.0, excluded=None
):
    """One call against the oracle; everything that comes back is judged."""
    options = {} if excluded is None else {"excluded": excluded}
    got = run(p, rule, temperature, teacher_temperature, positive=positive, **options)
    oracle = loss_oracle(
        p,
        rule,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        positive=positive,
        **options,
    )
    # One rounding of a cosine, 6e-8, moves a logit by 6e-8 / temperature: what is promised for
    # temperatures in use grows below them.
    scale *= max(1.0, 0.05 / min(temperature, teacher_temperature))
    assert_loss_close(got[0], got[1], oracle, p.query.dtype, temperature=temperature, scale=scale)
    if rule.needs_softmax:
        assert relative_error(got[2], oracle[2]) <= scale * ENTROPY_TOLERANCE
        assert relative_error(got[3], oracle[3]) <= scale * ENTROPY_TOLERANCE
    else:
        assert got[2].shape == got[3].shape == (0,)
    exact = cosines(p.query, p.queue, excluded)
    own = (p.query.double() * p.key.double()).sum(1, keepdim=True)
    assert bool((got[4] >= (exact > own + 1e-6).sum(1)).all())
    assert bool((got[4] <= (exact > own - 1e-6).sum(1)).all())
    k = rule.num_neighbors
    assert got[5].shape == (len(p.query), k)
    if k:
        exact = cosines(p.key, p.queue, excluded)
        assert all(len(set(row)) == k for row in got[5].tolist())
        kept = exact.gather(1, got[5]).sort(1, descending=True).values
        assert float((kept - exact.topk(k, 1).values).abs().max()) <= 2e-6


def cosines(rows, queue, excluded):
    """Exact ones (N, K), minus infinity where a column is excluded."""
    exact = rows.double() @ queue.double().T
    if excluded is not None:
        n = (excluded >= 0).nonzero()[:, 0]
        exact[n, excluded[n]] = -math.inf
    return exact
