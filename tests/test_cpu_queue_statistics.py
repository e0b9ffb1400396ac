"""The compiled CPU statistics: exact neighbours in every order, and the sums beside them."""

from __future__ import annotations

import math

import pytest
import torch
from loss_calls import check_statistics, pairs, run_statistics

from softcl.testing import KINDS, make_problem

pytest.importorskip("softcl._C", reason="softcl._C is not built")
from softcl import native
from softcl.ops import cpu  # noqa: E402

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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal", "repeated"])
def test_neighbors_and_ties(order, threads):
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
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for k in (1, 2, 5, 64, 65, 200, 1023, 2000):
            got = run_statistics(cpu, vectors, queue, 0.25, k)
            values, rows = expected_neighbors(vectors, queue, k)
            assert torch.equal(got.neighbor_indices, rows)
            assert torch.equal(got.neighbor_logits, (values / 0.25).float())
    finally:
        torch.set_num_threads(before)


F, B, H = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("shape", [(1, 1, 1), (31, 97, 65), (100, 3001, 300)], ids=str)
def test_against_reference(shape):
    """Sums and neighbours; the search alone finds the same."""
    N, K, D = shape
    choices = (0.01, 0.1, 1.0), [(F, F), (B, H), (H, H), (F, B)], KINDS, (1, 20, 200)
    for temperature, (dtype, queue_dtype), kind, k in pairs(*choices):
        p = make_problem(N, K, D, kind=kind, dtype=dtype, queue_dtype=queue_dtype)
        check_statistics(cpu, p.query, p.queue, temperature, min(K, k))


@pytest.mark.parametrize("threads", [1, 2])
def test_excluded_rows(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for N, K, D, k in ((3, 2, 4, 1), (40, 700, 8, 90), (5, 1537, 8, 3)):
            p = make_problem(N, K, D, kind="duplicates")
            excluded = (p.query @ p.queue.T).argmax(1)
            excluded[0], excluded[1] = K - 1, -1
            for temperature in (0.1, 1e6):  # at which every row has its share
                check_statistics(cpu, p.query, p.queue, temperature, k, excluded=excluded)
    finally:
        torch.set_num_threads(before)


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
    p.queue[0, 0] = value
    got = run_statistics(cpu, p.query, p.queue, 0.1, 4)
    assert all(bool(x.isnan().all()) for x in got[:4])
    assert bool(((got.neighbor_indices >= 0) & (got.neighbor_indices < 300)).all())


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
