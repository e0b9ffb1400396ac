"""The nearest images of every image of a set, and groups of images that are nearly the same."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from softcl.evaluation.knn import nearest_rows

_QUERIES = 8192  # rows searched for at a time


def nearest_of_each(
    rows: np.ndarray,  # (M, F) float32, in memory or on the disk
    unit: np.ndarray,  # (M, F) float32, written: the rows, each divided by its length
    neighbors: np.ndarray,  # (M, k) int64, written
    similarities: np.ndarray,  # (M, k) float32, written
    device: torch.device,
) -> None:
    """The k nearest other rows of each row and their cosines, nearest first; exact.

    The search is that of `nearest_rows`; all four arrays may be files mapped into memory.
    """
    count, k = neighbors.shape
    for start in range(0, count, _QUERIES):
        piece = torch.from_numpy(np.array(rows[start : start + _QUERIES]))
        unit[start : start + _QUERIES] = F.normalize(piece, dim=1).numpy()
    bank = torch.from_numpy(unit)
    for start in range(0, count, _QUERIES):
        stop = min(start + _QUERIES, count)
        queries = bank[start:stop].to(device)
        cosines, found = nearest_rows(queries, bank, k + 1, temperature=1.0)
        # The row itself is left out; where many are equal to it, it may not be among them.
        other = found.cpu() != torch.arange(start, stop)[:, None]
        other[other.all(1), -1] = False
        neighbors[start:stop] = found.cpu()[other].view(-1, k).numpy()
        similarities[start:stop] = cosines.float().cpu()[other].view(-1, k).numpy()


def near_duplicates(
    neighbors: np.ndarray, similarities: np.ndarray, least: float
) -> np.ndarray:  # (M,) int64
    """Groups of rows joined by neighbours with a cosine of at least `least`; -1 for the others.

    Groups are numbered in the order of their first rows. A group is a chain: two of its rows need
    not be near each other.
    """
    parents = np.arange(len(neighbors))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    joined = np.zeros(len(neighbors), dtype=bool)
    for start in range(0, len(neighbors), _QUERIES):
        near = similarities[start : start + _QUERIES] >= least
        for row, place in np.argwhere(near):
            one, two = start + row, neighbors[start + row, place]
            joined[[one, two]] = True
            low, high = sorted((root(one), root(two)))
            parents[high] = low
    numbers: dict[int, int] = {}
    groups = np.full(len(neighbors), -1, dtype=np.int64)
    for row in np.nonzero(joined)[0]:
        groups[row] = numbers.setdefault(root(row), len(numbers))
    return groups
