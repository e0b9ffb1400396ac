"""Colours of the page, light and dark, and drawings that follow them.

matplotlib draws with colours that stand for others: in the SVG they become variables of the page's
style sheet, which has one value for light and one for dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

# name -> (in light, in dark); text has a contrast of at least 4.5 to the page, lines of 3.
COLORS = {
    "page": ("#ffffff", "#16191d"),
    "ink": ("#1f2328", "#e6e9ec"),
    "muted": ("#59636e", "#9aa4af"),
    "line": ("#d8dde3", "#353b43"),
    "right": ("#0a6cb0", "#6cb6ef"),
    "wrong": ("#c04f00", "#ff9a56"),
    # Of runs: told apart with any colour vision, after Okabe and Ito.
    "run-0": ("#0a6cb0", "#6cb6ef"),
    "run-1": ("#c04f00", "#ff9a56"),
    "run-2": ("#00795a", "#35c99b"),
    "run-3": ("#b0447f", "#f08fc4"),
    "run-4": ("#8f6500", "#e8b53c"),
    "run-5": ("#6f42c1", "#b794f6"),
    "run-6": ("#000000", "#d0d4d8"),
}
_RUNS = sum(name.startswith("run-") for name in COLORS)
# What matplotlib is told in place of each: colours that occur in no drawing.
_STAND_INS = {name: f"#fe{number:02x}dc" for number, name in enumerate(COLORS)}
_STYLE = {
    "font.size": 10,
    "text.color": _STAND_INS["ink"],
    "axes.labelcolor": _STAND_INS["ink"],
    "axes.edgecolor": _STAND_INS["muted"],
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _STAND_INS["muted"],
    "ytick.color": _STAND_INS["muted"],
    "grid.color": _STAND_INS["line"],
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",
}
SIZE = (4.7, 3.1)  # inches of a panel: two lie side by side, and one fits a narrow window
_DPI = 120  # of what is stored as pixels


def style_sheet() -> str:
    """The variables of the page, for both schemes."""
    light, dark = (
        " ".join(f"--{name}: {values[scheme]};" for name, values in COLORS.items())
        for scheme in (0, 1)
    )
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )


def color(name: str) -> str:
    """What stands for a colour of the page in a drawing."""
    return _STAND_INS[name]


def run_color(number: int) -> str:
    """The name of the colour of a run."""
    return f"run-{number % _RUNS}"


def draw_svg(
    description: str, draw: Callable[[Any], bool | None], size: tuple[float, float] = SIZE
) -> str | None:
    """An SVG to stand in the page, or None where there was nothing to draw.

    Args:
        description: what it shows, in words; no two drawings of a page have the same.
        draw: draws on the axes that it is given; returns False if there is nothing.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        if draw(figure.subplots()) is False:
            return None
        stream = io.StringIO()
        unwanted = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=unwanted)
    return _in_page(stream.getvalue(), description)


def _in_page(svg: str, description: str) -> str:
    """The SVG element alone: without what a file of its own needs, and with the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to them, and they would be repeated
    for name, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    label = html.escape(description)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
