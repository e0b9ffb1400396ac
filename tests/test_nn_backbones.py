"""Backbones: stems and patches by image size, feature counts, errors, lazy import of timm."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("timm")

from softcl.nn import build_backbone, convert_split_batch_norm  # noqa: E402
from softcl.nn.backbones import sincos_positions  # noqa: E402


def features(backbone: nn.Module, image_size: int, N: int = 2) -> torch.Tensor:
    return backbone(torch.randn(N, 3, image_size, image_size))


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("image_size", "stride", "pool", "rule", "final"),
    [
        (32, 1, False, "3x3 stride 1 stem, no max-pool", 4),
        (24, 1, False, "3x3 stride 1 stem, no max-pool", 3),
        (33, 1, True, "3x3 stride 1 stem, max-pool kept", 3),
        (64, 1, True, "3x3 stride 1 stem, max-pool kept", 4),
        (65, 2, True, "ImageNet stem", 3),
        (96, 2, True, "ImageNet stem", 3),
    ],
)
def test_stem_of_resnet18(image_size, stride, pool, rule, final):
    backbone = build_backbone("resnet18", image_size)
    assert backbone.conv1.stride == (stride, stride)
    assert backbone.conv1.bias is None
    assert backbone.conv1.kernel_size == ((3, 3) if stride == 1 else (7, 7))
    assert backbone.conv1.padding == ((1, 1) if stride == 1 else (3, 3))
    assert isinstance(backbone.maxpool, nn.MaxPool2d) == pool
    assert backbone.stem_rule == rule
    assert backbone.num_features == 512
    maps = backbone.forward_features(torch.zeros(1, 3, image_size, image_size))
    assert maps.shape == (1, 512, final, final)
    assert features(backbone, image_size).shape == (2, 512)


def test_resnet18_has_the_size_and_the_start_of_the_usual_one():
    backbone = build_backbone("resnet18", 32)
    # torchvision's has 11,176,512 parameters without its classifier; the stem saves 7,680.
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 11_176_512 - 7_680
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() for norm in norms)
    # PyTorch's, as the released codes leave it: uniform with variance 1 / (3 * 27). The others, and
    # our own small one, Kaiming with fan out: variance 2 / (channels * 9).
    assert abs(backbone.conv1.weight.var() * 81 - 1) < 0.2
    assert abs(backbone.layer1[0].conv1.weight.var() * 64 * 9 / 2 - 1) < 0.2
    tiny = build_backbone("resnet_tiny", 32)
    assert abs(tiny.conv1.weight.var() * 24 * 9 / 2 - 1) < 0.3


def test_deep_stems_are_replaced_too():
    backbone = build_backbone("resnet18d", 32)
    assert isinstance(backbone.conv1, nn.Conv2d) and backbone.conv1.stride == (1, 1)
    assert features(backbone, 32).shape == (2, 512)


@pytest.mark.parametrize(
    ("image_size", "rule"),
    [
        (32, "3x3 stride 2 stem, no max-pool"),
        (64, "3x3 stride 2 stem, max-pool kept"),
        (96, "ImageNet stem"),
    ],
)
def test_resnet_tiny(image_size, rule):
    backbone = build_backbone("resnet_tiny", image_size)
    assert backbone.stem_rule == rule
    assert backbone.num_features == 192
    assert features(backbone, image_size).shape == (2, 192)
    if image_size == 32:
        # 9 million multiplications an image: what makes it fit for CPUs.
        with FlopCounterMode(display=False) as counter:
            backbone(torch.zeros(1, 3, image_size, image_size))
        assert counter.get_total_flops() == 2 * 9_013_248


@pytest.mark.parametrize(
    ("image_size", "patch", "tokens"),
    [(32, 4, 64), (64, 8, 64), (28, 4, 49), (48, 6, 64), (30, 3, 100)],
)
def test_patches_of_small_vision_transformers(image_size, patch, tokens):
    backbone = build_backbone("vit_tiny", image_size)
    assert backbone.patch_embed.patch_size == (patch, patch)
    assert backbone.patch_embed.num_patches == tokens
    assert backbone.stem_rule == f"built for {image_size} px, patches of {patch} px"
    assert backbone.num_features == 192
    assert features(backbone, image_size).shape == (2, 192)


def test_other_names_of_vision_transformers():
    for name in (
        "vit_tiny_patch16_224",
        "vit_tiny_patch16_224.augreg_in21k",
        "deit_tiny_patch16_224",
    ):
        assert build_backbone(name, 32).patch_embed.num_patches == 64


def test_large_vision_transformers_keep_their_patches():
    backbone = build_backbone("vit_tiny", 96)
    assert backbone.patch_embed.patch_size == (16, 16)
    assert backbone.stem_rule == "built for 96 px"
    assert build_backbone("vit_tiny_patch16_224", 96).patch_embed.num_patches == 36


@pytest.mark.parametrize(
    ("name", "image_size", "F"), [("mobilenetv3_small_050", 64, 1024), ("convnext_atto", 64, 320)]
)
def test_other_families_count_their_features(name, image_size, F):
    backbone = build_backbone(name, image_size)
    assert backbone.num_features == F == features(backbone, image_size).shape[1]
    assert backbone.stem_rule == "as defined"


@pytest.mark.parametrize("name", ["resnet_tiny", "vit_tiny"])
def test_initial_weights_follow_the_seed(name):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_backbone(name, 32).state_dict())
    same, again, other = states
    assert all(torch.equal(same[key], again[key]) for key in same)
    assert any(not torch.equal(same[key], other[key]) for key in same)


def test_building_does_not_touch_running_statistics():
    for name, tensor in build_backbone("resnet_tiny", 32).named_buffers():
        if name.endswith("num_batches_tracked"):
            assert tensor == 0
        if name.endswith("running_mean"):
            assert not tensor.any()
    assert build_backbone("resnet_tiny", 32).training


def test_a_backbone_trains_with_split_batch_norm():
    backbone = convert_split_batch_norm(build_backbone("resnet_tiny", 32), 2)
    features(backbone, 32, N=4).square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.num_splits == 2 for norm in norms)


@pytest.mark.parametrize(
    ("name", "guess"),
    [("resnet_18", "resnet18"), ("resnettiny", "resnet_tiny"), ("vit_tini", "vit_tiny")],
)
def test_an_unknown_name_gets_a_suggestion(name, guess):
    with pytest.raises(ValueError, match=f"unknown backbone '{name}'; did you mean '{guess}'"):
        build_backbone(name, 32)


@pytest.mark.parametrize(
    ("image_size", "error", "message"),
    [
        (0, ValueError, "image_size must be at least 8, got 0"),
        (7, ValueError, "image_size must be at least 8, got 7"),
        (32.0, TypeError, "image_size must be an int, got 32.0"),
        (True, TypeError, "image_size must be an int, got True"),
    ],
)
def test_wrong_image_size(image_size, error, message):
    with pytest.raises(error, match=message):
        build_backbone("resnet18", image_size)
    with pytest.raises(TypeError, match="name must be a string, got 18"):
        build_backbone(18, 32)


def test_images_a_model_cannot_take():
    with pytest.raises(ValueError, match="cannot take 100 px images: its patches of 16 px do not"):
        build_backbone("vit_tiny_patch16_224", 100)
    with pytest.raises(ValueError, match="no patch size for 'vit_tiny' divides image_size=31"):
        build_backbone("vit_tiny", 31)


def test_importing_the_networks_does_not_import_timm():
    result = run_python(
        "import softcl, softcl.nn, softcl.methods, sys; "
        "sys.exit(any(name in sys.modules for name in ('timm', 'torchvision')))"
    )
    assert result.returncode == 0, result.stderr


def test_without_timm_the_error_names_the_extra():
    result = run_python(
        "import sys; sys.modules['timm'] = None\n"
        "from softcl.nn import build_backbone\n"
        "build_backbone('resnet18', 32)"
    )
    assert "ImportError" in result.stderr.splitlines()[-1]
    assert "softcl[train]" in result.stderr.splitlines()[-1]


# ---- MoCo v3's vision transformers ----


@pytest.mark.parametrize(("name", "heads", "width"), [("tiny", 3, 192), ("small", 12, 384)])
def test_moco3_vit_is_frozen_where_it_should_be(name, heads, width):
    torch.manual_seed(0)
    backbone = build_backbone(f"moco3_vit_{name}", 32)
    assert backbone.num_features == width and len(backbone.blocks) == 12
    assert all(block.attn.num_heads == heads for block in backbone.blocks)
    assert "sin-cos positions, frozen patch embedding" in backbone.stem_rule
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    before = {n: p.clone() for n, p in backbone.named_parameters()}
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, weight_decay=0.1)
    features(backbone, 32).square().sum().backward()
    optimizer.step()
    changed = {n for n, p in backbone.named_parameters() if not torch.equal(p, before[n])}
    assert not changed & frozen and "blocks.0.attn.qkv.weight" in changed


def test_moco3_vit_positions_and_start():
    torch.manual_seed(0)
    backbone = build_backbone("moco3_vit_tiny", 32)
    positions = backbone.pos_embed[0]
    assert positions.shape == (65, 192) and not positions[0].any()
    grid = positions[1:].view(8, 8, 4, 48)
    row, column, k = 5, 3, 7
    frequency = 10000 ** (-k / 48)
    expected = [f(x * frequency) for x in (column, row) for f in (math.sin, math.cos)]
    assert grid[row, column, :, k].tolist() == pytest.approx(expected, abs=1e-6)
    # Bounds of the uniform starts: Xavier's for each of query, key and value, and for a patch.
    qkv = backbone.blocks[3].attn.qkv.weight
    assert float(qkv.detach().abs().max()) == pytest.approx((6 / (192 + 192)) ** 0.5, rel=1e-3)
    patch = backbone.patch_embed.proj.weight
    bound = (6 / (3 * 4 * 4 + 192)) ** 0.5
    assert float(patch.detach().abs().max()) == pytest.approx(bound, rel=1e-2)
    assert float(backbone.cls_token.detach().abs().max()) < 1e-4
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(2, 2, 6)


def test_moco3_vit_at_its_own_size():
    backbone = build_backbone("moco3_vit_small", 224)
    assert backbone.patch_embed.patch_size == (16, 16) and backbone.pos_embed.shape == (1, 197, 384)
    # 21.67 M as published for ViT-S without its classifier, positions included.
    assert sum(p.numel() for p in backbone.parameters()) == 21_665_664
