"""A Markdown table and plots from files of results.

    pytest bench/ --benchmark-only --benchmark-json results.json
    python -m bench.report results.json [MORE.json ...] [--out FOLDER]

Writes to the folder (default: beside the first file) `report.md`, with what did not run and why,
and, where the results have what they show: `time.png`, time against the queue's size with the floor
drawn in; `memory.png`, growth of memory against the queue's size; `ratios.png`, each peer's time
over ours; `roofline.png`, rates against arithmetic intensity. Of a benchmark that is in several
files the last one counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

from bench.contenders import ALL  # noqa: E402
from bench.table import OURS, Row, compared, format_tables  # noqa: E402

# Strong colours first: those of tab20 come in pairs of a strong and a pale one.
PALETTE = plt.colormaps["tab20"].colors
COLORS = dict(zip(ALL, PALETTE[::2] + PALETTE[1::2], strict=False))
OURS_WIDTH, WIDTH = 2.5, 1.2


class Result:
    """One benchmark of a file."""

    def __init__(self, benchmark: dict) -> None:
        self.fullname, self.group = benchmark["fullname"], benchmark["group"] or benchmark["name"]
        self.info: dict = benchmark["extra_info"]
        self.seconds: float = benchmark["stats"]["median"] / self.info.get("batches", 1)
        self.contender: str = self.info.get("contender", benchmark["name"])
        self.shape: tuple[int, int, int] | None = tuple(self.info.get("shape") or ()) or None
        self.rule: str | None = self.info.get("rule")
        self.peak: int | None = self.info.get("peak_bytes")

    @property
    def is_loss(self) -> bool:
        return self.rule is not None and self.shape is not None

    def row(self) -> Row:
        return Row(
            self.group,
            self.contender,
            self.seconds,
            self.info.get("flop", 0.0),
            self.info.get("floor_seconds"),
            self.peak,
            over_ours=self.info.get("over_ours"),
            images_per_s=self.info.get("images_per_s"),
        )


def read(paths: list[Path]) -> tuple[list[Result], list[Row], list[dict]]:
    """The results, what did not run and why, and what each file says of its machine."""
    results: dict[str, Result] = {}
    not_run: dict[tuple[str, str], Row] = {}
    machines = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
            found = [Result(b) for b in content["benchmarks"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"report: {path} holds no results of pytest-benchmark ({error})"
            ) from None
        results |= {r.fullname: r for r in found}
        missing = [Row(g, c, note=note) for g, c, note in content.get("not_run", [])]
        not_run |= {(row.group, row.contender): row for row in missing}
        machines.append({"date": content.get("datetime", "")[:10], **about(content)})
    for r in results.values():
        not_run.pop((r.group, r.contender), None)
    return list(results.values()), list(not_run.values()), machines


def about(content: dict) -> dict:
    return content.get("machine_info", {}).get("softcl", {})


def describe(machines: list[dict]) -> str:
    """Every distinct machine of the files, in words."""
    lines = []
    for m in machines:
        clock = f", {m['clocks_mhz']:.0f} MHz" if m.get("clocks_mhz") else ""
        line = (
            f"{m.get('device_name', 'unknown device')}, {m.get('threads', '?')} threads{clock}, "
            f"torch {m.get('torch', '?')}, {m['date']}"
        )
        if line not in lines:
            lines.append(line)
    return "; ".join(lines)


# ------------------------------------------------------------------------------------------- plots


def color_of(contender: str) -> tuple:
    return COLORS.get(contender, (0.5, 0.5, 0.5))


def in_order(names: set[str]) -> list[str]:
    """As the legend lists them: ours, then the peers."""
    return [name for name in ALL if name in names] + sorted(names.difference(ALL))


def series_of(results: list[Result]) -> dict[tuple, list[Result]]:
    """(N, D, label rule, dtype) -> results, those with two queue sizes or more."""
    series: dict[tuple, list[Result]] = {}
    for r in results:
        if r.shape:
            N, _, D = r.shape
            series.setdefault((N, D, r.rule, r.info.get("dtype")), []).append(r)
    return {key: rs for key, rs in series.items() if len({r.shape[1] for r in rs}) > 1}


def add_legend(figure) -> None:
    """Beside the plots, each name once."""
    handles: dict[str, object] = {}
    for axis in figure.axes:
        handles |= dict(
            reversed(pair) for pair in zip(*axis.get_legend_handles_labels(), strict=True)
        )
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)


def plain_numbers(axis) -> None:
    """1, 2, 5, 10 and so on along a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_locator(NullLocator())


def plot_lines(series: dict, path: Path, value, label: str, floor) -> None:
    """One panel for each series: value against K on logarithmic axes."""
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4.6 * columns + 1.6, 3.6 * rows),
        squeeze=False,
        layout="constrained",
    )
    names = in_order({r.contender for rs in series.values() for r in rs})
    for axis, (key, results) in zip(axes.flat, sorted(series.items(), key=str), strict=False):
        for name in names:
            points = sorted((r.shape[1], value(r)) for r in results if r.contender == name)
            points = [(K, y) for K, y in points if y]
            if points:
                own = name in OURS
                axis.plot(
                    *zip(*points, strict=True),
                    "o-",
                    color=color_of(name),
                    label=name,
                    linewidth=OURS_WIDTH if own else WIDTH,
                    markersize=5 if own else 3,
                    zorder=3 if own else 2,
                )
        lower = sorted({(r.shape[1], floor(r)) for r in results if floor(r)})
        best = {K: min(y for k, y in lower if k == K) for K, _ in lower}
        if best:
            axis.plot(*zip(*best.items(), strict=True), "k--", linewidth=1, label="floor")
        N, D, rule, dtype = key
        axis.set_title(", ".join(x for x in (f"N={N}, D={D}", rule, dtype) if x), fontsize=10)
        axis.set(xscale="log", yscale="log", xlabel="queue rows K", ylabel=label)
        axis.set_xticks(sorted({r.shape[1] for r in results}))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:.0f}k" if x >= 1024 else f"{x:.0f}")
        axis.minorticks_off()
        plain_numbers(axis.yaxis)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(series) :]:
        axis.set_visible(False)
    add_legend(figure)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_ratios(results: list[Result], path: Path) -> bool:
    """Peers' times over ours, one group of bars for each piece of work."""
    ratios: dict[str, dict[str, float]] = {}
    for row in compared([r.row() for r in results]):
        if row.over_ours and row.contender not in (*OURS, "reference", "bare"):
            ratios.setdefault(row.group, {})[row.contender] = row.over_ours
    if not ratios:
        return False
    height = 1.0 + 0.16 * sum(len(r) + 1 for r in ratios.values())
    figure, axis = plt.subplots(figsize=(10, height), layout="constrained")
    y, ticks = 0.0, []
    for group, values in ratios.items():
        ticks.append((y + (len(values) - 1) / 2, group))
        for contender, ratio in values.items():
            axis.barh(
                y,
                ratio - 1.0,
                0.9,
                left=1.0,
                color=color_of(contender),
                label=None if contender in axis.get_legend_handles_labels()[1] else contender,
            )
            axis.text(max(ratio, 1.0), y, f" {ratio:.2f}", va="center", fontsize=7)
            y += 1
        y += 1
    axis.axvline(1.0, color="k", linewidth=1)
    axis.set_yticks([t for t, _ in ticks], [g for _, g in ticks], fontsize=8)
    shown = [r for values in ratios.values() for r in values.values()]
    axis.set(xscale="log", xlabel="time over ours (right of 1: slower)", ylim=(y - 1.0, -1.0))
    axis.set_xlim(min(1.0, *shown) / 1.05, max(shown) * 1.2)
    plain_numbers(axis.xaxis)
    add_legend(figure)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def plot_roofline(results: list[Result], path: Path) -> bool:
    """Rates against FLOP per byte that must move, below the measured ceilings."""
    losses = [r for r in results if r.is_loss and r.info.get("bytes") and r.info.get("ceilings")]
    if not losses:
        return False
    ceiling = max(2.0 * r.info["ceilings"]["multiply_adds"] for r in losses)
    rate = max(r.info["ceilings"]["copied_bytes"] for r in losses)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in in_order({r.contender for r in losses}):
        points = [
            (r.info["flop"] / r.info["bytes"], r.info["flop"] / r.seconds / 1e9)
            for r in losses
            if r.contender == name
        ]
        axis.plot(
            *zip(*points, strict=True),
            "o",
            color=color_of(name),
            label=name,
            markersize=7 if name in OURS else 4,
        )
    axis.axhline(ceiling / 1e9, color="k", label=f"multiply-adds, {ceiling / 1e9:.0f} GFLOP/s")
    intensities = [1.0, ceiling / rate]
    axis.plot(
        intensities,
        [rate * x / 1e9 for x in intensities],
        "k:",
        label=f"copy, {rate / 1e9:.0f} GB/s",
    )
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    plain_numbers(axis.yaxis)
    axis.grid(alpha=0.3)
    add_legend(figure)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


# ------------------------------------------------------------------------------------------ report


def write(
    results: list[Result], not_run: list[Row], machines: list[dict], out: Path, command: str
) -> list[Path]:
    """Everything that the results allow; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = []

    def drawn(name: str, was_drawn: bool) -> None:
        if was_drawn:
            written.append(out / name)

    times = series_of([r for r in results if r.is_loss])
    if times:
        plot_lines(
            times,
            out / "time.png",
            lambda r: 1e3 * r.seconds,
            "ms",
            lambda r: 1e3 * (r.info.get("floor_seconds") or 0.0),
        )
        drawn("time.png", True)
    memory = series_of([r for r in results if r.peak and "memory" in r.group])
    memory = memory or series_of([r for r in results if r.peak])
    if memory:
        plot_lines(
            memory, out / "memory.png", lambda r: r.peak / 1e6, "peak growth, MB", lambda r: None
        )
        drawn("memory.png", True)
    timed = [r for r in results if "memory" not in r.group]
    drawn("ratios.png", plot_ratios(timed, out / "ratios.png"))
    drawn("roofline.png", plot_roofline(results, out / "roofline.png"))
    lines = [f"Made by `{command}` from results on {describe(machines)}."]
    lines += format_tables([*(r.row() for r in results), *not_run])
    lines += ["", *(f"![{path.stem}]({path.name})" for path in written)]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    return [out / "report.md", *written]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder (default: beside the first file)")
    options = parser.parse_args(arguments)
    results, not_run, machines = read(options.results)
    if not results:
        raise SystemExit("report: the files hold no benchmarks")
    names = " ".join(path.name for path in options.results)
    out = options.out or options.results[0].parent
    for path in write(results, not_run, machines, out, f"python -m bench.report {names}"):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
