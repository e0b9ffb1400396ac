"""The soak test's verdict; tests/soak.py is the test itself, of many minutes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest
from soak import Sample, files_left, sample, slope, verdict


def samples(growth: float, leaked: int = 0, minutes: int = 4) -> list[Sample]:
    """Noisy memory that grows by `growth` MB a minute after half a minute of warming up."""
    chooser = random.Random(0)
    result = []
    for second in range(60 * minutes):
        rss = 500 + 8 * min(second, 30) + growth * second / 60 + chooser.gauss(0, 2)
        files = 9 + chooser.choice((0, 0, 1)) + leaked * second // (60 * minutes)
        result.append(Sample(float(second), rss, files))
    return result


@pytest.mark.parametrize("growth, accepted", [(0.0, True), (0.5, True), (1.5, False), (9.0, False)])
def test_memory(growth: float, accepted: bool, capsys):
    assert verdict(samples(growth), 4) == accepted
    assert slope(samples(growth)[60:]) == pytest.approx(growth, abs=0.5)
    assert "MB per minute" in capsys.readouterr().out


@pytest.mark.parametrize("leaked, accepted", [(0, True), (3, False), (40, False)])
def test_files(leaked: int, accepted: bool):
    assert verdict(samples(0.0, leaked), 4) == accepted
    assert (files_left(samples(0.0, leaked)[60:]) == 0) == accepted


def test_too_short_a_soak_proves_nothing():
    with pytest.raises(SystemExit, match="too short"):
        verdict(samples(0.0)[:35], 0.5)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_process_is_read():
    command = [sys.executable, "-c", "x = b'x' * 50_000_000; f = open('/dev/null'); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while (taken := sample(process.pid, 0.0)).rss < 50 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        assert taken.rss >= 50 and sample(process.pid, 0.0).files >= 4
        process.communicate(b"\n")
