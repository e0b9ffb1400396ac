"""``python -m softcl.report RUN [RUN ...]``: what runs did, as one HTML file and its pictures.

Loss, k-NN accuracy against wall time, learning rate, the teacher's confidence and entropy,
neighbours, spread, throughput; a map of the features and the nearest-neighbour picture of each run;
settings and versions. Several runs are compared in the same axes. Runs under way can be reported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from softcl.command import (
    CommandParser,
    ConfigError,
    carry_out,
    check_path,
    check_range,
    from_flag,
    need,
)
from softcl.data import DataError
from softcl.files import check_target, replace_file, user_path
from softcl.reporting.figures import Figure, draw_all
from softcl.reporting.maps import MOST_IMAGES, WAYS, map_features
from softcl.reporting.page import make_page
from softcl.reporting.runs import RunData, read_runs
from softcl.train.checkpoint import CheckpointError
from softcl.train.parts import resolve_device

PAGE = "index.html"
PROG = "softcl.report"


def build_parser() -> CommandParser:
    description = __doc__.splitlines()[0].partition(": ")[2]
    parser = CommandParser(PROG, "RUN [RUN ...] [flags]", description)
    add = parser.add_argument
    # fmt: off
    add("runs", metavar="RUN", nargs="+", help="run folders")
    add("--out", metavar="FOLDER", help="where to write (default: RUN/report, or report/)")
    add("--map", choices=WAYS, default="tsne", metavar="NAME",
        help="map of the features: tsne, pca or none (default: tsne)")
    add("--map-images", type=int, default=MOST_IMAGES, metavar="N",
        help=f"test images on it at most (default: {MOST_IMAGES})")
    add("--device", default="auto", metavar="NAME", help="for the features of the map")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected failure is one line on stderr.

    Returns:
        0 done, 1 could not run, 2 wrong flags.
    """

    def command() -> None:
        options = build_parser().read(sys.argv[1:] if argv is None else argv)
        check_range("map_images", options.map_images, at_least=4)
        resolve_device(options.device)
        need("a report", "matplotlib", *(["sklearn"] if options.map != "none" else []))
        runs = read_runs([user_path(run) for run in options.runs])
        print(f"written    {write_report(runs, options)}")

    return carry_out(PROG, command)


def write_report(runs: list[RunData], options: argparse.Namespace) -> Path:
    """Draw, write the pictures and the page; the path of the page."""
    if options.out is not None:
        folder = check_path("out", options.out)
    else:
        folder = runs[0].path / "report" if len(runs) == 1 else Path("report")
    with from_flag("out"):
        folder.mkdir(parents=True, exist_ok=True)
        check_target(folder / PAGE)
    figures, notes = draw_all(runs), []
    if not figures:
        notes.append("No training step has been logged yet.")
    for run in runs:
        if options.map != "none":
            try:
                figures.append(_map(run, options))
            except (CheckpointError, ConfigError, DataError) as error:
                notes.append(f"{run.name}: no map of the features ({error})")
        if run.picture is not None:
            figures.append(_picture(run))
    for figure in figures:
        replace_file(folder / f"{figure.name}.png", figure.png)
    replace_file(folder / PAGE, make_page(runs, figures, notes).encode())
    for note in notes:
        print(f"note       {note}")
    return folder / PAGE


def _map(run: RunData, options: argparse.Namespace) -> Figure:
    png = map_features(run, options.map, resolve_device(options.device), options.map_images)
    way = {"tsne": "t-SNE", "pca": "Principal components"}[options.map]
    caption = (
        f"{way} of the backbone's features of test images, coloured by class, at the best k-NN "
        "accuracy or else the newest checkpoint. Distances between far groups mean little."
    )
    return Figure(f"map-{_file_name(run)}", f"Map of the features: {run.name}", caption, png)


def _picture(run: RunData) -> Figure:
    caption = "Test images and the training images nearest to them; borders show the class."
    title = f"Nearest neighbours: {run.name}"
    return Figure(f"neighbors-{_file_name(run)}", title, caption, run.picture.read_bytes())


def _file_name(run: RunData) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in run.name)


if __name__ == "__main__":
    sys.exit(main())
