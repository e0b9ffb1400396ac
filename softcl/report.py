"""``python -m softcl.report RUN [RUN ...]``: what runs did, as one HTML file.

Loss, k-NN accuracy against wall time, quality without labels, the teacher's confidence and entropy,
neighbours, spread, throughput; scores of softcl.evaluate; settings, and where they differ. Of each
run, as far as its checkpoint and images are there: the views, nearest neighbours, the confusion of
classes, maps of the features, and where a vision transformer looks. Several runs are compared in
the same axes. Runs under way can be reported; so can files of features that softcl.embed wrote.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from softcl.command import (
    CommandParser,
    carry_out,
    check_path,
    check_range,
    from_flag,
    need,
)
from softcl.files import check_target, replace_file, user_path
from softcl.reporting.figures import draw_all
from softcl.reporting.maps import USUAL, WAYS, check_ways
from softcl.reporting.page import Section, make_page
from softcl.reporting.pictures import Pictures
from softcl.reporting.runs import RunData, read_runs
from softcl.reporting.samples import MOST_IMAGES, is_embedding
from softcl.reporting.scores import find_scores, read_scores
from softcl.train.parts import resolve_device

PAGE = "index.html"
PROG = "softcl.report"


def build_parser() -> CommandParser:
    description = __doc__.splitlines()[0].partition(": ")[2]
    parser = CommandParser(PROG, "RUN [RUN ...] [flags]", description)
    add = parser.add_argument
    # fmt: off
    add("runs", metavar="RUN", nargs="+", help="run folders, or files of softcl.embed")
    add("--out", metavar="FOLDER", help="where to write (default: RUN/report, or report/)")
    add("--scores", action="append", metavar="FILE",
        help="of softcl.evaluate --out; may be repeated; those in run folders are found")
    add("--map", action="append", choices=WAYS, metavar="NAME",
        help=f"map of the features: tsne, pca, umap or none; may be repeated "
        f"(default: {' and '.join(USUAL)})")
    add("--images", type=int, default=MOST_IMAGES, metavar="N",
        help=f"test images that are looked at, at most (default: {MOST_IMAGES})")
    add("--no-pictures", action="store_true",
        help="leave out what needs images or checkpoints, which takes the time")
    add("--device", default="auto", metavar="NAME", help="for the features")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected failure is one line on stderr.

    Returns:
        0 done, 1 could not run, 2 wrong flags.
    """

    def command() -> None:
        options = build_parser().read(sys.argv[1:] if argv is None else argv)
        check_range("images", options.images, at_least=4)
        resolve_device(options.device)
        options.map = [way for way in dict.fromkeys(options.map or USUAL) if way != "none"]
        check_ways(options.map)
        needed = ["sklearn"] if options.map and not options.no_pictures else []
        need("a report", "matplotlib", *needed)
        paths = [user_path(path) for path in options.runs]
        runs = read_runs([path for path in paths if not is_embedding(path)])
        print(f"written    {write_report(runs, list(filter(is_embedding, paths)), options)}")

    return carry_out(PROG, command)


def write_report(runs: list[RunData], files: list[Path], options: argparse.Namespace) -> Path:
    """Draw, and write the page; its path."""
    if options.out is not None:
        folder = check_path("out", options.out)
    else:
        folder = runs[0].path / "report" if len(runs) == 1 and not files else Path("report")
    with from_flag("out"):
        folder.mkdir(parents=True, exist_ok=True)
        check_target(folder / PAGE)
    scores = [read_scores(check_path("scores", path)) for path in options.scores or ()]
    known = {one.path.resolve() for one in scores}
    scores += [one for one in find_scores(runs) if one.path.resolve() not in known]
    charts, notes, sections = draw_all(runs), [], []
    if runs and not charts:
        notes.append("No training step has been logged yet.")
    if not options.no_pictures:
        pictures = Pictures(options.map, options.images, resolve_device(options.device))
        sections = [Section(f"Pictures: {run.name}", pictures.of_run(run)) for run in runs]
        sections += [Section(f"Features: {path.name}", pictures.of_file(path)) for path in files]
        notes += pictures.notes
    replace_file(folder / PAGE, make_page(runs, charts, sections, notes, scores).encode())
    for note in notes:
        print(f"note       {note}")
    return folder / PAGE


if __name__ == "__main__":
    sys.exit(main())
