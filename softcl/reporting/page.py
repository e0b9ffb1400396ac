"""The report as one HTML file that needs no other: pictures are inside it."""

from __future__ import annotations

import base64
import html
from typing import Any

import softcl
from softcl.reporting.figures import Figure, color
from softcl.reporting.runs import RunData
from softcl.train.log import clock

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .3em; }
p.caption { color: #555; margin: 0 0 .5em; max-width: 46em; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: .2em .9em .2em 0; border-bottom: 1px solid #e4e4e4;
         vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.differs td { background: #fff6dc; }
span.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
           margin-right: .4em; }
details { margin-top: 2em; } summary { cursor: pointer; font-weight: 600; }
div.wide { overflow-x: auto; }
"""


def _text(value: Any) -> str:
    return html.escape("" if value is None else str(value))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _head(runs: list[RunData]) -> str:
    cells = "".join(
        f'<th><span class="dot" style="background:{color(number)}"></span>{_text(run.name)}</th>'
        for number, run in enumerate(runs)
    )
    return f"<tr><th></th>{cells}</tr>"


def summary_table(runs: list[RunData]) -> str:
    """The numbers one looks for first, a column for each run."""
    lines = [
        ("method", lambda run: f"{run.config.get('method')} {run.config.get('labels') or ''}"),
        ("backbone", lambda run: f"{run.config.get('arch')} at {run.config.get('image_size')} px"),
        ("data", lambda run: run.config.get("data")),
        ("epochs", _epochs),
        ("best k-NN top-1", lambda run: _share((run.best() or {}).get("knn_top1"))),
        ("at epoch", lambda run: _plain((run.best() or {}).get("epoch"))),
        ("last k-NN top-1", lambda run: _share((run.evaluations or [{}])[-1].get("knn_top1"))),
        ("untrained backbone", lambda run: _share(run.baselines.get("untrained"))),
        ("raw pixels", lambda run: _share(run.baselines.get("pixels"))),
        ("wall time", _wall_time),
        ("images per second", lambda run: _plain(run.median("images_per_s"), 0)),
        ("data wait", lambda run: _share(run.median("data_wait"))),
        ("backend", lambda run: run.backend),
        ("device", lambda run: run.device),
        ("softcl, torch, python", lambda run: ", ".join(map(str, run.versions.values()))),
    ]
    rows = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{_text(get(run))}</td>' for run in runs)}</tr>"
        for name, get in lines
    )
    return f'<div class="wide"><table>{_head(runs)}{rows}</table></div>'


def _plain(value: float | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value:,.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:,.0f}"


def _epochs(run: RunData) -> str:
    done = max((row.get("epoch") or 0 for row in run.steps), default=0)
    total = run.config.get("epochs")
    return f"{total}" if run.finished else f"{_plain(done)} of {total}, not finished"


def _wall_time(run: RunData) -> str:
    seconds = run.result.get("seconds")
    if seconds is None and run.evaluations:
        seconds = run.evaluations[-1].get("seconds")
    return "" if seconds is None else clock(seconds)


def config_table(runs: list[RunData]) -> str:
    """Every setting; those in which the runs differ are marked and come first."""
    names = sorted({name for run in runs for name in run.config} - {"out", "resume", "overwrite"})

    def differs(name: str) -> bool:
        return len({repr(run.config.get(name)) for run in runs}) > 1

    rows = []
    for name in sorted(names, key=lambda name: (not differs(name), name)):
        cells = "".join(f"<td>{_text(run.config.get(name))}</td>" for run in runs)
        kind = ' class="differs"' if differs(name) else ""
        rows.append(f"<tr{kind}><td>{_text(name)}</td>{cells}</tr>")
    return f'<div class="wide"><table>{_head(runs)}{"".join(rows)}</table></div>'


def embedded(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{_text(description)}" src="data:image/png;base64,{data}">'


def make_page(runs: list[RunData], figures: list[Figure], notes: list[str]) -> str:
    """The whole page."""
    names = ", ".join(run.name for run in runs)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>softcl: {_text(names)}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{_text(names)}</h1>",
        summary_table(runs),
    ]
    for note in notes:
        parts.append(f"<p>{_text(note)}</p>")
    for figure in figures:
        parts.append(f"<h2>{_text(figure.title)}</h2>")
        if figure.caption:
            parts.append(f'<p class="caption">{_text(figure.caption)}</p>')
        parts.append(embedded(figure.png, figure.title))
    marked = " (marked: where they differ)" if len(runs) > 1 else ""
    parts.append(f"<details><summary>Settings{marked}</summary>{config_table(runs)}</details>")
    parts.append(f"<p>Written by softcl {softcl.__version__}.</p></body></html>\n")
    return "\n".join(parts)
