"""The report as one HTML file that needs no other: pictures are inside it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import softcl
from softcl.reporting.figures import Figure
from softcl.reporting.runs import RunData
from softcl.reporting.scores import Scores, owner_of
from softcl.reporting.theme import COLORS, run_color, style_sheet
from softcl.train.log import clock

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 1000px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; overflow-wrap: anywhere; } h2 { font-size: 1.25em; margin: 2.2em 0 .3em; }
h3 { font-size: 1.05em; margin: 1.5em 0 .2em; }
p.caption, p.legend { color: var(--muted); margin: 0 0 .5em; max-width: 46em; }
p.note { border-left: 3px solid var(--wrong); padding-left: .7em; overflow-wrap: anywhere; }
div.figures { display: flex; flex-wrap: wrap; gap: 0 1.5em; }
div.figure { flex: 1 1 440px; min-width: 0; max-width: 100%; } div.whole { flex-basis: 100%; }
div.panels { display: flex; flex-wrap: wrap; gap: .5em 1.5em; align-items: flex-start; }
div.panels > * { min-width: 0; max-width: 100%; }
svg { max-width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
img.wide { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: .2em .9em .2em 0; border-bottom: 1px solid var(--line);
         vertical-align: top; overflow-wrap: anywhere; }
th, td:first-child { overflow-wrap: normal; }
table.tiles { table-layout: fixed; }
table.tiles th, table.tiles td { border: 0; padding: 2px; font-size: 12px; font-weight: 400;
         color: var(--muted); line-height: 1.2; }
table.tiles img { display: block; width: 100%; box-sizing: border-box; image-rendering: pixelated; }
table.tiles img + small { display: block; overflow: hidden; white-space: nowrap;
         text-overflow: ellipsis; }
img.right { border: 3px solid var(--right); } img.wrong { border: 3px dashed var(--wrong); }
small.right { color: var(--right); } small.wrong { color: var(--wrong); }
span.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
           margin-right: .35em; }
p.legend > span { white-space: nowrap; margin-right: .8em; }
details { margin-top: 2em; } summary { cursor: pointer; font-weight: 600; }
div.scroll { overflow-x: auto; }
"""
_NO_SETTINGS = {"out", "resume", "overwrite"}


@dataclass(frozen=True)
class Section:
    """Figures under a heading of their own: those of a run or of a file."""

    title: str
    figures: Sequence[Figure]


def _text(value: Any) -> str:
    return html.escape("" if value is None else str(value))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _plain(value: float | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value:,.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:,.0f}"


def _dot(name: str) -> str:
    """Of a colour of the page, or of any other."""
    value = f"var(--{name})" if name in COLORS else name
    return f'<span class="dot" style="background:{value}"></span>'


# ------------------------------------------------------------------------------------------ tables


def _table(runs: list[RunData], rows: Sequence[str]) -> str:
    cells = "".join(
        f"<th>{_dot(run_color(number))}{_text(run.name)}</th>" for number, run in enumerate(runs)
    )
    head = f"<tr><th></th>{cells}</tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _row(name: str, values: Sequence[Any]) -> str:
    cells = "".join(f"<td>{_text(value)}</td>" for value in values)
    return f"<tr><td>{_text(name)}</td>{cells}</tr>"


def summary_table(runs: list[RunData]) -> str:
    """The numbers one looks for first, a column for each run."""
    lines = [
        ("method", lambda run: f"{run.config.get('method')} {run.config.get('labels') or ''}"),
        ("backbone", lambda run: f"{run.config.get('arch')} at {run.config.get('image_size')} px"),
        ("data", lambda run: run.config.get("data")),
        ("epochs", _epochs),
        ("best k-NN top-1", lambda run: _share((run.best() or {}).get("knn_top1"))),
        ("best: RankMe", lambda run: _plain((run.best() or {}).get("rankme"), 1)),
        ("at epoch", lambda run: _plain((run.best() or {}).get("epoch"))),
        ("last k-NN top-1", lambda run: _share((run.evaluations or [{}])[-1].get("knn_top1"))),
        ("last online probe", lambda run: _share((run.evaluations or [{}])[-1].get("probe_top1"))),
        ("untrained backbone", lambda run: _share(run.baselines.get("untrained"))),
        ("raw pixels", lambda run: _share(run.baselines.get("pixels"))),
        ("wall time", _wall_time),
        ("images per second", lambda run: _plain(run.median("images_per_s"), 0)),
        ("data wait", lambda run: _share(run.median("data_wait"))),
        ("backend", lambda run: run.backend),
        ("device", lambda run: run.device),
        ("softcl, torch, python", lambda run: ", ".join(map(str, run.versions.values()))),
    ]
    table = [(name, [get(run) for run in runs]) for name, get in lines]
    return _table(runs, [_row(name, values) for name, values in table if any(values)])


def _epochs(run: RunData) -> str:
    done = max((row.get("epoch") or 0 for row in run.steps), default=0)
    total = run.config.get("epochs")
    return f"{total}" if run.finished else f"{_plain(done)} of {total}, not finished"


def _wall_time(run: RunData) -> str:
    seconds = run.result.get("seconds")
    if seconds is None and run.evaluations:
        seconds = run.evaluations[-1].get("seconds")
    return "" if seconds is None else clock(seconds)


def settings_of(runs: list[RunData]) -> tuple[list[str], list[str]]:
    """Names of the settings in which the runs differ, and of the others."""
    names = sorted({name for run in runs for name in run.config} - _NO_SETTINGS)
    values = {name: {repr(run.config.get(name)) for run in runs} for name in names}
    differing = [name for name in names if len(values[name]) > 1]
    return differing, [name for name in names if name not in differing]


def config_table(runs: list[RunData], names: Sequence[str]) -> str:
    return _table(runs, [_row(name, [run.config.get(name) for run in runs]) for name in names])


def scores_tables(runs: list[RunData], scores: Sequence[Scores]) -> str:
    """A table for each way of measuring: network, images and their size; a column for each file."""
    groups: dict[str, list[Scores]] = {}
    for one in scores:
        groups.setdefault(one.about, []).append(one)
    parts = []
    for about, group in groups.items():
        heads = []
        for one in group:
            run = owner_of(one, runs)
            dot = "" if run is None else _dot(run_color(runs.index(run)))
            heads.append(f"<th>{dot}{_text(one.checkpoint if run is None else run.name)}</th>")
        names = dict.fromkeys(name for one in group for name in one.values)
        rows = [_row(name, [_share(one.values.get(name)) for one in group]) for name in names]
        table = f"<table><tr><th></th>{''.join(heads)}</tr>{''.join(rows)}</table>"
        parts.append(f'<p class="caption">{_text(about)}</p><div class="scroll">{table}</div>')
    return "\n".join(parts)


# -------------------------------------------------------------------------------------------- page


def _figure(figure: Figure) -> str:
    kind = "figure" if len(figure.panels) == 1 else "figure whole"
    parts = [f'<div class="{kind}">', f"<h3>{_text(figure.title)}</h3>"]
    if figure.caption:
        parts.append(f'<p class="caption">{_text(figure.caption)}</p>')
    if figure.legend:
        words = " ".join(f"<span>{_dot(name)}{_text(word)}</span>" for word, name in figure.legend)
        parts.append(f'<p class="legend">{words}</p>')
    panels = "".join(f"<div>{panel}</div>" for panel in figure.panels)
    parts.append(f'<div class="panels">{panels}</div></div>')
    return "\n".join(parts)


def _figures(figures: Sequence[Figure]) -> list[str]:
    return ['<div class="figures">', *map(_figure, figures), "</div>"]


def make_page(
    runs: list[RunData],
    charts: Sequence[Figure],
    sections: Sequence[Section],
    notes: Sequence[str],
    scores: Sequence[Scores] = (),
) -> str:
    """The whole page."""
    names = _text(", ".join([run.name for run in runs] or [part.title for part in sections]))
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>softcl: {names}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{style_sheet()}{_STYLE}</style></head><body>",
        f"<h1>{names}</h1>",
        summary_table(runs) if runs else "",
    ]
    parts += [f'<p class="note">{_text(note)}</p>' for note in notes]
    differing, same = settings_of(runs)
    if differing:
        parts += ["<h2>Settings that differ</h2>", config_table(runs, differing)]
    if scores:
        parts += ["<h2>Scores</h2>", scores_tables(runs, scores)]
    if charts:
        parts += ["<h2>Training</h2>", *_figures(charts)]
    for section in sections:
        if section.figures:
            parts += [f"<h2>{_text(section.title)}</h2>", *_figures(section.figures)]
    if same:
        which = "The other settings" if differing else "Settings"
        parts.append(f"<details><summary>{which}</summary>{config_table(runs, same)}</details>")
    parts.append(f'<p class="caption">Written by softcl {softcl.__version__}.</p></body></html>\n')
    return "\n".join(filter(None, parts))
