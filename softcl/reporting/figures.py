"""Figures of runs over time: one quantity per panel, one colour per run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from softcl.reporting.runs import RunData
from softcl.reporting.theme import color, draw_svg, run_color

BASELINES = {
    "untrained": "untrained backbone",
    "pixels": "raw pixels",
    "pretrained": "first weights",
}
MOST_POINTS = 600  # of a line: what a screen shows, and each takes bytes of the page


@dataclass(frozen=True)
class Figure:
    """Panels of HTML that belong together, and what they show.

    Attributes:
        legend: names and the colours of the page that stand for them.
    """

    name: str
    title: str
    caption: str
    panels: list[str]
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Panel:
    """A quantity over the epochs.

    Attributes:
        column: of metrics.jsonl.
        share: whether it is one, to be shown as per cent.
        from_zero: whether its axis starts there.
    """

    column: str
    label: str
    share: bool = False
    from_zero: bool = True


@dataclass(frozen=True)
class Kind:
    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    draw: Callable[[Any, list[RunData], Panel], bool] | None = None  # in place of `draw_panel`


def draw_lines(
    axis: Any, runs: list[RunData], panel: Panel, x: str = "epoch", scale: float = 1.0
) -> bool:
    """A line per run; whether any has values. `scale` is that of x."""
    factor = 100.0 if panel.share else 1.0
    drawn = False
    for number, run in enumerate(runs):
        points = run.series(panel.column, x)
        if not points:
            continue
        drawn = True
        places, values = thinned(points)
        axis.plot(
            places * scale,
            values * factor,
            color=color(run_color(number)),
            linewidth=1.5,
            marker="o" if len(points) <= 12 else None,
            markersize=3.5,
        )
    return drawn


def thinned(points: list[tuple[float, float]]) -> np.ndarray:
    """(2, n), n at most MOST_POINTS: means of points that follow each other."""
    columns = np.asarray(points, dtype=float)
    if len(columns) > MOST_POINTS:
        columns = np.stack([part.mean(axis=0) for part in np.array_split(columns, MOST_POINTS)])
    return columns.T


def draw_panel(axis: Any, runs: list[RunData], panel: Panel) -> bool:
    if not draw_lines(axis, runs, panel):
        return False
    _finish(axis, panel, "epoch")
    return True


def _finish(axis: Any, panel: Panel, x: str) -> None:
    axis.grid(axis="y")
    axis.set_xlabel(x)
    axis.set_ylabel(panel.label)
    if panel.from_zero:
        axis.set_ylim(0, 1.08 * max(axis.get_ylim()[1], 1e-9))
    if panel.share and axis.get_ylim()[1] > 100:
        axis.set_yticks(range(0, 101, 20))


def draw_knn(axis: Any, runs: list[RunData], panel: Panel) -> bool:
    """Accuracy against minutes; what is reached without training as dashed lines."""
    if not draw_lines(axis, runs, panel, x="seconds", scale=1 / 60):
        return False
    axis.margins(x=0.08)
    for number, run in enumerate(runs):
        best = run.best()
        if best is not None and best.get("knn_top1") is not None and best.get("seconds"):
            axis.annotate(
                f"{best['knn_top1']:.1%}",
                (best["seconds"] / 60, 100 * best["knn_top1"]),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                color=color(run_color(number)),
            )
    _draw_baselines(axis, runs)
    _finish(axis, panel, "minutes")
    return True


def _draw_baselines(axis: Any, runs: list[RunData]) -> None:
    """Grey where all runs share one, else in the colour of its run."""
    lines = []
    for key, label in BASELINES.items():
        values = [run.baselines.get(key) for run in runs]
        if values[0] is not None and len(set(values)) == 1:
            lines.append((values[0], label, "muted"))
            continue
        for number, value in enumerate(values):
            if value is not None:
                lines.append((value, label, run_color(number)))
    for place, (value, label, name) in enumerate(sorted(lines)):
        axis.axhline(100 * value, color=color(name), linewidth=1, linestyle="--")
        lowest = place == 0 and len(lines) > 1
        axis.annotate(
            label,
            (1, 100 * value),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(-2, -3 if lowest else 3),
            ha="right",
            va="top" if lowest else "bottom",
            fontsize=8.5,
            color=color(name),
        )


KINDS = (
    Kind(
        "loss",
        "Loss",
        "Per step at first, then per line of the log; of long runs means.",
        (Panel("loss", "loss", from_zero=False),),
    ),
    Kind(
        "knn",
        "k-NN accuracy against wall time",
        "Weighted vote of the nearest training images on test images; the time is the run's own, "
        "evaluations included. Dashed: without training.",
        (Panel("knn_top1", "k-NN top-1, %", share=True),),
        draw_knn,
    ),
    Kind(
        "quality",
        "Quality without labels",
        "RankMe is the effective number of dimensions of the features. Alignment is the squared "
        "distance of two views of an image, uniformity tells how evenly the features cover the "
        "sphere: the lower, the better.",
        (
            Panel("rankme", "RankMe"),
            Panel("alignment", "alignment"),
            Panel("uniformity", "uniformity", from_zero=False),
        ),
    ),
    Kind("lr", "Learning rate", "", (Panel("lr", "learning rate"),)),
    Kind(
        "teacher",
        "Confidence and entropy of the teacher",
        "Of its softmax over the queue: confidence is 1 - entropy / log K. Methods without such "
        "a softmax have neither.",
        (
            Panel("confidence", "teacher's confidence", from_zero=False),
            Panel("entropy", "teacher's entropy, nats", from_zero=False),
        ),
    ),
    Kind(
        "purity",
        "Neighbours",
        "First the share of the ten nearest training images that are of a test image's class, then "
        "that of training images whose own second view is nearer than every row of the queue.",
        (
            Panel("knn_purity", "10 nearest of the class, %", share=True),
            Panel("positive_top1", "positive nearer than the queue, %", share=True),
        ),
    ),
    Kind(
        "spread",
        "Spread of the directions",
        "Standard deviation of unit vectors, times the square root of their dimension: near 1 if "
        "they fill the sphere, 0 if they have collapsed to a point.",
        (
            Panel("query_spread", "spread of projections"),
            Panel("feature_spread", "spread of features"),
        ),
    ),
    Kind(
        "speed",
        "Throughput and data wait",
        "Training alone: evaluations and checkpoints are left out.",
        (
            Panel("images_per_s", "images per second"),
            Panel("data_wait", "waiting for data, % of the time", share=True),
        ),
    ),
)


def draw_all(runs: list[RunData]) -> list[Figure]:
    """Every figure for which some run has numbers."""
    legend = tuple((run.name, run_color(number)) for number, run in enumerate(runs))
    figures = []
    for kind in KINDS:
        draw = kind.draw or draw_panel
        panels = [
            draw_svg(f"{panel.label} of the runs", partial(draw, runs=runs, panel=panel))
            for panel in kind.panels
        ]
        panels = [panel for panel in panels if panel is not None]
        if panels:
            shown = legend if len(runs) > 1 else ()
            figures.append(Figure(kind.name, kind.title, kind.caption, panels, shown))
    return figures
