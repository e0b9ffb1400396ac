"""What the nearest neighbours say: the images themselves, and which classes are confused."""

from __future__ import annotations

import html
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcl.evaluation.knn import knn_predict, nearest_rows
from softcl.reporting.figures import Figure
from softcl.reporting.samples import Part, Sample
from softcl.reporting.theme import color, draw_svg
from softcl.reporting.tiles import table_of, tile

ROWS, COLUMNS = 10, 8  # images that are looked at, neighbours of each
MOST_NUMBERED = 12  # classes whose numbers fit into the cells of a confusion matrix
MOST_NAMED = 30  # and whose names fit beside it
_PAIRS = 10  # most frequent confusions
# Of the cells; the page shows through, so that text on them is readable in both schemes.
_RIGHT, _WRONG, _OPAQUE = (0.17, 0.53, 0.83), (0.88, 0.45, 0.10), 0.62


def draw_neighbors(sample: Sample) -> Figure:
    """Some images and their nearest neighbours; borders say whether the class is the same."""
    queries, bank = sample.queries, sample.bank
    places = chosen_places(queries)
    columns = min(COLUMNS, len(bank.rows))
    logits, found = nearest_rows(queries.rows[places], bank.rows, columns, temperature=1.0)
    rows, right = [], 0
    for place, cosines, line in zip(places.tolist(), logits.tolist(), found.tolist(), strict=True):
        row = [_cell(sample, queries, place)]
        for cosine, neighbor in zip(cosines, line, strict=True):
            mark = ""
            if sample.labelled:
                same = bool(bank.labels[neighbor] == queries.labels[place])
                mark, right = "right" if same else "wrong", right + same
            row.append(_cell(sample, bank, neighbor, mark, cosine))
        rows.append(row)
    heads = ["image", "nearest", *[""] * (columns - 1)]
    caption = f"First {sample.words[0]}, then the nearest of {len(bank.rows):,} {sample.words[1]}"
    caption += ", nearest first; point at one for its class and cosine."
    legend: tuple[tuple[str, str], ...] = ()
    if sample.labelled:
        caption += f" {right} of {columns * len(rows)} neighbours are of the image's class."
        legend = (("the image's class", "right"), ("another class (dashed)", "wrong"))
    panels = [table_of(rows, heads)]
    return Figure("neighbors", "Nearest neighbours", caption, panels, legend)


def chosen_places(part: Part) -> Tensor:
    """The first of each class, or evenly spaced without labels."""
    count = len(part.rows)
    if part.labels is None:
        rows = min(ROWS, count)
        return torch.arange(rows, device=part.rows.device) * count // rows
    first = [int((part.labels == label).nonzero()[0]) for label in part.labels.unique().tolist()]
    return torch.tensor(first[:ROWS], device=part.rows.device)


def _cell(
    sample: Sample, part: Part, place: int, mark: str = "", cosine: float | None = None
) -> str:
    words = [] if part.names is None else [part.names[place]]
    if part.labels is not None:
        words.append(sample.classes[int(part.labels[place])])
    name = words[-1] if words else ""
    if cosine is not None:
        words.append(f"{cosine:.2f}")
    if part.show is not None:
        below = f"<small>{html.escape(name)}</small>" if cosine is None else ""
        return tile(part.show(place), ", ".join(words), mark) + below
    shown = f' class="{mark}"' if mark else ""
    return f"<small{shown}>{html.escape(', '.join(words))}</small>"


# ------------------------------------------------------------------------------ confusion matrix


def confusion(sample: Sample) -> np.ndarray:
    """Counts (C, C): of the true class i, how many were taken for class j by the vote."""
    count, labels = len(sample.classes), sample.queries.labels
    predicted = knn_predict(
        sample.queries.rows,
        sample.bank.rows,
        sample.bank.labels,
        count,
        num_neighbors=sample.num_neighbors,
    )
    pairs = labels.to(torch.int64) * count + predicted.to(labels.device)
    return torch.bincount(pairs.cpu(), minlength=count * count).view(count, count).numpy()


def draw_confusion(sample: Sample) -> Figure:
    counts = confusion(sample)
    top1 = np.trace(counts) / counts.sum()
    side = 4.7 if len(counts) <= MOST_NAMED else 5.6
    description = f"Confusion matrix of k-NN of {sample.name}"
    draw = partial(draw_matrix, counts=counts, classes=sample.classes)
    caption = (
        f"Rows: the true class; columns: what {sample.num_neighbors} of {len(sample.bank.rows):,} "
        f"{sample.words[1]} vote for, as per cent of the row. Right: {top1:.1%} of "
        f"{counts.sum():,} {sample.words[0]}."
    )
    panels = [draw_svg(description, draw, (side, side)), *frequent(counts, sample.classes)]
    legend = (("right", "right"), ("taken for another", "wrong"))
    return Figure("confusion", "Confusion of classes by k-NN", caption, panels, legend)


def shares_of(counts: np.ndarray) -> np.ndarray:
    """Each row divided by its sum; an empty one stays 0."""
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def draw_matrix(axis: Any, counts: np.ndarray, classes: list[str]) -> None:
    shares, number = shares_of(counts), len(counts)
    pixels = np.empty((number, number, 4))
    pixels[..., :3], pixels[..., 3] = _WRONG, _OPAQUE * shares
    pixels[range(number), range(number), :3] = _RIGHT
    axis.imshow(pixels, interpolation="nearest")
    axis.spines[:].set_visible(True)
    axis.spines[:].set_color(color("line"))
    axis.set_xlabel("voted")
    axis.set_ylabel("true")
    if number > MOST_NAMED:
        return
    names = [name if len(name) <= 14 else f"{name[:13]}…" for name in classes]
    axis.set_xticks(range(number), names, rotation=90)
    axis.set_yticks(range(number), names)
    axis.tick_params(length=0, labelsize=9 if number <= MOST_NUMBERED else 7)
    if number > MOST_NUMBERED:
        return
    for row, column in np.argwhere(counts > 0):
        text = f"{100 * shares[row, column]:.0f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=8.5)


def frequent(counts: np.ndarray, classes: list[str]) -> list[str]:
    """A table of the most frequent confusions, if there are any."""
    wrong, shares = counts.copy(), shares_of(counts)
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    rows = []
    for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[row, column]:
            names = html.escape(f"{classes[row]} → {classes[column]}")
            numbers = f"{wrong[row, column]:,}</td><td>{shares[row, column]:.0%}"
            rows.append(f"<tr><td>{names}</td><td>{numbers}</td></tr>")
    if not rows:
        return []
    head = "<tr><th>most often: true → voted</th><th>images</th><th>of the class</th></tr>"
    return [f"<table>{head}{''.join(rows)}</table>"]
