"""Two and four processes on gloo compute what one process computes; parts of a queue merge."""

from __future__ import annotations

import itertools

import distributed_cases
import pytest
import torch
from processes import run_cases

import softcl
from softcl.testing import make_problem


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """The failures of all cases among W processes, which are started once for each W."""
    known: dict[int, dict[str, str]] = {}

    def of(size: int) -> dict[str, str]:
        if size not in known:
            folder = tmp_path_factory.mktemp(f"processes{size}")
            known[size] = run_cases(
                "distributed_cases", list(distributed_cases.CASES), size, folder
            )
        return known[size]

    return of


@pytest.mark.parametrize("name", distributed_cases.CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_processes(failures, size, name):
    assert name not in failures(size), failures(size)[name]


# ---- the merge itself, in one process ----


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicates"])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_statistics_of_parts_merge_into_those_of_the_whole(kind, temperature):
    """At 0.005 a fixed offset would overflow: the merge follows the largest part."""
    p = make_problem(6, 40, 8, kind=kind, dtype=torch.float64, seed=1)
    whole = softcl.queue_statistics(p.query, p.queue, temperature, num_neighbors=7)
    for cuts in ((0, 40), (0, 1, 40), (0, 13, 14, 33, 40), tuple(range(0, 41, 5))):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            k = min(7, stop - start)
            part = softcl.queue_statistics(
                p.query, p.queue[start:stop], temperature, num_neighbors=k
            )
            parts.append(part._replace(neighbor_indices=part.neighbor_indices + start))
        merged = softcl.merge_statistics(parts, num_neighbors=7)
        for name in ("lse", "mean", "entropy", "neighbor_logits"):
            actual, expected = getattr(merged, name), getattr(whole, name)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        if kind != "duplicates":
            assert torch.equal(merged.neighbor_indices, whole.neighbor_indices)


def test_equal_neighbors_merge_by_lowest_row():
    """Whole lists of equal rows: the merged list has the lowest rows, in whatever order it came."""
    vectors, queue = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    queue = queue.repeat(6, 1)  # rows 0, 2, 4, .. are equal, and so are 1, 3, 5, ..
    parts = []
    for start in (8, 0, 4):
        part = softcl.queue_statistics(vectors, queue[start : start + 4], 0.1, num_neighbors=2)
        parts.append(part._replace(neighbor_indices=part.neighbor_indices + start))
    merged = softcl.merge_statistics(parts)
    assert merged.neighbor_indices.tolist() == [[0, 2], [1, 3]]


def test_merged_statistics_are_differentiable():
    p = make_problem(5, 24, 6, dtype=torch.float64, seed=3)

    def value(statistics):
        return (
            statistics.lse.sum() + 2 * statistics.entropy.sum() + statistics.mean.square().sum()
        ) + statistics.neighbor_logits.square().sum()

    whole = p.query.clone().requires_grad_()
    value(softcl.queue_statistics(whole, p.queue, 0.1, num_neighbors=3)).backward()
    split = p.query.clone().requires_grad_()
    parts = [softcl.queue_statistics(split, x, 0.1, num_neighbors=3) for x in p.queue.split(8)]
    value(softcl.merge_statistics(parts)).backward()
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-10, atol=1e-10)
