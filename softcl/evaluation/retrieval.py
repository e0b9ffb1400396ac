"""Retrieval: how many of the images nearest to a query are of its class."""

from __future__ import annotations

from torch import Tensor

from softcl.evaluation.checks import check_labels, check_vectors, check_whole
from softcl.evaluation.knn import BANK_PIECE, nearest_rows

DEPTHS = (1, 5, 10, 50)


def retrieval_precision(
    queries: Tensor,  # (N, F) unit rows
    query_labels: Tensor,  # (N,)
    bank: Tensor,  # (M, F) unit rows
    bank_labels: Tensor,  # (M,)
    *,
    depths: tuple[int, ...] = DEPTHS,
    bank_piece: int = BANK_PIECE,
) -> dict[str, float]:
    """Precision at each depth k: the mean share of the k nearest that are of the query's class.

    Depths beyond the bank are left out.

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value.
    """
    check_vectors("queries", queries, "bank", bank)
    check_labels("query_labels", query_labels, queries.shape[:1])
    check_labels("bank_labels", bank_labels, bank.shape[:1])
    depths = tuple(check_whole("depths", depth) for depth in depths)
    depths = tuple(depth for depth in depths if depth <= len(bank))
    if not depths:
        return {}
    _, rows = nearest_rows(queries, bank, max(depths), bank_piece=bank_piece)
    right = (bank_labels.to(rows.device)[rows] == query_labels.to(rows.device)[:, None]).float()
    return {f"precision_at_{depth}": float(right[:, :depth].mean()) for depth in depths}
