"""SEED: its labels at the coldest teachers, and a teacher that is frozen."""

from __future__ import annotations

import pytest
import torch
from dense_methods import seed_loss
from torch.nn.functional import normalize

from softcl import DistillationLabels
from softcl.methods import SEED, Batch
from softcl.testing import (
    GRADIENT_TOLERANCE,
    LSE_TOLERANCE,
    available_backends,
    make_problem,
    relative_error,
)

BACKENDS = available_backends(make_problem(2, 3, 4), DistillationLabels())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.01, 1e-3, 1e-4])
@pytest.mark.parametrize("dim", [128, 384, 1024])
def test_cold_teachers_of_any_width(dim: int, temperature: float, backend: str):
    """Half of the queue's first rows are near the keys, one is a key itself: labels are shared."""
    generator = torch.Generator().manual_seed(dim)
    query, key = (torch.randn(12, dim, generator=generator) for _ in range(2))
    queue = torch.randn(70, dim, generator=generator)
    near = temperature**0.5  # t . Q_j is then 1 less about half the temperature
    queue[:6] = normalize(key[:6], dim=1) + near * normalize(queue[:6], dim=1)
    queue[6] = key[6]
    queue = normalize(queue, dim=1)
    method = SEED(teacher_temperature=temperature, projection_dim=dim)

    def found(dtype: torch.dtype, loss):
        leaf = query.to(dtype).requires_grad_()
        batch = Batch(
            {"query": leaf},
            {"query": leaf},
            {"query": key.to(dtype)},
            {"queue": queue.to(dtype)},
            backend=backend,
        )
        rows = loss(batch)
        return rows.detach(), torch.autograd.grad(rows.sum(), leaf)[0]

    rows, gradient = found(torch.float32, lambda batch: method.loss(batch).rows)
    expected, wanted = found(torch.float64, lambda batch: seed_loss(method, batch))
    assert relative_error(rows, expected) <= LSE_TOLERANCE
    # A logit d / temperature is rounded by 2^-24 / temperature, and so is what the labels share.
    rounding = 2.0**-24 / temperature
    bound = (GRADIENT_TOLERANCE[torch.float32] + 4 * rounding) * float(wanted.abs().max())
    assert float((gradient - wanted).abs().max()) <= bound
    unit = normalize(key.double(), dim=1)
    labels = (unit @ queue.double().T / temperature - 1 / temperature).exp()
    assert float(labels[:6].diagonal().min()) > 0.1  # the neighbours take part
