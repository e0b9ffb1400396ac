"""bench/downstream.py: its table, from small sets, and that a second call goes on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from softcl import detect
from softcl.detection.scenes import write_scenes

pytest.importorskip("pycocotools")
SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "downstream.py"


def test_the_table_and_a_second_call(
    whole: Path, folder, tmp_path, monkeypatch, capsys, one_thread
):
    spec = importlib.util.spec_from_file_location("downstream", SCRIPT)
    downstream = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(downstream)
    write_scenes(tmp_path / "scenes", train=8, test=2)
    for name, value in {"image_size": 64, "channels": 16, "regions": 8, "batch_size": 4}.items():
        monkeypatch.setitem(detect.USUAL, name, value)
    monkeypatch.setattr(downstream.finetune, "STEPS", 4)
    line = [str(whole), "--data", str(folder), "--labels", "50%", "--seeds", "2", "--epochs", "1"]
    line += ["--scenes", str(tmp_path / "scenes"), "--out", str(tmp_path / "out")]
    downstream.main(line)
    table = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| ")]
    assert [row.split("|")[1].strip() for row in table] == [
        "", "top-1, 50% of the labels", "AP, boxes", "AP, masks"
    ]  # fmt: skip
    assert all(row.count("±") == 2 for row in table[1:])
    downstream.main(line)
    shown = capsys.readouterr().out
    assert "epoch" not in shown and [x for x in shown.splitlines() if x.startswith("| ")] == table
