"""Weights from elsewhere: whose keys are understood, what is fitted, counted and refused."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softcl.nn import build_backbone
from softcl.nn.weights import WeightsError
from softcl.train.weights import load_pretrained, read_weights

Tensors = dict[str, Tensor]


@functools.cache
def resnet18() -> Tensors:
    """torchvision's keys, with a classifier; every value differs from a fresh network's."""
    import torchvision

    return {key: value + 1 for key, value in torchvision.models.resnet18().state_dict().items()}


def vit_tiny() -> Tensors:
    return {key: value + 1 for key, value in build_backbone("vit_tiny", 224).state_dict().items()}


def behind(prefix: str, tensors: Tensors, change: float = 0.0) -> Tensors:
    return {prefix + key: value + change for key, value in tensors.items()}


def numbered(tensors: Tensors) -> Tensors:
    """The names in nn.Sequential(*list(resnet.children())[:-1])."""
    names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    parts = ((key.partition("."), value) for key, value in tensors.items())
    return {f"{names.index(k[0])}.{k[2]}": v for k, v in parts if k[0] in names}


def without_classifier(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if not key.startswith("fc.")}


LAYOUTS = {
    "torchvision": lambda t: t,
    "MoCo": lambda t: {
        "epoch": 7,
        "state_dict": behind("module.encoder_k.", t, 1)
        | behind("module.encoder_q.", without_classifier(t))
        | {"module.encoder_q.fc.0.weight": torch.zeros(3, 3), "module.queue": torch.zeros(3, 4)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{}]},
    },
    "MoCo v3": lambda t: {
        "state_dict": behind("module.momentum_encoder.", t, 1) | behind("module.base_encoder.", t)
    },
    "DINO": lambda t: {
        "student": behind("module.backbone.", t, 1),
        "teacher": behind("backbone.", t) | {"head.mlp.0.weight": torch.zeros(3)},
        "args": argparse.Namespace(arch="x"),
    },
    "solo-learn": lambda t: {
        "state_dict": behind("momentum_backbone.", t, 1) | behind("backbone.", t)
    },
    "lightly": lambda t: {
        "state_dict": behind("backbone_momentum.", numbered(t), 1)
        | behind("backbone.", numbered(t))
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_keys_of_other_programs_are_found(tmp_path: Path, layout: str):
    file, tensors = tmp_path / "weights.pth", resnet18()
    torch.save(LAYOUTS[layout](tensors), file)
    found = load_pretrained(str(file), 96)
    assert found.arch == "resnet18" and found.missing == () and found.used == 120
    for key, value in found.backbone.state_dict().items():
        assert torch.equal(value, tensors[key]), key
    unused = {"torchvision": 2, "MoCo": 124, "MoCo v3": 124, "DINO": 3, "solo-learn": 124}
    assert len(found.unused) == unused.get(layout, 120)
    text = "\n".join(found.describe())
    assert "120 keys used" in text and f"not used   {len(found.unused)}: " in text


def test_a_vision_transformer_is_found_and_resampled_by_timm(tmp_path: Path):
    file, tensors = tmp_path / "vit.pth", vit_tiny()
    torch.save(LAYOUTS["DINO"](tensors), file)
    found = load_pretrained(str(file), 224)
    assert found.arch == "vit_tiny" and found.changed == () and len(found.unused) == 1
    assert torch.equal(found.backbone.pos_embed, tensors["pos_embed"])
    small = load_pretrained(str(file), 32)
    assert small.backbone.pos_embed.shape == (1, 65, 192) and small.missing == ()
    assert "pos_embed resampled from 197 to 65" in "\n".join(small.describe())
    assert small.backbone(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_a_stem_is_cut_at_its_centre_and_never_enlarged(tmp_path: Path):
    large, small = tmp_path / "large.safetensors", tmp_path / "small.safetensors"
    tensors = without_classifier(resnet18())
    save_file(tensors, large)
    found = load_pretrained(str(large), 32)
    stem = found.backbone.conv1.weight
    assert torch.equal(stem, tensors["conv1.weight"][:, :, 2:5, 2:5])
    assert found.changed == ("7x7 stem cut to the 3x3 at its centre, for 32 px images",)
    save_file(found.backbone.state_dict(), small)
    with pytest.raises(WeightsError, match=r": has a 3x3 stem, and at 96 px .*7x7"):
        load_pretrained(str(small), 96)


def test_the_normalisation_follows_the_weights(tmp_path: Path):
    tensors = without_classifier(resnet18())
    metadata = {"arch": "resnet18", "image_size": "40", "mean": "[0.5, 0.4, 0.3]", "std": "[1,2,3]"}
    save_file(tensors, tmp_path / "own.safetensors", metadata)
    found = load_pretrained(str(tmp_path / "own.safetensors"))
    assert (found.mean, found.std, found.image_size) == ((0.5, 0.4, 0.3), (1.0, 2.0, 3.0), 40)
    # timm's and the Hub's: a folder with config.json.
    save_file(tensors, tmp_path / "model.safetensors")
    plain = read_weights(str(tmp_path))
    assert plain.mean == (0.485, 0.456, 0.406) and "name none" in plain.normalisation
    stored = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "input_size": [3, 48, 48]}
    config = {"architecture": "resnet18", "pretrained_cfg": stored}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_weights(str(tmp_path))
    assert (found.arch, found.mean, found.image_size) == ("resnet18", (0.1, 0.2, 0.3), 48)


@pytest.mark.parametrize("size", [32, 96])
def test_our_own_backbone_is_recognised(tmp_path: Path, size: int):
    tensors = build_backbone("resnet_tiny", size).state_dict()
    torch.save(tensors, tmp_path / "a.pth")
    found = load_pretrained(str(tmp_path / "a.pth"), size)
    assert found.arch == "resnet_tiny" and found.missing == found.unused == ()


def test_missing_keys_are_named(tmp_path: Path):
    tensors = {k: v for k, v in resnet18().items() if k != "bn1.bias" and "num_batches" not in k}
    torch.save(tensors, tmp_path / "a.pth")
    found = load_pretrained(str(tmp_path / "a.pth"), 96, "resnet18")
    assert "bn1.bias" in found.missing and len(found.missing) == 21
    assert "not found  21, at their random start: bn1.bias, " in "\n".join(found.describe())


def test_another_architecture_is_refused_with_keys_and_likely_name(tmp_path: Path):
    deeper = build_backbone("resnet34", 96).state_dict()
    torch.save(resnet18(), tmp_path / "a.pth")
    torch.save(deeper, tmp_path / "b.pth")
    torch.save({"query.weight": torch.zeros(4, 4)}, tmp_path / "c.pth")
    for file, arch, message in (
        ("a.pth", "resnet34", r"not the weights of resnet34: layer1.2.conv1.weight \(missing\)"),
        ("a.pth", "resnet50", r"layer1.0.conv1.weight \(64, 64, 3, 3\), .*look like resnet18's"),
        ("b.pth", "resnet18", r"resnet18: layer1.2.conv1.weight .*; they look like resnet34's"),
        ("a.pth", "vit_tiny", r"not the weights of vit_tiny: .*; they look like resnet18's"),
        ("c.pth", "resnet18", r"not the weights of resnet18: conv1.weight \(missing\)"),
        ("c.pth", None, r"of no known architecture \(keys query.weight\); name --arch"),
        ("a.pth", "resnet19", "unknown backbone 'resnet19'; did you mean 'resnet1"),
    ):
        with pytest.raises(WeightsError, match=message) as refusal:
            load_pretrained(str(tmp_path / file), 96, arch)
        assert "\n" not in str(refusal.value)


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_files_that_are_no_weights_are_refused_and_nothing_is_run(tmp_path: Path):
    torch.save(
        {"conv1.weight": torch.zeros(3), "x": RunsCode(tmp_path / "ran")}, tmp_path / "a.pth"
    )
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    (tmp_path / "c.pth").write_text("<html>")
    (tmp_path / "d.safetensors").write_bytes(b"\xff" * 20)
    torch.save(resnet18(), tmp_path / "e.pth")
    (tmp_path / "e.pth").write_bytes((tmp_path / "e.pth").read_bytes()[:1_000_000])
    for name, message in (
        ("a.pth", r"refused: its pickle runs code \(.*\); save its state_dict alone"),
        ("b.pth", "holds no tensors by name"),
        ("c.pth", "no file of weights"),
        ("d.safetensors", "not a whole safetensors file"),
        ("e.pth", "no file of weights"),
        ("f.pth", "cannot read: No such file"),
        (".", "cannot read: No such file"),
    ):
        with pytest.raises(WeightsError, match=message) as refusal:
            read_weights(str(tmp_path / name))
        assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)
    assert not (tmp_path / "ran").exists()


def test_timms_weights_come_by_its_own_loading(tmp_path: Path, monkeypatch):
    """From the cache of the Hub's client, in whose layout the test writes a file."""
    import huggingface_hub.constants as hub
    import timm

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="timm:resnet18.a1_in1k: cannot be downloaded, and"):
        load_pretrained("timm:resnet18.a1_in1k")
    with pytest.raises(WeightsError, match=r"timm:resnet18.a9: cannot be loaded: Invalid .* tag"):
        load_pretrained("timm:resnet18.a9")
    with pytest.raises(WeightsError, match=r"timm:resnet19: cannot be loaded: Unknown model"):
        load_pretrained("timm:resnet19")
    cached = tmp_path / "models--timm--resnet18.a1_in1k"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(resnet18(), snapshot / "model.safetensors")
    found = load_pretrained("timm:resnet18.a1_in1k", 32)
    assert (found.arch, found.used) == ("resnet18.a1_in1k", 120)
    config = timm.get_pretrained_cfg("resnet18.a1_in1k")
    assert (found.mean, found.std) == (tuple(config.mean), tuple(config.std))
    assert isinstance(found.backbone.maxpool, nn.Identity)


def test_a_run_and_its_export_are_the_same_weights(whole: Path, tmp_path: Path):
    from softcl.export import main as export

    run = load_pretrained(str(whole))
    assert (run.arch, run.image_size, run.unused) == ("resnet_tiny", 16, ())
    file = tmp_path / "model.safetensors"
    assert export([str(whole), str(file)]) == 0
    exported = load_pretrained(str(file))
    for name in ("arch", "image_size", "mean", "std", "missing", "unused"):
        assert getattr(exported, name) == getattr(run, name), name
    for key, value in run.backbone.state_dict().items():
        assert torch.equal(exported.backbone.state_dict()[key], value)
    teacher = load_pretrained(str(whole / "last.pt"), network="teacher").backbone
    assert not torch.equal(teacher.conv1.weight, run.backbone.conv1.weight)
