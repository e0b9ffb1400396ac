"""Quality of features without labels: effective rank, alignment and uniformity.

RankMe (Garrido, Balestriero, Najman and LeCun, arXiv 2210.02885): with the singular values s_k of
the features (N, F), not centred and not normalised,

    p_k = s_k / sum_j s_j + 1e-7        RankMe = exp(-sum_k p_k log p_k), from 1 to min(N, F)

Alignment and uniformity (Wang and Isola, arXiv 2005.10242), of unit rows x_i and y_i that are two
views of image i:

    alignment  = mean_i |x_i - y_i|^2                          0 where views coincide
    uniformity = log mean_{i < j} exp(-2 |x_i - x_j|^2)        0 where all rows do; lower is better
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcl.evaluation.checks import check_vectors
from softcl.ops.call import check_rows

RANKME_LIMIT = 25_600  # rows: as many as the paper takes
_EPSILON = 1e-7
_PIECE = 2048  # rows at a time: of double precision, and of distances


@torch.no_grad()
def rankme(rows: Tensor) -> float:
    """Effective rank of features (N, F): the exponential of their singular values' entropy.

    The singular values are the roots of the eigenvalues of the smaller Gram matrix, in double
    precision: off by 1e-8 of the largest, below the formula's own 1e-7, and many times as fast
    as a decomposition of the rows.

    Raises:
        TypeError, ValueError: rows are no float matrix, or not finite.
    """
    check_rows("rows", rows)
    if not rows.isfinite().all():
        raise ValueError("rows must be finite")
    if rows.shape[0] < rows.shape[1]:
        rows = rows.T
    gram = torch.zeros(2 * rows.shape[1:], dtype=torch.float64, device=rows.device)
    for piece in rows.split(_PIECE):
        piece = piece.double()
        gram += piece.T @ piece
    values = torch.linalg.eigvalsh(gram).clamp_(min=0.0).sqrt_()
    total = values.sum()
    if total == 0:  # all features are 0: nothing is told apart, as with one direction
        return 1.0
    shares = values / total + _EPSILON
    return float((-shares * shares.log()).sum().exp())


@torch.no_grad()
def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of unit rows (N, F) to those of the same images' other views.

    Raises:
        TypeError, ValueError: an argument is unusable, or their shapes differ.
    """
    check_vectors("first", first, "second", second)
    if first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"first and second must have one shape, got {shapes}")
    return float((first.double() - second.double()).square().sum(1).mean())


@torch.no_grad()
def uniformity(rows: Tensor) -> float:
    """Logarithm of the mean of exp(-2 distance^2) over all pairs of unit rows (N, F), N > 1.

    Raises:
        TypeError, ValueError: rows are no float matrix, or fewer than two.
    """
    check_rows("rows", rows)
    count = len(rows)
    if count < 2:
        raise ValueError(f"rows must be at least 2, got {count}")
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for piece in rows.split(_PIECE):
        # |x - y|^2 = 2 - 2 cos of unit rows.
        total += (4 * (piece @ rows.T) - 4).exp().sum(dtype=torch.float64)
    total -= count  # each row with itself
    return float((total / (count * (count - 1))).log())
