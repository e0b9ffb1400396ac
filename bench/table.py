"""The table that a run of the benchmarks prints: one row per contender."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

# What the others are compared with, best first: backends, and the queue, which is one for all.
OURS = ("cuda", "triton", "cpu", "softcl")


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
        over_ours: its time over ours, where both took turns; else that of the medians is printed.
        images_per_s: where the work is a batch of images.
    """

    group: str
    contender: str
    seconds: float | None = None
    flop: float = 0.0
    floor: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    over_ours: float | None = None
    images_per_s: float | None = None


def format_tables(rows: list[Row]) -> Iterable[str]:
    """Markdown: a table for each kind of work, padded so that it can be read as it is."""
    for titles, lines in _tables(rows):
        widths = [max(3, *map(len, column)) for column in zip(titles, *lines, strict=True)]
        is_number = [title in COLUMNS for title in titles]
        rule = ["-" * (w - n) + ":" * n for w, n in zip(widths, is_number, strict=True)]
        yield ""
        for cells in (titles, rule, *lines):
            padded = [
                cell.rjust(w) if n else cell.ljust(w)
                for cell, w, n in zip(cells, widths, is_number, strict=True)
            ]
            yield "| " + " | ".join(padded) + " |"


def _tables(rows: list[Row]) -> Iterable[tuple[list[str], list[list[str]]]]:
    """Titles and cells: groups in which the same is known share a table."""
    groups: dict[str, list[Row]] = {}
    for row in compared(rows):
        groups.setdefault(row.group, []).append(row)
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for members in groups.values():
        known = tuple(title for title, cell in COLUMNS.items() if any(map(cell, members)))
        kinds.setdefault(known, []).extend(members)
    for known, members in kinds.items():
        noted = any(row.note for row in members)
        titles = ["work", "contender", *known, *["note"] * noted]
        yield (
            titles,
            [
                [row.group, row.contender, *(COLUMNS[t](row) for t in known), *[row.note] * noted]
                for row in members
            ],
        )


def compared(rows: list[Row]) -> list[Row]:
    """With the ratio of the medians where contenders did not take turns."""
    ours: dict[str, tuple[int, float]] = {}  # group -> (rank, seconds), the best
    for row in rows:
        if row.contender in OURS and row.seconds:
            found = OURS.index(row.contender), row.seconds
            ours[row.group] = min(found, ours.get(row.group, found))
    return [
        replace(row, over_ours=row.seconds / ours[row.group][1])
        if row.seconds and row.group in ours and not row.over_ours
        else row
        for row in rows
    ]


def _milliseconds(row: Row) -> str:
    """With three digits or more."""
    if row.seconds is None:
        return ""
    value = row.seconds * 1e3
    return f"{value:.{1 if value >= 100 else 2 if value >= 1 else 4}f}"


def _per_second(row: Row) -> str:
    return f"{row.images_per_s:,.0f}" if row.images_per_s else ""


def _gflops(row: Row) -> str:
    return f"{row.flop / row.seconds / 1e9:.0f}" if row.flop and row.seconds else ""


def _of_floor(row: Row) -> str:
    return f"{100 * row.floor / row.seconds:.0f}" if row.floor and row.seconds else ""


def _over_ours(row: Row) -> str:
    return f"{row.over_ours:.2f}x" if row.over_ours else ""


def _peak(row: Row) -> str:
    return "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"


# Title -> cell. A table leaves out those that none of its rows has.
COLUMNS = {
    "median ms": _milliseconds,
    "images/s": _per_second,
    "GFLOP/s": _gflops,
    "% of floor": _of_floor,
    "over ours": _over_ours,
    "peak MB": _peak,
}
