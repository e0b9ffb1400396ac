"""Maps of the features: images in two dimensions, coloured by class."""

from __future__ import annotations

import colorsys
import importlib.util
from functools import partial
from typing import Any

import numpy as np

from softcl.errors import ConfigError
from softcl.reporting.figures import Figure
from softcl.reporting.samples import Sample
from softcl.reporting.theme import color, draw_svg

WAYS = {"tsne": "t-SNE", "pca": "principal components", "umap": "UMAP", "none": "no map"}
USUAL = ("tsne", "pca")
MOST_NAMED = 20  # classes with names in the legend
_PERPLEXITY, _UMAP_NEIGHBORS = 30, 15


def check_ways(ways: list[str]) -> None:
    """Refuse a map whose library is not there.

    Raises:
        ConfigError: naming the extra.
    """
    if "umap" in ways and importlib.util.find_spec("umap") is None:
        raise ConfigError("map", "umap", 'needs umap-learn: pip install "softcl[umap]"')


def map_features(sample: Sample, ways: list[str]) -> Figure:
    """A panel for each way of projecting the features that are looked at."""
    part = sample.queries if sample.mapped is None else sample.mapped
    rows = part.rows.float().cpu().numpy()
    labels = None if part.labels is None else part.labels.cpu().numpy()
    tones, panels = class_tones(len(sample.classes)), []
    for way in ways:
        title, places = WAYS[way], project(rows, way)
        draw = partial(draw_points, title=title, places=places, labels=labels, tones=tones)
        panels.append(draw_svg(f"{title} of the features of {sample.name}", draw, (4.7, 4.2)))
    shown = ", ".join(WAYS[way] for way in ways)
    caption = (
        f"{len(rows):,} {sample.words[0] if sample.mapped is None else 'images'} by {shown}"
        f"{', coloured by class' if sample.classes else ''}. "
        "Distances between far groups mean little but in principal components."
    )
    named = 0 < len(sample.classes) <= MOST_NAMED
    legend = tuple(zip(sample.classes, tones, strict=True)) if named else ()
    return Figure("map", "Map of the features", caption, panels, legend)


def project(rows: np.ndarray, way: str) -> np.ndarray:
    """(N, F) -> (N, 2); t-SNE starts from the principal components."""
    from sklearn.decomposition import PCA

    if not np.ptp(rows, axis=0).any():  # t-SNE would divide by a spread of 0, and crash
        return np.zeros((len(rows), 2), np.float32)
    if way == "pca" or len(rows) < 8:
        return PCA(2, random_state=0).fit_transform(rows)
    if way == "umap":
        from umap import UMAP

        neighbors = min(_UMAP_NEIGHBORS, len(rows) - 1)
        return UMAP(n_neighbors=neighbors, random_state=0, n_jobs=1).fit_transform(rows)
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(rows)


def class_tones(count: int) -> list[str]:
    """A colour for each class, of middle lightness: for a light page and a dark one."""
    if count <= 10:
        import matplotlib

        wheel = matplotlib.colormaps["tab10"]
        return [matplotlib.colors.to_hex(wheel(number)) for number in range(count)]
    tones = []
    for number in range(count):
        # Hues a golden angle apart, so that neighbouring classes differ however many there are.
        lightness = 0.42 if number % 2 else 0.58
        red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1.0, lightness, 0.65)
        tones.append(f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}")
    return tones


def draw_points(
    axis: Any, title: str, places: np.ndarray, labels: np.ndarray | None, tones: list[str]
) -> None:
    """Stored as pixels: thousands of points as shapes would be most of the page."""
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(True)
    axis.spines[:].set_color(color("line"))
    axis.set_aspect("equal", adjustable="datalim")
    paint = "#808890" if labels is None else [tones[label] for label in labels.tolist()]
    axis.scatter(*places.T, s=7, c=paint, linewidths=0, alpha=0.85, rasterized=True)
