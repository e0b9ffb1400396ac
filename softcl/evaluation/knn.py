"""Weighted k-NN classification in a feature space, and the two baselines that give it meaning.

The vote of the nearest neighbours (Wu et al., arXiv 1805.01978, as ASCL's code does it): a labelled
bank of unit rows, cosines with a query, the k largest, each voting for its class with weight
exp(cosine / temperature). `softcl.queue_statistics` finds the k largest, so no matrix of queries
by bank is made; a bank that is not on the queries' device comes there in pieces. Or each of the k
nearest by Euclidean distance has one vote, as W-MSE counts them (arXiv 2007.06346).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softcl.data import ImageSet
from softcl.evaluation.checks import check_labels, check_positive, check_vectors, check_whole
from softcl.evaluation.features import FeatureFunction, eval_mode, extract, thinned
from softcl.ops import queue_statistics

TEMPERATURE = 0.1
NUM_NEIGHBORS = 200
BANK_LIMIT = 100_000  # larger sets are thinned evenly: the bank's features stay in memory
QUERY_LIMIT = 10_000
PIXEL_BANK_LIMIT, PIXEL_QUERY_LIMIT = 10_000, 2_000  # of many more dimensions than features
PURITY_NEIGHBORS = 10
_PIECE = 1024  # queries per call
BANK_PIECE = 1 << 18  # rows of the bank per call
DISTANCES = ("cosine", "euclidean")
_DISTANCE_PIECE = 1 << 14  # rows of the bank whose distances are held at a time
_PIXELS = 32  # side to which images are reduced before their pixels are compared


@torch.no_grad()
def nearest_rows(
    queries: Tensor,  # (N, F) unit rows
    bank: Tensor,  # (M, F) unit rows, on any device
    num_neighbors: int,
    *,
    temperature: float = TEMPERATURE,
    bank_piece: int = BANK_PIECE,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The nearest rows of the bank: logits (N, k) = cosine / temperature, descending; rows (N, k).

    The k of each piece of the bank are merged into the k of all; equal logits go by lowest row.

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value.
    """
    check_vectors("queries", queries, "bank", bank)
    num_neighbors = check_whole("num_neighbors", num_neighbors, len(bank), "the bank's {} rows")
    bank_piece = check_whole("bank_piece", bank_piece)
    temperature = check_positive("temperature", temperature)

    def search(rows: Tensor, piece: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = queue_statistics(
            rows, piece, temperature, num_neighbors=k, sums=False, backend=backend
        )
        return found.neighbor_logits, found.neighbor_indices

    return _search_in_pieces(queries, bank, num_neighbors, bank_piece, search)


@torch.no_grad()
def euclidean_neighbors(
    queries: Tensor,  # (N, F)
    bank: Tensor,  # (M, F), on any device
    num_neighbors: int,
) -> tuple[Tensor, Tensor]:
    """The nearest rows of the bank by |q - b|: distances (N, k), ascending; rows (N, k).

    Equal distances go by lowest row. Rows need no norm; distances are of float64.

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value.
    """
    check_vectors("queries", queries, "bank", bank, wait=True)
    num_neighbors = check_whole("num_neighbors", num_neighbors, len(bank), "the bank's {} rows")

    def search(rows: Tensor, piece: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # |b|^2 - 2 q.b orders as |q - b| does; negative, so that the largest are the nearest.
        rows, piece = rows.double(), piece.double()
        closeness = 2 * rows @ piece.T - piece.square().sum(1)
        return _largest(closeness, k)

    closeness, rows = _search_in_pieces(queries, bank, num_neighbors, _DISTANCE_PIECE, search)
    squares = queries.double().square().sum(1, keepdim=True) - closeness
    return squares.clamp(min=0.0).sqrt(), rows


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, and their columns; equal ones by lowest column."""
    # topk spares a sort of whole rows, but may take any of those that equal the last.
    last = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > last, values == last
    wanted = k - above.sum(1, keepdim=True)
    taken = above | (equal & (equal.cumsum(1) <= wanted))
    columns = taken.nonzero()[:, 1].view(len(values), k)
    values, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _search_in_pieces(
    queries: Tensor,
    bank: Tensor,
    num_neighbors: int,
    bank_piece: int,
    search: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The k best of each piece of the bank, merged into the k best of all."""
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in queries.split(_PIECE)]
    for start in range(0, len(bank), bank_piece):
        piece = bank[start : start + bank_piece].to(queries.device)
        k = min(num_neighbors, len(piece))
        for place, rows in enumerate(queries.split(_PIECE)):
            logits, indices = search(rows, piece, k)
            kept[place].append((logits, indices + start))
    results = []
    for parts in kept:
        logits = torch.cat([logits for logits, _ in parts], dim=1)
        indices = torch.cat([indices for _, indices in parts], dim=1)
        if len(parts) > 1:
            # Stable, and the pieces are in the order of their rows.
            logits, order = logits.sort(dim=1, descending=True, stable=True)
            logits, indices = logits[:, :num_neighbors], indices.gather(1, order)[:, :num_neighbors]
        results.append((logits, indices))
    return torch.cat([logits for logits, _ in results]), torch.cat([rows for _, rows in results])


def vote(
    neighbor_logits: Tensor,  # (N, k) cosine / temperature, descending
    neighbor_labels: Tensor,  # (N, k) integers
    num_classes: int,
    *,
    top: int | None = None,
) -> Tensor:
    """The class with the largest sum of exp(neighbor_logits), (N,) int64; ties by lowest class.

    Args:
        top: the so many classes with the largest sums, best first, in its place: (N, top). Classes
            that no neighbour has come last, lowest first.

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value.
    """
    num_classes = check_whole("num_classes", num_classes)
    check_labels("neighbor_labels", neighbor_labels, neighbor_logits.shape, num_classes)
    if top is not None:
        top = check_whole("top", top, num_classes, "num_classes={}")
    return _voted(neighbor_logits, neighbor_labels, num_classes, top)


def _voted(logits: Tensor, labels: Tensor, num_classes: int, top: int | None) -> Tensor:
    # Dividing all weights of a row by the largest changes no vote and cannot overflow.
    weights = (logits - logits[:, :1]).exp()
    labels = labels.to(torch.int64)
    votes = weights.new_zeros(weights.shape[0], num_classes).scatter_add_(1, labels, weights)
    if top is None:
        return votes.argmax(1)
    # A far neighbour's weight may be rounded to 0, and is a vote all the same.
    has_votes = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, labels, True)
    ranked = votes.masked_fill(~has_votes, -1.0).sort(dim=1, descending=True, stable=True)
    return ranked.indices[:, :top]


def knn_predict(
    features: Tensor,  # (N, F) unit rows
    bank: Tensor,  # (M, F) unit rows
    bank_labels: Tensor,  # (M,) integers in [0, num_classes)
    num_classes: int,
    *,
    num_neighbors: int | None = None,
    temperature: float = TEMPERATURE,
    top: int | None = None,
    distance: str = "cosine",
    bank_piece: int = BANK_PIECE,
    backend: str = "auto",
) -> Tensor:
    """Predicted classes by the vote of the nearest rows of the bank.

        predicted = knn_predict(features, bank, bank_labels, 10)                  # (N,)
        ranked = knn_predict(features, bank, bank_labels, 1000, top=5)            # (N, 5)
        top5 = (ranked == labels[:, None]).any(1).float().mean()

    Args:
        features, bank: unit rows; the bank may be on another device.
        num_neighbors: k, the rows that vote; None for 200, or all of a smaller bank.
        temperature: a neighbour's vote is exp(cosine / temperature).
        top: how many classes to return for each row; None for the best alone.
        distance: "cosine", or "euclidean" of rows of any norm, each of which has one vote (no
            temperature, no operator).
        bank_piece: rows of the bank per call of the operator.
        backend: of the operator.

    Returns:
        (N,) int64; with ``top``, (N, top): best first, ties by lowest class, and classes without a
        vote after those with, lowest first.

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value.
    """
    check_vectors("features", features, "bank", bank)
    num_classes = check_whole("num_classes", num_classes)
    check_labels("bank_labels", bank_labels, bank.shape[:1], num_classes)
    if top is not None:
        top = check_whole("top", top, num_classes, "num_classes={}")
    if num_neighbors is None:
        num_neighbors = min(NUM_NEIGHBORS, len(bank))
    if distance == "euclidean":
        distances, rows = euclidean_neighbors(features, bank, num_neighbors)
        logits = torch.zeros_like(distances)
    elif distance == "cosine":
        logits, rows = nearest_rows(
            features,
            bank,
            num_neighbors,
            temperature=temperature,
            bank_piece=bank_piece,
            backend=backend,
        )
    else:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    return _voted(logits, bank_labels.to(rows.device)[rows], num_classes, top)


@dataclass
class KNN:
    """k-NN evaluation of one run: a labelled bank and queries, thinned to the limits above.

    Args:
        bank: training images.
        queries: test images with the same classes. The bank itself (``queries is bank``) when there
            is no test set: each tenth image is then compared with the other nine tenths.
        size: of the images the backbone takes.
        num_neighbors: k.
    """

    bank: ImageSet
    queries: ImageSet
    size: int
    device: torch.device
    num_neighbors: int = NUM_NEIGHBORS

    def __post_init__(self) -> None:
        self.bank_indices = thinned(len(self.bank), BANK_LIMIT)
        self.query_indices = thinned(len(self.queries), QUERY_LIMIT)
        if self.queries is self.bank:
            held_out = torch.arange(len(self.bank_indices)) % 10 == 0
            self.query_indices = self.bank_indices[held_out][:QUERY_LIMIT]
            self.bank_indices = self.bank_indices[~held_out]
        self.num_neighbors = min(self.num_neighbors, len(self.bank_indices))

    @property
    def labelled(self) -> bool:
        return self.bank.labels is not None and self.queries.labels is not None

    def features(
        self, function: FeatureFunction, size: int | None = None, *, normalize: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Rows of the queries and of the bank, unit ones unless said otherwise."""
        given = {"size": size or self.size, "device": self.device, "normalize": normalize}
        queries = extract(self.queries, self.query_indices, function, **given)
        return queries, extract(self.bank, self.bank_indices, function, **given)

    def accuracy(self, queries: Tensor, bank: Tensor) -> float:
        """Share of the queries whose class the vote finds, in [0, 1]."""
        labels = self.queries.labels[self.query_indices].to(self.device)
        bank_labels = self.bank.labels[self.bank_indices].to(self.device)
        predictions = knn_predict(
            queries, bank, bank_labels, len(self.bank.classes), num_neighbors=self.num_neighbors
        )
        return float((predictions == labels).float().mean())

    def purity(self, queries: Tensor, bank: Tensor) -> float:
        """Share of the PURITY_NEIGHBORS nearest rows of the bank that are of a query's class."""
        labels = self.queries.labels[self.query_indices].to(self.device)
        bank_labels = self.bank.labels[self.bank_indices].to(self.device)
        _, rows = nearest_rows(queries, bank, min(PURITY_NEIGHBORS, len(bank)))
        return float((bank_labels[rows] == labels[:, None]).float().mean())

    def encoder_features(self, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        """Unit rows of an encoder's backbone in eval mode, for the queries and for the bank."""
        with eval_mode(encoder):
            return self.features(encoder.features)

    def pixel_accuracy(self) -> float:
        """The accuracy where the features are the normalised pixels.

        Of images reduced to 32 pixels a side; of at most PIXEL_QUERY_LIMIT queries, against at most
        PIXEL_BANK_LIMIT images of the bank.
        """
        few = copy.copy(self)
        few.bank_indices = _thinned(self.bank_indices, PIXEL_BANK_LIMIT)
        few.query_indices = _thinned(self.query_indices, PIXEL_QUERY_LIMIT)
        few.num_neighbors = min(self.num_neighbors, len(few.bank_indices))
        return few.accuracy(
            *few.features(lambda images: images.flatten(1), min(self.size, _PIXELS))
        )


def _thinned(indices: Tensor, limit: int) -> Tensor:
    return indices[thinned(len(indices), limit)]
