"""The compiled CPU statistics: exact neighbours in every order, and the sums beside them."""

from __future__ import annotations

import math

import pytest
import torch
from loss_calls import exact_statistics, pairs, run_statistics, scale_at

from softcl.testing import (
    ENTROPY_TOLERANCE,
    KINDS,
    LSE_TOLERANCE,
    assert_neighbors_close,
    gradient_error,
    make_problem,
    relative_error,
)

pytest.importorskip("softcl._C", reason="softcl._C is not built")
from softcl.ops import cpu, native  # noqa: E402

# Coarse coordinates: products and sums are exact in float32, so ties are ties to the last bit.
EXACT_STEP = 2.0**-6


def exact_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (rows, dim), generator=generator) * EXACT_STEP


def expected_neighbors(vectors, queue, k):
    """Values descending, equal ones by lowest row."""
    cosines = vectors.double() @ queue.double().T
    values, indices = cosines.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@pytest.mark.parametrize("k", [1, 2, 5, 64, 65, 200, 1023, 2000])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal", "repeated"])
def test_neighbors_and_ties(order, k):
    """Exactly the lowest rows among equal ones, whatever order they come in; k = K included."""
    vectors, queue = exact_rows(19, 12, 0), exact_rows(2000, 12, 1)
    cosines = vectors[0] @ queue.T
    queue = {
        "random": queue,
        "ascending": queue[cosines.argsort()],
        "descending": queue[cosines.argsort(descending=True)],
        "equal": queue[:1].repeat(2000, 1),
        "repeated": queue[:50].repeat(40, 1),
    }[order].contiguous()
    values, rows = expected_neighbors(vectors, queue, k)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            *_, logits, indices = run_statistics(cpu, vectors, queue, 0.25, k)
            assert torch.equal(indices, rows)
            assert torch.equal(logits, (values / 0.25).float())
    finally:
        torch.set_num_threads(before)


CASES = pairs(
    shape=[(1, 1, 1), (31, 97, 65), (100, 3001, 300)],
    temperature=[0.01, 0.1, 1.0],
    dtypes=[(torch.float32, torch.float32), (torch.bfloat16, torch.float16)],
    kind=KINDS,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_against_reference(case):
    p = make_problem(
        *case["shape"], kind=case["kind"], dtype=case["dtypes"][0], queue_dtype=case["dtypes"][1]
    )
    temperature, k = case["temperature"], min(len(p.queue), 20)
    got = run_statistics(cpu, p.query, p.queue, temperature, k)
    want = exact_statistics(p.query, p.queue, temperature, k)
    scale = scale_at(temperature)
    assert relative_error(got.lse, want.lse) <= LSE_TOLERANCE
    assert gradient_error(got.mean, want.mean) <= 2 * scale * LSE_TOLERANCE
    assert relative_error(got.entropy, want.entropy) <= scale * ENTROPY_TOLERANCE
    assert_neighbors_close(got.neighbor_logits, got.neighbor_indices, p.query, p.queue, temperature)


def test_without_sums():
    """The search alone: same neighbours, and no sums."""
    p = make_problem(40, 3000, 70)
    full = run_statistics(cpu, p.query, p.queue, 0.07, 200)
    lse, mean, entropy, logits, indices = run_statistics(
        cpu, p.query, p.queue, 0.07, 200, sums=False
    )
    torch.testing.assert_close(logits, full[3], rtol=0, atol=2e-6 / 0.07)
    assert_neighbors_close(logits, indices, p.query, p.queue, 0.07)
    assert lse.shape == entropy.shape == (0,)
    assert mean.shape == (0, 70)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_rows(value):
    p = make_problem(20, 300, 9)
    clean = run_statistics(cpu, p.query, p.queue, 0.1, 4)
    vectors = p.query.clone()
    vectors[5, 8] = value
    got = run_statistics(cpu, vectors, p.queue, 0.1, 4)
    others = torch.arange(20) != 5
    for x, y in zip(got, clean, strict=True):
        assert torch.equal(x[others], y[others])
        if x.is_floating_point():
            assert bool(x[5].isnan().all())
    queue = p.queue.clone()
    queue[0, 0] = value
    got = run_statistics(cpu, p.query, queue, 0.1, 4)
    assert all(bool(x.isnan().all()) for x in got[:4])
    assert bool(((got[4] >= 0) & (got[4] < 300)).all())


def test_bad_arguments_name_themselves():
    module, _ = native.load()
    p = make_problem(2, 3, 4)
    good = {
        "query": p.query.data_ptr(),
        "queue": p.queue.data_ptr(),
        "num_queries": 2,
        "queue_size": 3,
        "dim": 4,
        "temperature": 0.1,
    }
    module.cpu_run(**good)
    for name, value in {
        "query": 0,
        "vector_type": 3,
        "num_queries": 0,
        "queue_size": -1,
        "dim": 0,
        "temperature": 0.0,
        "num_threads": 0,
    }.items():
        with pytest.raises(ValueError, match=name):
            module.cpu_run(**{**good, name: value})
    with pytest.raises(ValueError, match="num_neighbors=4"):
        module.cpu_run(**good, rule={"num_neighbors": 4})
    with pytest.raises(ValueError, match="neighbor_logits"):
        module.cpu_run(**good, rule={"num_neighbors": 1})
    with pytest.raises(ValueError, match="temperature"):
        module.cpu_run(**{**good, "temperature": math.nan})
    with pytest.raises(ValueError, match="key"):
        module.cpu_run(**good, loss=p.query.data_ptr())
