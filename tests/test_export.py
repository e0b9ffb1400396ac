"""``python -m softcl.export``: other programs load what it writes, and get the same features."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softcl.export import main
from softcl.nn import build_backbone
from softcl.train.checkpoint import write_checkpoint
from softcl.train.config import TrainConfig


def write_run(folder: Path, arch: str, size: int) -> tuple[Path, Tensor, Tensor]:
    """A checkpoint with random weights and statistics; images and the student's features."""
    torch.manual_seed(0)
    backbone = build_backbone(arch, size)
    for name, buffer in backbone.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    others = {name: value + 1 for name, value in weights.items()}
    config = TrainConfig(arch=arch, image_size=size).to_dict()
    normalisation = [[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]
    content = {"config": config, "student": weights, "teacher": others, "step": 7}
    path = folder / "last.pt"
    write_checkpoint(path, {**content, "normalisation": normalisation})
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        return path, images, backbone.eval()(images)


# What an exported file needs: the lines of its card, in a process that cannot import softcl.
LOADER = """
import os, re, sys
sys.modules["softcl"] = None
import torch
for folder in sys.argv[1:]:
    os.chdir(folder)
    lines = re.search("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[1]
    names = {}
    exec(lines, names)
    images, expected = torch.load("expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(names["model"](images), expected, rtol=1e-5, atol=1e-5)
    print("loaded", folder)
"""
EXPORTS = [
    ("resnet18", 48, "timm", "a.safetensors"),
    ("resnet_tiny", 32, "timm", "a.safetensors"),
    ("vit_tiny", 96, "timm", "a.safetensors"),
    ("moco3_vit_tiny", 32, "timm", "a.safetensors"),
    ("resnet18", 32, "torchvision", "a.pth"),
]
LONG_EXPORTS = [
    ("resnet18", 96, "timm", "a.safetensors"),
    ("resnet18", 32, "timm", "a.safetensors"),
    ("resnet_tiny", 96, "timm", "a.safetensors"),
    ("vit_tiny", 32, "timm", "a.safetensors"),
    ("convnext_atto", 64, "timm", "a.safetensors"),
    ("resnet18", 96, "torchvision", "a.safetensors"),
]


@pytest.mark.parametrize("exports", [EXPORTS, pytest.param(LONG_EXPORTS, marks=pytest.mark.long)])
def test_the_printed_lines_load_it_without_softcl(exports, tmp_path: Path, capsys):
    folders = []
    for place, (arch, size, kind, name) in enumerate(exports):
        folder = tmp_path / str(place)
        folder.mkdir()
        path, images, expected = write_run(folder, arch, size)
        torch.save((images, expected), folder / "expected.pt")
        assert main([str(path), str(folder / name), "--format", kind]) == 0
        printed = capsys.readouterr().out.partition("without softcl:\n\n")[2]
        card = (folder / "README.md").read_text()
        assert f"```python\n{printed.replace(str(folder / name), name)}```" in card
        folders.append(str(folder))
    command = [sys.executable, "-I", "-c", LOADER, *folders]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert loaded.stdout.split() == [word for folder in folders for word in ("loaded", folder)]


def test_the_file_says_what_it_is(tmp_path: Path):
    from safetensors import safe_open

    path, *_ = write_run(tmp_path, "resnet_tiny", 32)
    assert main([str(path), str(tmp_path / "model.safetensors")]) == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        metadata = stored.metadata()
    assert (metadata["arch"], metadata["image_size"]) == ("resnet_tiny", "32")
    assert metadata["mean"] == "[0.5, 0.5, 0.5]" and metadata["step"] == "7"


def test_the_card_is_the_hubs_and_replaces_no_other(tmp_path: Path, capsys):
    yaml = pytest.importorskip("yaml")
    path, *_ = write_run(tmp_path, "resnet_tiny", 32)
    own, other = tmp_path / "README.md", tmp_path / "b.safetensors.md"
    assert main([str(path), str(tmp_path / "a.safetensors")]) == 0
    _, head, text = own.read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["library_name"], head["pipeline_tag"]) == ("timm", "image-feature-extraction")
    assert "softcl" in head["tags"] and "| mean | [0.5, 0.5, 0.5] |" in text
    assert main([str(path), str(tmp_path / "b.safetensors")]) == 0
    assert "load_file('b.safetensors')" in own.read_text() and not other.exists()
    own.write_text("# My project")
    assert main([str(path), str(tmp_path / "b.safetensors")]) == 0
    assert own.read_text() == "# My project" and "load_file(" in other.read_text()
    assert f"card       {other}" in capsys.readouterr().out


def test_the_teacher_is_another_network(tmp_path: Path):
    from safetensors.torch import load_file

    path, *_ = write_run(tmp_path, "resnet_tiny", 32)
    files = [tmp_path / "student.safetensors", tmp_path / "teacher.safetensors"]
    assert main([str(path), str(files[0])]) == 0
    assert main([str(path), str(files[1]), "--network", "teacher"]) == 0
    student, teacher = map(load_file, files)
    assert torch.equal(student["conv1.weight"] + 1, teacher["conv1.weight"])


def test_onnx_runs_it(tmp_path: Path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path, images, expected = write_run(tmp_path, "resnet_tiny", 32)
    file = tmp_path / "model.onnx"
    assert main([str(path), str(file)]) == 0
    session = runtime.InferenceSession(str(file))
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["arch"], metadata["image_size"]) == ("resnet_tiny", "32")
    assert (metadata["mean"], metadata["std"]) == ("[0.5, 0.5, 0.5]", "[0.2, 0.2, 0.2]")
    card = (tmp_path / "README.md").read_text()
    assert "library_name: onnx" in card and "onnxruntime.InferenceSession('model.onnx')" in card
    for count in (1, 2):  # any batch size
        (found,) = session.run(["features"], {"images": images[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[:count], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_written_is_told_in_a_line(tmp_path: Path, monkeypatch, capsys):
    path, *_ = write_run(tmp_path, "resnet_tiny", 32)
    file = tmp_path / "x.pth"
    assert main([str(path), str(file), "--format", "torchvision"]) == 1
    assert "torchvision has no model 'resnet_tiny'" in capsys.readouterr().err
    monkeypatch.setattr("softcl.export.importlib.util.find_spec", lambda name: None)
    assert main([str(path), str(file), "--format", "onnx"]) == 1
    assert "needs onnx and onnxscript: pip install" in capsys.readouterr().err
    assert main([str(path)]) == 2 and main([str(path), str(file), "--format", "tf"]) == 2
    assert main(["nowhere.pt", str(file)]) == 1
    assert not file.exists()
