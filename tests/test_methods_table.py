"""The table of methods: its rows, its control, and that it goes on where it was stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softcl.data import ImageSet

pytest.importorskip("timm")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "methods_table.py"
FLAGS = "--data shapes:64 --eval-data shapes:64 --image-size 16 --epochs 1 --batch-size 16 "
FLAGS += "--queue-size 48 --projector-hidden 16 --projection-dim 8 --device cpu"


def load():
    spec = importlib.util.spec_from_file_location("methods_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_table(tmp_path: Path, *only: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--jobs", "2", "--out", "runs", "--only", *only,
         *FLAGS.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_rows_and_control(tmp_path: Path):
    control = load().CONTROLS[0]
    text = make_table(tmp_path, "moco", control)
    rows = [line for line in text.splitlines() if line.startswith("| moco")]
    result = json.loads((tmp_path / "runs/moco/result.json").read_text())
    assert rows and f"| moco | {result['knn_top1']:.1%} |" in rows[0] and "MiB" in rows[0]
    centred = json.loads((tmp_path / "runs/moco/centred.json").read_text())
    assert f"| {centred['trained']:.1%} | cpu |" in rows[0] or "reference" in rows[0]
    assert f"centred {centred['untrained']:.1%}" in text
    assert f"| {control} |" in text and "Untrained backbone" in text
    assert (tmp_path / "runs/table.md").read_text() in text + "\n"
    # A second call repeats nothing; an unfinished run is continued.
    before = (tmp_path / "runs/moco/last.pt").stat().st_mtime_ns
    (tmp_path / "runs/control--shuffled-pairs/result.json").unlink()
    assert make_table(tmp_path, "moco", control).count("| moco |") == 2
    assert (tmp_path / "runs/moco/last.pt").stat().st_mtime_ns == before


def test_every_method_has_a_row():
    from softcl.methods import METHODS

    table = load()
    named = {flags[1] for flags in table.ROWS.values()}
    # SEED has no place among methods that learn without another network.
    assert named == set(METHODS) - {"seed"}


def test_the_controls_pairs_do_not_belong_together(monkeypatch):
    from softcl.train import __main__ as train
    from softcl.train import parts

    pixels = (torch.arange(500) % 251).to(torch.uint8).view(500, 1, 1, 1).expand(-1, 3, 1, 1)
    images = ImageSet(pixels, None, [], (0.5,) * 3, (0.5,) * 3, "numbered")
    seen = {}
    monkeypatch.setattr(parts, "build_views", lambda *_: dict.fromkeys(("query", "key"), echo))
    monkeypatch.setattr(
        train, "main", lambda _: seen.update(parts.build_views(None, images, 0)) or 0
    )
    assert load().control("control: shuffled pairs", []) == 0
    batch, generator = images.batch(torch.arange(200)), torch.Generator().manual_seed(0)
    assert torch.equal(seen["query"](batch, None), batch)
    keys = seen["key"](batch, generator)
    assert keys.shape == batch.shape
    assert (keys == batch)[:, 0].float().mean() < 0.05
    # Of the whole set, and of others in the next step.
    assert len(keys[:, 0].unique()) > 100
    assert not torch.equal(keys, seen["key"](batch, generator))


def test_the_other_controls_keys_are_noise(monkeypatch):
    from softcl.train import __main__ as train
    from softcl.train import parts

    seen = {}
    monkeypatch.setattr(parts, "build_views", lambda *_: dict.fromkeys(("query", "key"), echo))
    monkeypatch.setattr(train, "main", lambda _: seen.update(parts.build_views(None, None, 8)) or 0)
    assert load().control(load().CONTROLS[1], []) == 0
    images, generator = torch.zeros(64, 3, 8, 8), torch.Generator().manual_seed(0)
    keys = seen["key"](images, generator)
    assert keys.shape == images.shape and abs(float(keys.std()) - 1) < 0.05
    assert not torch.equal(keys, seen["key"](images, generator))


def echo(batch, generator):
    return batch
