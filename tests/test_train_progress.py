"""What a run shows of itself, what it measures of itself, and how it is stopped."""

from __future__ import annotations

import io
import math
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from softcl.train.log import BarProgress, PlainProgress, clock, make_progress
from softcl.train.parts import keep_freed_pages
from softcl.train.step import FIRST_STEPS, Diverged, Meter

ROOT = Path(__file__).resolve().parents[1]  # a fresh interpreter finds softcl from here
STATUS = (120, 390, "4/10", "loss 6.5432  ETA 1:01")  # step, steps, epoch, numbers


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def measures(loss: float) -> torch.Tensor:
    return torch.tensor([loss, 0.5, 2.0, 1.0, 0.9])


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = make_progress(stream)
    assert isinstance(progress, PlainProgress)
    progress.show(*STATUS)  # too early for another line
    progress._shown -= 11
    progress.show(*STATUS)
    progress.say("k-NN 51 %")
    lines = ["epoch 4/10  step 120/390  loss 6.5432  ETA 1:01", "k-NN 51 %"]
    assert stream.getvalue().splitlines() == lines
    times = [clock(s) for s in (0, 61.4, 3599.4, 3600, 86399)]
    assert times == ["0:00", "1:01", "59:59", "1:00:00", "23:59:59"]


def test_a_bar_on_a_terminal_that_can_move_its_cursor(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(Terminal()), PlainProgress)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = make_progress(stream)
    assert isinstance(progress, BarProgress)
    progress.show(*STATUS)
    progress.say("[k-NN] 51 %")
    progress.close()
    for text in ("loss 6.5432", "ETA 1:01", "4/10", "31%", "[k-NN] 51 %"):
        assert text in stream.getvalue()


def test_meter_gives_early_steps_a_row_each_and_then_some():
    meter, rows, last = Meter(every=10, batch_size=4), [], FIRST_STEPS + 25
    for step in range(1, last + 1):
        meter.add(step, measures(float(step)))
        if meter.due(step, last):
            rows.append(meter.row(0.0))
    assert [row["step"] for row in rows] == [*range(1, 51), 60, 70, 75]
    assert all(row["loss"] == row["step"] for row in rows) and rows[-1]["positive_top1"] == 1.0
    for loss in (math.nan, -math.inf):
        meter.check()
        with pytest.raises(Diverged, match="the loss of step 76 is"):
            meter.add(76, measures(loss))
        with pytest.raises(Diverged, match="the loss of step 76 is"):
            meter.check()
        meter.add(76, measures(1.0))


def test_meter_leaves_other_work_out_of_the_speed():
    meter = Meter(1, 100)
    meter.restart(0.0)
    meter.add(60, measures(1.0))
    time.sleep(0.02)
    start = time.perf_counter()
    time.sleep(0.3)
    meter.skip(time.perf_counter() - start)
    row = meter.row(waited=0.01)
    assert row["images_per_s"] > 100 / 0.3
    assert 0.0 < row["data_wait"] <= 0.5


_WAITING = """
import sys, time
from softcl.train.parallel import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while stop.exit_code is None:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_exits_at_once(number: int, code: int):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", _WAITING], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(number)
        assert process.wait(timeout=20) == code
        error = process.stderr.read()
    assert "once more to exit at once" in error and "Traceback" not in error


def test_freed_pages_are_kept_on_glibc():
    assert keep_freed_pages() == (platform.libc_ver()[0] == "glibc")
