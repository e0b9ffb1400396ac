"""A short kill storm; tests/kill_storm.py is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_a_run_killed_three_times_ends_as_if_left_in_peace():
    script = Path(__file__).with_name("kill_storm.py")
    command = [sys.executable, str(script), "--kills", "3", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checkpoint whole") == 3 and "none yet" not in done.stdout
    assert done.stdout.endswith("equal to the last bit\n")
