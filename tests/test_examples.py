"""The examples: short, and they run (lightly's with stand-ins where lightly is not installed)."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_one_short_script(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) < 120 and lines[0].startswith('"""')
    assert 1 <= sum("# <-" in line for line in lines) <= 6


def test_the_plain_example_trains(tmp_path: Path):
    line = "--fake --size 8 --epochs 1 --batch-size 256 --workers 0"
    program = [sys.executable, str(EXAMPLES / "plain_pytorch.py"), *line.split()]
    done = subprocess.run(
        program,
        cwd=tmp_path,
        env={"PYTHONPATH": str(EXAMPLES.parent), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("epoch 1/1  loss ")
    assert "conv1.weight" in torch.load(tmp_path / "student.pt", weights_only=True)


def run_example(name: str, line: str, folder: Path) -> str:
    """What an example printed."""
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *line.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not installed("lightning"), reason="lightning is not installed")
def test_the_lightning_example_trains(tmp_path: Path):
    line = "--fake --size 16 --epochs 1 --batch-size 128 --workers 0"
    assert "loss " in run_example("lightning_ascl.py", line, tmp_path).splitlines()[-1]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert stored["queue.rows"].shape == (4096, 128)


@pytest.mark.skipif(not installed("datasets"), reason="datasets is not installed")
def test_the_hugging_face_example_trains(folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    example = runpy.run_path(str(EXAMPLES / "huggingface_datasets.py"))
    numbers = dict(epochs=1, batch_size=32, queue_size=64, num_splits=1, device="cpu", out="run")
    example["main"](str(folder / "train"), **numbers)
    shown = capsys.readouterr().out
    assert "<Dataset>: 128 images, 16x16, given" in shown and "4 classes" in shown
    assert "epoch 1: loss " in shown and "rows in run, k-NN " in shown and "None" not in shown


def test_the_plain_example_asks_for_images(monkeypatch, capsys):
    example = EXAMPLES / "plain_pytorch.py"
    monkeypatch.setattr(sys, "argv", [str(example)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(example), run_name="__main__")
    assert "name a folder of images, or --fake" in capsys.readouterr().err


def stand_in_for_lightly(monkeypatch) -> None:
    """The parts of lightly's public interface that the example uses, as its documentation says."""

    class LightlyDataset(torch.utils.data.Dataset):
        def __init__(self, input_dir, transform=None):
            self.transform = transform

        def __len__(self):
            return 512

        def __getitem__(self, index):
            return self.transform(torch.rand(3, 32, 32)), 0, f"{index}.jpg"

    class MoCoV2Transform:
        def __init__(self, input_size):
            self.size = input_size

        def __call__(self, image):
            return [image + 0.1 * torch.randn(3, self.size, self.size) for _ in range(2)]

    class MoCoProjectionHead(nn.Sequential):
        def __init__(self, input_dim, hidden_dim, output_dim):
            super().__init__(
                nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, output_dim)
            )

    @torch.no_grad()
    def update_momentum(model, model_ema, m):
        for slow, fast in zip(model_ema.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 1 - m)

    parts = {
        "lightly": {},
        "lightly.data": {"LightlyDataset": LightlyDataset},
        "lightly.models": {},
        "lightly.models.modules": {"MoCoProjectionHead": MoCoProjectionHead},
        "lightly.models.utils": {
            "deactivate_requires_grad": lambda model: model.requires_grad_(False),
            "update_momentum": update_momentum,
        },
        "lightly.transforms": {},
        "lightly.transforms.moco_transform": {"MoCoV2Transform": MoCoV2Transform},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.skipif(importlib.util.find_spec("lightly") is not None, reason="lightly is installed")
def test_the_lightly_example_with_stand_ins(monkeypatch, capsys):
    stand_in_for_lightly(monkeypatch)
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(
        torch.utils.data,
        "DataLoader",
        lambda *arguments, **options: loader(*arguments, **{**options, "num_workers": 0}),
    )
    example = runpy.run_path(str(EXAMPLES / "lightly_moco.py"))
    example["main"]("anywhere", epochs=1)
    assert capsys.readouterr().out.startswith("epoch  0  loss ")
