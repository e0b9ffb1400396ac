"""How a run shows where it is: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Protocol, TextIO

PLAIN_SECONDS = 10.0  # between two plain lines


@dataclass(frozen=True)
class Status:
    """What is shown of a run.

    Attributes:
        step, steps: done and in all.
        epoch, epochs: the one under way (from 1) and in all.
        data_wait: share of the time spent waiting for images, in [0, 1].
        seconds_left: estimated.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    lr: float
    images_per_s: float
    data_wait: float
    seconds_left: float

    def numbers(self) -> str:
        return (
            f"loss {self.loss:.4f}  lr {self.lr:.4f}  {self.images_per_s:,.0f} images/s  "
            f"data wait {self.data_wait:.0%}  ETA {clock(self.seconds_left)}"
        )


def clock(seconds: float) -> str:
    """1:05, or 2:01:05 from an hour on."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress(Protocol):
    """Shows a run; `say` prints a line that stays."""

    def say(self, line: str) -> None: ...
    def show(self, status: Status) -> None: ...
    def close(self) -> None: ...


class PlainProgress:
    """A line every ten seconds: for log files, pipes and batch systems."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._shown = time.monotonic()

    def say(self, line: str) -> None:
        print(line, file=self.stream, flush=True)

    def show(self, status: Status) -> None:
        now = time.monotonic()
        if now - self._shown < PLAIN_SECONDS and status.step < status.steps:
            return
        self._shown = now
        place = f"epoch {status.epoch}/{status.epochs}  step {status.step}/{status.steps}"
        self.say(f"{place}  {status.numbers()}")

    def close(self) -> None:
        pass


class BarProgress:
    """A bar at the bottom of the terminal, with the numbers beside it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(file=stream, highlight=False)
        self._bar = RichProgress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            transient=True,
            refresh_per_second=4,
        )
        self._task: int | None = None

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def show(self, status: Status) -> None:
        epoch = f"{status.epoch}/{status.epochs}"
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=status.steps, epoch=epoch, numbers="")
        self._bar.update(self._task, completed=status.step, epoch=epoch, numbers=status.numbers())

    def close(self) -> None:
        if self._task is not None:
            self._bar.stop()
            self._task = None


class SilentProgress:
    """Shows nothing: for the processes beside the first."""

    def say(self, line: str) -> None:
        pass

    def show(self, status: Status) -> None:
        pass

    def close(self) -> None:
        pass


def make_progress(stream: TextIO | None = None) -> Progress:
    """A bar if `stream` (standard output) is a terminal that can move its cursor, else lines."""
    stream = sys.stdout if stream is None else stream
    if not stream.isatty():
        return PlainProgress(stream)
    bar = BarProgress(stream)
    return PlainProgress(stream) if bar._console.is_dumb_terminal else bar
