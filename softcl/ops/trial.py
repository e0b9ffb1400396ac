"""The small problem on which a GPU backend is right once before ``auto`` takes it."""

from __future__ import annotations

from typing import Any

import torch

from softcl import trust
from softcl.labels import LabelRule
from softcl.ops import algebra
from softcl.ops.call import Call, LossCall, StatisticsCall, coldest

N, K = 256, 4096
COLD = 0.023  # below it the kernels keep a running maximum

# A trial is to find what is wrong, not what is rounded: these times the promised errors.
SCALE = {torch.float32: 50.0, torch.bfloat16: 4.0, torch.float16: 4.0}


def reason_against(name: str, call: Call) -> str | None:
    """Why backend ``name`` is not to be chosen for ``call`` on this machine, or None."""
    if name == "reference":
        return None
    return trust.reason_against(
        "softcl.ops.trial:run", f"backend {name}", call.query.device, **facts_of(name, call)
    )


def facts_of(name: str, call: Call) -> dict[str, Any]:
    """The kind of a call, as `run` takes it."""
    numbers = None
    if isinstance(call, LossCall):
        # Rules with the same terms run the same kernels, whatever their weights.
        *weights, clip, _, teacher_positive = call.rule.to_numbers()
        numbers = [*(float(w > 0.0) for w in weights), clip, 0.0, teacher_positive]
    k = call.num_neighbors
    return {
        "backend": name,
        "D": call.query.shape[1],
        "vector_dtype": str(call.query.dtype).removeprefix("torch."),
        "queue_dtype": str(call.queue.dtype).removeprefix("torch."),
        "numbers": numbers,
        "num_neighbors": min(K, 1 << (k - 1).bit_length()) if k else 0,
        "cold": coldest(call) < COLD,
        "excluded": call.excluded is not None,
    }


def run(
    device: str,
    backend: str,
    D: int,
    vector_dtype: str,
    queue_dtype: str,
    numbers: list[float] | None,
    num_neighbors: int,
    cold: bool,
    excluded: bool,
) -> None:
    """Try one kind of call.

    Raises:
        AssertionError: the backend is wrong.
        Exception: it fails.
    """
    from softcl.testing import make_problem

    dtype, queue_dtype = getattr(torch, vector_dtype), getattr(torch, queue_dtype)
    problem = make_problem(
        N, K, D, kind="clustered", dtype=dtype, queue_dtype=queue_dtype, device=device
    )
    temperatures = (0.02, 0.015) if cold else (0.1, 0.05)
    own = torch.arange(N, device=device) if excluded else None
    if numbers is None:
        _try_statistics(backend, problem, temperatures[0], num_neighbors, own)
    else:
        numbers[-2] = float(num_neighbors)
        _try_loss(backend, problem, LabelRule.from_numbers(numbers), temperatures, own)


def _results(backend: str, call: Call) -> dict[str, torch.Tensor]:
    from softcl.ops.backends import load_backend

    return dict(zip(call.empty_results(), load_backend(backend).run(call), strict=True))


def _try_loss(backend, problem, rule, temperatures, excluded) -> None:
    from softcl.testing import Problem, assert_loss_close, loss_oracle

    student, teacher = temperatures
    found = _results(
        backend,
        LossCall(
            problem.query, problem.key, problem.queue, rule, student, teacher,
            positive=True, normalize=True, excluded=excluded, gradient=True, diagnostics=True,
        ),
    )  # fmt: skip
    # What is normalised is rounded to its dtype: the oracle gets the rounded rows.
    dtype = problem.query.dtype
    z, norm = algebra.unit_rows(problem.query, torch.float32)
    t, _ = algebra.unit_rows(problem.key, torch.float32)
    oracle = loss_oracle(
        Problem(z, t, problem.queue), rule, temperature=student, teacher_temperature=teacher,
        excluded=excluded,
    )  # fmt: skip
    dz = oracle.dquery
    expected = oracle._replace(dquery=(dz - z * (z * dz).sum(1, keepdim=True)) / norm)
    assert_loss_close(
        found["loss"], found["dquery"], expected, dtype, temperature=student, scale=SCALE[dtype]
    )


def _try_statistics(backend, problem, temperature, num_neighbors, excluded) -> None:
    from softcl.testing import assert_neighbors_close, relative_error, statistics_oracle

    call = StatisticsCall(problem.query, problem.queue, temperature, num_neighbors, True, excluded)
    found = _results(backend, call)
    exact = statistics_oracle(problem.query, problem.queue, temperature, excluded=excluded)
    for name in ("lse", "mean", "entropy"):
        error = relative_error(found[name], getattr(exact, name))
        tolerance = 1e-2 if name == "mean" else 5e-4  # weights of the mean are in half precision
        assert error <= tolerance, f"{name} is off by {error:.2e}"
    if excluded is None and num_neighbors > 0:
        assert_neighbors_close(
            found["neighbor_logits"], found["neighbor_indices"], problem.query, problem.queue,
            temperature, tolerance=1e-5,
        )  # fmt: skip
