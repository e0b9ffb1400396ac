"""Figures of runs over time: one quantity per axis, one colour per run."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from softcl.reporting.runs import RunData

# Okabe and Ito's palette, told apart with any colour vision; yellow left out, for it is faint.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_SIZE = (6.4, 3.4)  # inches
_DPI = 130


@dataclass(frozen=True)
class Figure:
    """A PNG and what it shows."""

    name: str  # of the file, without .png
    title: str
    caption: str
    png: bytes


def color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def new_axes(panels: int = 1, size: tuple[float, float] = _SIZE) -> tuple[Any, list[Any]]:
    """A matplotlib figure that needs no display, and its axes side by side."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(size[0] * panels, size[1]), dpi=_DPI, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def to_png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def draw_lines(axis: Any, runs: list[RunData], column: str, **options: Any) -> bool:
    """A line per run; whether any has values. Keywords: x, scale (of x), share (as per cent)."""
    x, scale = options.get("x", "epoch"), options.get("scale", 1.0)
    factor = 100.0 if options.get("share") else 1.0
    drawn = False
    for number, run in enumerate(runs):
        points = run.series(column, x)
        if not points:
            continue
        drawn = True
        few = len(points) <= 12
        axis.plot(
            [place * scale for place, _ in points],
            [value * factor for _, value in points],
            color=color(number),
            label=run.name,
            linewidth=1.4,
            marker="o" if few else None,
            markersize=3,
        )
    return drawn


def finish(axis: Any, runs: list[RunData], x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if len(runs) > 1:
        axis.legend(frameon=False, fontsize=8)


def _from_zero(axis: Any) -> None:
    """Start at 0, and leave room above for the legend."""
    axis.set_ylim(0, 1.15 * axis.get_ylim()[1])


def _one(runs: list[RunData], column: str, label: str, **options: Any) -> bytes | None:
    figure, (axis,) = new_axes()
    if not draw_lines(axis, runs, column, **options):
        return None
    if options.get("from_zero"):
        _from_zero(axis)
    finish(axis, runs, options.get("x_label", "epoch"), label)
    return to_png(figure)


def _two(
    runs: list[RunData], columns: tuple[str, str], labels: tuple[str, str], **options: Any
) -> bytes | None:
    figure, axes = new_axes(2, (4.6, 3.4))
    drawn = False
    for axis, column, label in zip(axes, columns, labels, strict=True):
        share = column in options.get("shares", ())
        drawn |= draw_lines(axis, runs, column, share=share)
        if options.get("from_zero"):
            _from_zero(axis)
        if share and axis.get_ylim()[1] > 100:
            axis.set_yticks(range(0, 101, 20))
        finish(axis, runs, "epoch", label)
    return to_png(figure) if drawn else None


def draw_loss(runs: list[RunData]) -> bytes | None:
    return _one(runs, "loss", "loss")


def draw_rate(runs: list[RunData]) -> bytes | None:
    return _one(runs, "lr", "learning rate", from_zero=True)


def draw_knn(runs: list[RunData]) -> bytes | None:
    """Accuracy against minutes; what an untrained backbone and raw pixels reach, as lines."""
    figure, (axis,) = new_axes()
    if not draw_lines(axis, runs, "knn_top1", x="seconds", scale=1 / 60, share=True):
        return None
    axis.margins(x=0.08)
    for number, run in enumerate(runs):
        best = run.best()
        if best is not None:
            axis.annotate(
                f"{best['knn_top1']:.1%}",
                (best["seconds"] / 60, 100 * best["knn_top1"]),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                fontsize=8,
                color=color(number),
            )
    baselines = runs[0].baselines
    for key, label in (("untrained", "untrained backbone"), ("pixels", "raw pixels")):
        if baselines.get(key) is not None and all(
            run.baselines.get(key) == baselines[key] for run in runs
        ):
            axis.axhline(100 * baselines[key], color="#888888", linewidth=0.9, linestyle="--")
            axis.annotate(
                label,
                (1, 100 * baselines[key]),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(-2, 3 if key == "untrained" else -10),
                ha="right",
                fontsize=8,
                color="#666666",
            )
    finish(axis, runs, "minutes", "k-NN top-1, %")
    return to_png(figure)


def draw_teacher(runs: list[RunData]) -> bytes | None:
    columns = ("confidence", "entropy")
    return _two(runs, columns, ("teacher's confidence", "teacher's entropy, nats"))


def draw_neighbors(runs: list[RunData]) -> bytes | None:
    columns = ("knn_purity", "positive_top1")
    labels = ("10 nearest of the class, %", "positive nearer than the queue, %")
    return _two(runs, columns, labels, shares=columns, from_zero=True)


def draw_spread(runs: list[RunData]) -> bytes | None:
    columns = ("query_spread", "feature_spread")
    labels = ("spread of projections", "spread of features")
    return _two(runs, columns, labels, from_zero=True)


def draw_speed(runs: list[RunData]) -> bytes | None:
    columns = ("images_per_s", "data_wait")
    labels = ("images per second", "waiting for data, % of the time")
    return _two(runs, columns, labels, shares=("data_wait",), from_zero=True)


@dataclass(frozen=True)
class Kind:
    name: str
    title: str
    caption: str
    draw: Callable[[list[RunData]], bytes | None]


KINDS = (
    Kind("loss", "Loss", "Per step at first, then per line of the log.", draw_loss),
    Kind(
        "knn",
        "k-NN accuracy against wall time",
        "Weighted vote of the nearest training images on test images; the time is the run's own, "
        "evaluations included.",
        draw_knn,
    ),
    Kind("lr", "Learning rate", "", draw_rate),
    Kind(
        "teacher",
        "Confidence and entropy of the teacher",
        "Of its softmax over the queue: confidence is 1 - entropy / log K. Methods without such "
        "a softmax have neither.",
        draw_teacher,
    ),
    Kind(
        "purity",
        "Neighbours",
        "Left: share of the ten nearest training images that are of a test image's class. Right: "
        "share of training images whose own second view is nearer than every row of the queue.",
        draw_neighbors,
    ),
    Kind(
        "spread",
        "Spread of the directions",
        "Standard deviation of unit vectors, times the square root of their dimension: near 1 if "
        "they fill the sphere, 0 if they have collapsed to a point.",
        draw_spread,
    ),
    Kind(
        "speed",
        "Throughput and data wait",
        "Training alone: evaluations and checkpoints are left out.",
        draw_speed,
    ),
)


def draw_all(runs: list[RunData]) -> list[Figure]:
    """Every figure for which some run has numbers."""
    figures = []
    for kind in KINDS:
        png = kind.draw(runs)
        if png is not None:
            figures.append(Figure(kind.name, kind.title, kind.caption, png))
    return figures
