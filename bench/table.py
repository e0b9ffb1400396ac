"""The table that a run of the benchmarks prints: one row per contender."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OURS = ("cuda", "triton", "cpu")  # the backends that the others are compared with, best first


@dataclass
class Row:
    """One contender of one group, or why it did not run.

    Attributes:
        group: the shape and the rule: rows of one group did the same work.
        contender: a backend or a peer.
        seconds: median; None if it did not run.
        flop: of the work; the rate follows.
        floor: seconds at the machine's ceilings; None where they are unknown.
        peak_bytes: growth of memory during one call; None where unknown.
        note: why it did not run.
    """

    group: str
    contender: str
    seconds: float | None = None
    flop: float = 0.0
    floor: float | None = None
    peak_bytes: int | None = None
    note: str = ""


def format_tables(rows: list[Row]) -> Iterable[str]:
    """Markdown, a table for all groups."""
    yield "| work | contender | median ms | GFLOP/s | % of floor | against ours | peak MB |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        ours = next((r for o in OURS for r in members if r.contender == o and r.seconds), None)
        for row in members:
            yield _format(row, ours)


def _format(row: Row, ours: Row | None) -> str:
    cells = [row.group, row.contender]
    if row.seconds is None:
        return "| " + " | ".join([*cells, row.note, "", "", "", ""]) + " |"
    cells.append(f"{row.seconds * 1e3:.2f}")
    cells.append(f"{row.flop / row.seconds / 1e9:.0f}")
    cells.append("" if row.floor is None else f"{100 * row.floor / row.seconds:.0f}")
    cells.append("" if ours is None else f"{row.seconds / ours.seconds:.2f}x")
    cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}")
    return "| " + " | ".join(cells) + " |"
