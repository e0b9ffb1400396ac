"""``python -m softcl.export``: other programs load what it writes, and get the same features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

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


def features(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("arch, size", [("resnet18", 96), ("vit_tiny", 96), ("vit_tiny", 32)])
def test_timm_loads_it(tmp_path: Path, capsys, arch: str, size: int):
    import timm
    from safetensors import safe_open

    path, images, expected = write_run(tmp_path, arch, size)
    file = tmp_path / "model.safetensors"
    assert main([str(path), str(file)]) == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("load       ")
    model = eval(line, {"timm": timm})  # the printed line is the documentation
    assert torch.equal(features(model, images), expected)
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    assert metadata["arch"] == arch and metadata["image_size"] == str(size)
    assert metadata["mean"] == "[0.5, 0.5, 0.5]" and metadata["step"] == "7"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_loads_it(tmp_path: Path, suffix: str):
    import torchvision
    from safetensors.torch import load_file

    path, images, expected = write_run(tmp_path, "resnet18", 96)
    file = tmp_path / f"model{suffix}"
    assert main([str(tmp_path), str(file), "--format", "torchvision"]) == 0
    weights = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    model.fc = nn.Identity()
    torch.testing.assert_close(features(model, images), expected, rtol=1e-5, atol=1e-5)


def test_a_small_stem_is_said_and_can_be_built(tmp_path: Path, capsys):
    import safetensors.torch

    import softcl.nn

    path, images, expected = write_run(tmp_path, "resnet_tiny", 32)
    assert main([str(path), str(tmp_path / "a.safetensors")]) == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("load       ")
    assert "# 3x3 stride 2 stem, no max-pool" in line
    builder, _, weights = line.partition(".load_state_dict(")
    names = {"softcl": softcl, "safetensors": safetensors}
    model = eval(builder, names)
    model.load_state_dict(eval(weights.partition("  #")[0].removesuffix(")"), names))
    assert torch.equal(features(model, images), expected)


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
