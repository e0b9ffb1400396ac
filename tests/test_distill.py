"""bench/distill.py: its student's cost, and its table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("timm")

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "distill.py"


def load():
    spec = importlib.util.spec_from_file_location("distill", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_every_run_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch, one_thread, capsys
):
    monkeypatch.chdir(tmp_path)
    line = f"--data {folder} --arch resnet_tiny --image-size 16 --teacher-epochs 1 --epochs 1 "
    line += "--batch-size 32 --queue-size 64 --out runs"
    distill = load()
    distill.main(line.split())
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert [row.split("|")[3].strip() for row in rows] == [
        "trained by", "ascl, 1 epochs", "untrained", "ascl, 1 epochs", "seed, 1 epochs"
    ]  # fmt: skip
    distill.main(line.split())
    shown = capsys.readouterr().out
    assert shown.count("finished, nothing to resume") == 3
    assert [row for row in shown.splitlines() if row.startswith("| ")] == rows


def test_the_student_costs_a_quarter():
    distill = load()
    small = distill.operations(distill.half_width(32), 32)
    large = distill.operations(distill.build_backbone("resnet18", 32), 32)
    assert 0.24 < small / large < 0.27
