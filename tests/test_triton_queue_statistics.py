"""The Triton statistics: exact neighbours in every order, and the sums beside them."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from loss_calls import check_statistics, pairs, run_statistics, some_long
from triton_calls import on

from softcl.ops import triton
from softcl.testing import GRADIENT_TOLERANCE, assert_neighbors_close, make_problem

pytestmark = pytest.mark.usefixtures("triton_device")

F, B, H = torch.float32, torch.bfloat16, torch.float16


run = functools.partial(run_statistics, triton)


def check(query, queue, *arguments, **options):
    tolerance = 2 * GRADIENT_TOLERANCE[query.dtype]
    return check_statistics(triton, query, queue, *arguments, mean_tolerance=tolerance, **options)


@pytest.mark.parametrize(
    ("shape", "dtypes", "temperature"),
    pairs(
        [(1, 1, 1), (3, 97, 65), (9, 301, 128)],
        [(F, F), (B, B), (H, H), (B, H), (F, B)],
        (0.01, 0.1),
    ),
    ids=str,
)
def test_against_reference(triton_device, shape, dtypes, temperature):
    """Sums and neighbours; the search alone finds the same."""
    N, K, D = shape
    kind = "clustered" if N == 9 else "random"
    p = make_problem(N, K, D, kind=kind, dtype=dtypes[0], queue_dtype=dtypes[1])
    p = on(triton_device, p)
    check(p.query, p.queue, temperature, min(K, 20))


EXACT_STEP = 2.0**-6  # products and sums are exact in float32: ties are ties to the last bit


ORDERS = ["random", "ascending", "descending", "equal", "repeated"]
COUNTS = [1, 5, 64, 200, 1024]


@pytest.mark.parametrize(
    ("order", "k"),
    some_long(
        list(itertools.product(ORDERS, COUNTS)),
        lambda case: (ORDERS.index(case[0]) + COUNTS.index(case[1])) % 2,
    ),
)
def test_neighbors_and_ties(triton_device, order, k):
    generator = torch.Generator().manual_seed(0)
    vectors, queue = (
        torch.randint(-3, 4, (rows, 12), generator=generator) * EXACT_STEP for rows in (3, 1300)
    )
    cosines = vectors[0] @ queue.T
    queue = {
        "random": queue,
        "ascending": queue[cosines.argsort()],
        "descending": queue[cosines.argsort(descending=True)],
        "equal": queue[:1].repeat(1300, 1),
        "repeated": queue[:50].repeat(26, 1),
    }[order].contiguous()
    vectors, queue = vectors.to(triton_device), queue.to(triton_device)
    *_, logits, indices = run(vectors, queue, 0.25, k)
    assert_neighbors_close(logits, indices, vectors, queue, 0.25, tolerance=0.0)
    assert torch.equal(indices, lowest_first(vectors, queue, k))


def lowest_first(vectors, queue, k):
    """The k best rows (N, k), of equal ones the lowest."""
    exact = vectors.double() @ queue.double().T
    return exact.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize(
    ("target",), some_long([("sm_80",), ("sm_90",), ("sm_100",), ("gfx942",)], ("sm_90",).__eq__)
)
def test_lowest_of_equal_rows_in_every_layout(triton_device, monkeypatch, target):
    """However the chunks of the architecture's tiles interleave, and a tie of the chunks too."""
    if triton_device == "cuda":
        pytest.skip("other architectures' tiles need not fit here")
    monkeypatch.setattr(triton, "target_of", lambda device: (target, 132))
    generator = torch.Generator().manual_seed(1)
    vectors, kinds = (
        torch.randint(-3, 4, (rows, 12), generator=generator) * EXACT_STEP for rows in (3, 4)
    )
    queue = kinds[torch.randint(4, (900,), generator=generator)]
    vectors, queue = vectors.to(B), queue.to(B)
    for k in (1, 6, 30):
        *_, indices = run(vectors, queue, 0.25, k, sums=False)
        assert torch.equal(indices, lowest_first(vectors, queue, k))


@pytest.mark.parametrize(("dtype", "temperature"), [(F, 0.1), (B, 0.01), (F, 1e6)], ids=str)
def test_excluded_row(triton_device, dtype, temperature):
    """Within a batch: the queue is the vectors themselves, each without its own, nearest, row."""
    p = on(triton_device, make_problem(70, 3, 33, kind="clustered", dtype=dtype))
    excluded = torch.arange(70, device=triton_device).repeat_interleave(2)[::2]  # strided
    excluded[5] = -1
    check(p.query, p.query, temperature, 69, excluded=excluded)


@pytest.mark.parametrize("k", [3, 40])
def test_every_row_is_a_neighbor(triton_device, k):
    """k = K."""
    p = on(triton_device, make_problem(2, k, 10))
    *_, logits, indices = run(p.query, p.queue, 0.1, k)
    assert torch.equal(indices.sort(1).values, torch.arange(k, device=triton_device).expand(2, k))
    assert_neighbors_close(logits, indices, p.query, p.queue, 0.1)


@pytest.mark.parametrize("dtype", [F, B], ids=str)
def test_the_same_bits_without_sums(triton_device, dtype):
    p = on(triton_device, make_problem(5, 700, 70, dtype=dtype))
    full, alone = (run(p.query, p.queue, 0.07, 30, sums=sums) for sums in (True, False))
    assert torch.equal(alone.neighbor_logits, full.neighbor_logits)
    assert torch.equal(alone.neighbor_indices, full.neighbor_indices)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_rows(triton_device, value):
    p = make_problem(4, 150, 9)
    clean = run(*(x.to(triton_device) for x in (p.query, p.queue)), 0.1, 4)
    vectors = p.query.clone()
    vectors[2, 8] = value
    got = run(*(x.to(triton_device) for x in (vectors, p.queue)), 0.1, 4)
    others = [0, 1, 3]
    for x, y in zip(got, clean, strict=True):
        assert torch.equal(x[others], y[others])
    assert all(bool(x[2].isnan().all()) for x in got[:3])
    queue = p.queue.clone()
    queue[0, 0] = value
    got = run(*(x.to(triton_device) for x in (p.query, queue)), 0.1, 4)
    assert all(bool(x.isnan().all()) for x in got[:3])
    assert bool(((got[4] >= 0) & (got[4] < 150)).all())


def test_neighbor_past_32_bits(triton_device, monkeypatch):
    """Rows of a queue of more than 2^31 numbers, of which the selection reads a few."""
    from softcl.kernels import plan, select

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    K, D = (1 << 24) + 64, 128
    try:
        queue = torch.empty(K, D, device=triton_device, dtype=B)  # 4 GB, untouched
    except RuntimeError:
        pytest.skip("no room for 4 GB")
    work = plan.Work(1, K, D, B, B, num_neighbors=1)
    how = plan.make_plan(work, *triton.target_of(queue.device))
    last = how.num_chunks - 1  # ends with the queue's last rows
    columns = chunk_rows(how, last)
    columns = columns[columns < K]
    assert int(columns.max()) * D > 2**31
    queue[columns] = 0.0
    vector = torch.zeros(1, D, device=triton_device, dtype=B)
    vector[0, 5] = 1.0
    queue[int(columns.max()), 5] = 1.0
    maxima = torch.zeros(1, how.num_chunks, device=triton_device)
    maxima[0, last] = 1.0
    logits, indices = select.launch(vector, queue, maxima, 1, 1.0, how)
    assert indices.tolist() == [[int(columns.max())]]
    assert logits.tolist() == [[1.0]]


def chunk_rows(how, chunk):
    """The queue rows of a chunk, as kernels/stream.py lays them out."""
    c = how.config
    group, quad = chunk // 4 % c.CHUNK_GROUPS, chunk % 4
    width = c.BLOCK_K // c.CHUNK_GROUPS
    first_tile = chunk // (4 * c.CHUNK_GROUPS) * c.TILES_PER_CHUNK
    columns = torch.arange(width).reshape(-1, 4, 2)[:, quad].reshape(-1) + group * width
    tiles = torch.arange(first_tile, first_tile + c.TILES_PER_CHUNK) * c.BLOCK_K
    return (tiles[:, None] + columns).reshape(-1)
