"""A map of the features: test images in two dimensions, coloured by class."""

from __future__ import annotations

import numpy as np
import torch

from softcl.data import ImageSet, load_dataset
from softcl.evaluation.features import extract, sampled
from softcl.reporting.figures import new_axes, to_png
from softcl.reporting.runs import RunData
from softcl.train.checkpoint import features_of, load_backbone
from softcl.train.config import TrainConfig

WAYS = ("tsne", "pca", "none")
MOST_IMAGES = 2000
MOST_CLASSES = 12  # with names in the legend; more share the colours of a wheel
_PERPLEXITY = 30


def map_features(run: RunData, way: str, device: torch.device, limit: int = MOST_IMAGES) -> bytes:
    """The map as a PNG, from the run's best or newest checkpoint and the test images of its data.

    Raises:
        CheckpointError, ConfigError, DataError: one of the two cannot be read.
    """
    stored = load_backbone(run.path)
    images = _test_images(stored.config)
    indices = sampled(len(images), limit)
    size = stored.config.image_size
    rows = extract(images, indices, features_of(stored.backbone, device), size, device)
    places = project(rows.cpu().numpy().astype(np.float32), way)
    labels = None if images.labels is None else images.labels[indices].numpy()
    return draw(places, labels, images.classes)


def _test_images(config: TrainConfig) -> ImageSet:
    given = {"image_size": config.image_size, "workers": config.workers}
    if config.eval_data is not None:
        return load_dataset(config.eval_data, "test", **given)
    return load_dataset(config.data, "test", data_format=config.data_format, **given)


def project(rows: np.ndarray, way: str) -> np.ndarray:
    """(N, F) -> (N, 2) by t-SNE, started from the principal components, or by those alone."""
    from sklearn.decomposition import PCA

    if way == "pca" or len(rows) < 8:
        return PCA(2, random_state=0).fit_transform(rows)
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(rows)


def draw(places: np.ndarray, labels: np.ndarray | None, classes: list[str]) -> bytes:
    import matplotlib

    figure, (axis,) = new_axes(size=(6.4, 5.2))
    axis.grid(False)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_aspect("equal", adjustable="datalim")
    if labels is None:
        axis.scatter(*places.T, s=6, color="#666666", linewidths=0)
        return to_png(figure)
    named = len(classes) <= MOST_CLASSES
    wheel = matplotlib.colormaps["tab20" if named else "hsv"]
    for number, name in enumerate(classes):
        chosen = places[labels == number]
        # tab20 holds pairs of a dark and a light tone: the dark ones first.
        tone = (
            wheel((2 * number) % 20 + (2 * number) // 20) if named else wheel(number / len(classes))
        )
        axis.scatter(*chosen.T, s=8, color=[tone], linewidths=0, alpha=0.8, label=name)
    if named:
        axis.legend(
            frameon=False, fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    return to_png(figure)
