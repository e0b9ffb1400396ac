"""``--init``, ``--freeze`` and ``--layer-decay``: a run that starts from weights."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from softcl.methods import METHODS
from softcl.nn import build_backbone
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint
from softcl.train.config import TrainConfig
from softcl.train.optim import build_optimizer, freeze_parts
from softcl.train.parts import build_state


def test_a_run_starts_from_another_ones_backbone(whole: Path, flags: list[str], capsys):
    assert main([*flags, "--init", str(whole), "--max-steps", "1", "--out", "run"]) == 0
    text = capsys.readouterr().out
    assert f"weights    {whole / 'best.pt'}: 72 keys used; normalised as in its run" in text
    assert "normalised as the first weights" in text
    baselines = json.loads(Path("run/baselines.json").read_text())
    before = json.loads((whole / "baselines.json").read_text())
    # The same images, and the weights that the other run was judged by.
    assert baselines["pretrained"] == read_checkpoint(whole / "best.pt")["accuracy"]
    assert (baselines["pixels"], baselines["untrained"]) == (before["pixels"], before["untrained"])
    assert f"first weights {baselines['pretrained']:.1%}" in text
    record = json.loads(Path("run/config.json").read_text())
    assert record["weights"][0].startswith(f"{whole / 'best.pt'}: 72 keys used")


def test_the_first_step_has_these_weights(whole: Path, flags: list[str]):
    line = [*flags, "--init", str(whole), "--max-steps", "1", "--warmup-epochs", "1"]
    assert main([*line, "--out", "run"]) == 0  # whose learning rate is 0
    content, first = read_checkpoint(Path("run/last.pt")), read_checkpoint(whole / "best.pt")
    weight = "backbone.layer4.0.conv2.weight"
    assert torch.equal(content["student"][weight], first["student"][weight])
    assert torch.equal(content["teacher"][weight], first["student"][weight])


def test_it_goes_on_without_them_to_the_same_bits(whole: Path, flags: list[str], tmp_path: Path):
    other = tmp_path / "first"
    shutil.copytree(whole, other)
    line = [*flags, "--init", str(other), "--layer-decay", "0.5"]
    assert main([*line, "--out", "a"]) == 0
    assert main([*line, "--out", "b", "--max-steps", "3"]) == 0
    shutil.rmtree(other)
    assert main([*line, "--out", "b", "--resume", "auto"]) == 0
    found, expected = (read_checkpoint(Path(run) / "last.pt") for run in "ba")
    for network in ("student", "teacher"):
        for key, value in expected[network].items():
            assert torch.equal(found[network][key], value), key
    assert found["normalisation"] == expected["normalisation"]


def test_what_cannot_be_combined_or_loaded_is_one_line(whole: Path, flags: list[str], capsys):
    torch.save(build_backbone("resnet18", 16).state_dict(), "other.pth")
    for line, message, code in (
        (["--init", "other.pth", "--resume", str(whole)], "--init other.pth: cannot be comb", 2),
        ([*flags, "--init", "other.pth"], "--init other.pth: not the weights of resnet_tiny", 1),
        ([*flags, "--init", "nowhere.pth"], "--init nowhere.pth: cannot read: No such file", 1),
        ([*flags, "--freeze", "stem,layer9"], "has no part 'layer9'; it has stem, conv1, bn1,", 2),
        ([*flags, "--layer-decay", "1.5"], "--layer-decay 1.5: must be at most 1", 2),
    ):
        assert main(line) == code, line
        error = capsys.readouterr().err.splitlines()
        assert message in error[0] and len(error) == code, line


def test_the_architecture_follows_the_weights(flags: list[str], capsys):
    torch.save(build_backbone("resnet18", 16).state_dict(), "other.pth")
    arch = flags.index("--arch")
    assert main([*flags[:arch], *flags[arch + 2 :], "--init", "other.pth", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["arch"] == "resnet18"


def test_frozen_parts_stay_as_they_are(whole: Path, flags: list[str]):
    """Weights and running statistics, of student and teacher; the parts behind them learn."""
    line = [*flags, "--init", str(whole), "--freeze", "stem, layer1", "--out", "run"]
    assert main(line) == 0
    content, first = read_checkpoint(Path("run/last.pt")), read_checkpoint(whole / "best.pt")
    frozen = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")
    for network in ("student", "teacher"):
        for key, value in content[network].items():
            if key.startswith(frozen):
                assert torch.equal(value, first["student"][key]), key
            elif key.startswith("backbone."):
                assert not torch.equal(value, first["student"][key]), key


def test_parts_of_a_vision_transformer():
    vit = build_backbone("vit_tiny", 32)
    freeze_parts(vit, "stem,blocks.1")
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc1.bias"} <= frozen
    assert not [n for n in frozen if n.startswith(("blocks.0.", "blocks.10.", "norm"))]


def test_layers_learn_slower_from_the_top_down():
    config = TrainConfig.of(arch="vit_tiny", image_size=32, layer_decay=0.5, optimizer="adamw")
    config = config.changed(lr=0.1, weight_decay=0.3, decay_norms=False)
    method = METHODS["ascl"](queue_size=64, num_splits=1)
    state = build_state(config, method, torch.device("cpu"))
    names = {id(p): name for name, p in state.student.named_parameters()}
    scales, decays = {}, {}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in scales
            scales[names[id(parameter)]] = group.get("lr_scale", 1.0)
            decays[names[id(parameter)]] = group["weight_decay"]
    assert scales.keys() == set(names.values())
    assert scales["projector.0.weight"] == scales["projector.2.bias"] == 1.0
    ladder = [f"backbone.blocks.{block}.attn.qkv.weight" for block in range(12)]
    for below, above in zip(
        ["backbone.patch_embed.proj.weight", *ladder[:-1]], ladder, strict=True
    ):
        assert scales[below] == 0.5 * scales[above]
    assert scales["backbone.blocks.3.norm1.bias"] == scales[ladder[3]]
    assert decays["backbone.pos_embed"] == decays["backbone.blocks.3.norm1.bias"] == 0.0
    assert decays[ladder[3]] == decays["projector.0.weight"] == 0.3


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_layer_decay_goes_with_every_optimiser(optimizer: str):
    student = nn.Module()
    student.backbone = build_backbone("resnet_tiny", 16)
    student.projector = nn.Linear(192, 4)
    module = nn.ModuleDict({"student": student, "heads": nn.ModuleDict({"h": nn.Linear(4, 4)})})
    settings = dict(lr=0.1, weight_decay=0.3, momentum=0.9, layer_decay=0.5)
    groups = build_optimizer(module, optimizer, decay_norms=False, **settings).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    assert min(group.get("lr_scale", 1.0) for group in groups) < 0.2
    groups = build_optimizer(module, optimizer, decay_norms=True, **settings).param_groups
    assert all(group["weight_decay"] == 0.3 for group in groups)


def test_the_commands_of_the_readme_run(whole: Path, flags: list[str], tmp_path: Path):
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    section = text.partition("## Weights from elsewhere")[2].partition("\n`--init`")[0]
    torch.save(build_backbone("vit_tiny", 224).state_dict(), "vit.pth")
    torch.save(build_backbone("resnet_tiny", 16).state_dict(), "weights.pth")
    words = {"FOLDER": flags[1], "runs/NAME": str(whole), "timm:vit_tiny_patch16_224": "vit.pth"}
    short = [*flags[2 : flags.index("--arch")], "--max-steps", "1", "--device", "cpu"]
    lines = [line.split() for line in section.splitlines() if "python -m" in line]
    assert len(lines) == 4
    for place, (_, _, module, *line) in enumerate(lines):
        line = [words.get(word, word) for word in line]
        more = {"softcl.train": [*short, "--out", f"run{place}"], "softcl.export": []}
        main = importlib.import_module(module.replace("train", "train.__main__")).main
        assert main([*line, *more.get(module, ["--device", "cpu"])]) == 0, line
    assert {"features.npz", "model.safetensors", "README.md"} <= set(os.listdir(tmp_path))
