"""Weighted k-NN classification in a feature space, and the two baselines that give it meaning.

The vote of the nearest neighbours (Wu et al., arXiv 1805.01978, as ASCL's code does it): a labelled
bank of unit rows, cosines with a query, the k largest, each voting for its class with weight
exp(cosine / temperature). `softcl.queue_statistics` finds the k largest, so no matrix of queries
by bank is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcl.data import ImageSet, center_view
from softcl.ops import queue_statistics

TEMPERATURE = 0.1
NUM_NEIGHBORS = 200
BANK_LIMIT = 100_000  # larger sets are thinned evenly: the bank's features stay in memory
QUERY_LIMIT = 10_000
PIXEL_QUERY_LIMIT = 2_000  # pixels have many more dimensions than features
_PIECE = 1024  # queries per call
_PIXELS = 32  # side to which images are reduced before their pixels are compared

FeatureFunction = Callable[[Tensor], Tensor]  # float images (N, 3, S, S) -> (N, F)


def thinned(count: int, limit: int) -> Tensor:
    """Indices of at most `limit` of `count` images, evenly spaced (files are sorted by class)."""
    if count <= limit:
        return torch.arange(count)
    return torch.arange(limit) * count // limit


@torch.no_grad()
def extract(
    images: ImageSet, indices: Tensor, features: FeatureFunction, size: int, device: torch.device
) -> Tensor:
    """Unit rows of `features` for the images of `indices`, seen whole at `size` pixels.

    Returns:
        (len(indices), F) float32 on the device.
    """
    pieces = []
    for part in indices.split(_PIECE // 2):
        batch = images.batch(part).to(device)
        views = center_view(batch, size, images.mean, images.std)
        # Convolutions of a network in eval mode are 1.6 times as fast in this order on a CPU.
        views = views.contiguous(memory_format=torch.channels_last)
        pieces.append(F.normalize(features(views).float(), dim=1))
    return torch.cat(pieces)


class eval_mode:
    """Context in which a module is in eval mode; every submodule's mode is restored after it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> nn.Module:
        self.modes = [(module, module.training) for module in self.module.modules()]
        return self.module.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self.modes:
            module.training = training


def vote(
    neighbor_logits: Tensor,  # (N, k) cosine / temperature, descending
    neighbor_labels: Tensor,  # (N, k) int64
    num_classes: int,
) -> Tensor:
    """The class with the largest sum of exp(neighbor_logits), (N,) int64; ties by lowest class."""
    # Dividing all weights of a row by the largest changes no vote and cannot overflow.
    weights = (neighbor_logits - neighbor_logits[:, :1]).exp()
    votes = weights.new_zeros(weights.shape[0], num_classes)
    return votes.scatter_add_(1, neighbor_labels, weights).argmax(1)


def knn_predict(
    features: Tensor,  # (N, F) unit rows
    bank: Tensor,  # (M, F) unit rows
    bank_labels: Tensor,  # (M,) int64
    num_classes: int,
    *,
    num_neighbors: int = NUM_NEIGHBORS,
    temperature: float = TEMPERATURE,
    backend: str = "auto",
) -> Tensor:
    """Predicted classes (N,) by the weighted vote of the nearest rows of the bank."""
    predictions = []
    for rows in features.split(_PIECE):
        found = queue_statistics(
            rows, bank, temperature, num_neighbors=num_neighbors, sums=False, backend=backend
        )
        labels = bank_labels[found.neighbor_indices]
        predictions.append(vote(found.neighbor_logits, labels, num_classes))
    return torch.cat(predictions)


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

    def features(self, function: FeatureFunction, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Unit rows of the queries and of the bank."""
        size = size or self.size
        queries = extract(self.queries, self.query_indices, function, size, self.device)
        return queries, extract(self.bank, self.bank_indices, function, size, self.device)

    def accuracy(self, queries: Tensor, bank: Tensor, places: Tensor | None = None) -> float:
        """Share of the queries (of those at `places`) whose class the vote finds, in [0, 1]."""
        indices = self.query_indices
        if places is not None:
            queries, indices = queries[places], indices[places]
        labels = self.queries.labels[indices].to(self.device)
        bank_labels = self.bank.labels[self.bank_indices].to(self.device)
        predictions = knn_predict(
            queries, bank, bank_labels, len(self.bank.classes), num_neighbors=self.num_neighbors
        )
        return float((predictions == labels).float().mean())

    def encoder_features(self, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        """Unit rows of an encoder's backbone in eval mode, for the queries and for the bank."""
        with eval_mode(encoder):
            return self.features(encoder.features)

    def pixel_accuracy(self) -> float:
        """The accuracy where the features are the normalised pixels.

        Of images reduced to 32 pixels a side, and of at most PIXEL_QUERY_LIMIT queries.
        """
        rows = self.features(lambda images: images.flatten(1), min(self.size, _PIXELS))
        return self.accuracy(*rows, thinned(len(self.query_indices), PIXEL_QUERY_LIMIT))
