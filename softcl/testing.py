"""Inputs, oracle and tolerances shared by tests/ and bench/.

The oracle is the reference backend in float64 on the same rounded inputs. The tolerances are the
project's promises, measured against it; see :func:`assert_loss_close`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softcl.labels import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    HardLabels,
    LabelRule,
    MixedLabels,
    NeighborLabels,
    RelationalLabels,
)
from softcl.ops import reference

RULES: tuple[LabelRule, ...] = (
    HardLabels(),
    RelationalLabels(),
    MixedLabels(0.3),
    AdaptiveSoftLabels(1),
    AdaptiveSoftLabels(7),
    AdaptiveNeighborLabels(5),
    NeighborLabels(3),
)

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


def loss_oracle(problem: Problem, rule: LabelRule, **arguments):
    """The reference's six results in float64 on ``problem``; keywords as a backend takes them."""
    p = problem.double()
    options = {"positive": True, "normalize": False, "gradient": True, "diagnostics": True}
    options.update(arguments)
    temperature = options.pop("temperature", 0.1)
    teacher_temperature = options.pop("teacher_temperature", 0.05)
    return reference.soft_contrastive(
        p.query, p.key, p.queue, rule, temperature, teacher_temperature, **options
    )


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
