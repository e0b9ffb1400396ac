"""Backbones: timm models without their classifier, fitted to the size of the images.

ResNets get the stem of ASCL's small-data experiments (arXiv 2207.11163, released code), which is
the usual one for CIFAR:

    image size      first convolution             max-pool
    <= 32           3x3, stride 1, padding 1      removed
    33 .. 64        3x3, stride 1, padding 1      kept           (STL-10 and Tiny-ImageNet at 64)
    > 64            as timm defines it            kept

That 3x3 convolution starts as PyTorch makes it (uniform, of standard deviation 0.111), which ASCL's
code, MoCo's notebook, SCE's code and the MNN bench leave as it is; all others start as timm's do.

``resnet_tiny``, for CPUs, is timm's ResNet class with one BasicBlock in each of four stages of 24,
48, 96 and 192 channels. Its 3x3 convolution has stride 2: a training step at 32 px then costs half
of what 16, 32, 64 and 128 channels cost with stride 1.

``moco3_vit_small`` and ``moco3_vit_base`` are the vision transformers of MoCo v3 (Chen, Xie and He,
arXiv 2104.02057; released code), which SNCLR uses: timm's, with 12 heads each, fixed 2-D sin-cos
position embeddings (none for the class token), the patch embedding frozen at its random start, and
Xavier initialisation with query, key and value as three matrices. ``moco3_vit_tiny`` is the same of
192 features and 3 heads, for tests and CPUs; it has no counterpart there.

Models that need a fixed image size are built for ``image_size``. Vision transformers also get
smaller patches at 64 px and below: the largest divisor of image_size that is at most image_size //
7, which is 4 at 32 px and 8 at 64 px (64 patches each).
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from softcl.nn.arguments import as_int

SMALL_IMAGE = 64  # at most this: 3x3 stem, small patches
TINY_IMAGE = 32  # at most this: no max-pool after the stem either

# Short names of the plain vision transformers, whose timm names fix a patch and an image size.
ALIASES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
}
# MoCo v3's, made from timm's plain ones: name -> timm's name and the number of heads.
MOCO3_VITS = {
    "moco3_vit_tiny": ("vit_tiny_patch16_224", 3),
    "moco3_vit_small": ("vit_small_patch16_224", 12),
    "moco3_vit_base": ("vit_base_patch16_224", 12),
}
ALIASES |= {name: full for name, (full, _) in MOCO3_VITS.items()}
PATCH_MODULES = ("timm.models.vision_transformer", "timm.models.deit")  # take a patch_size
# timm's ResNet class with BasicBlocks, sized for CPUs.
OWN_RESNETS = {"resnet_tiny": {"layers": (1, 1, 1, 1), "channels": (24, 48, 96, 192)}}


def build_backbone(name: str, image_size: int) -> nn.Module:
    """Build a randomly initialised backbone: images (N, 3, image_size, image_size) -> (N, F).

    Args:
        name: any timm model name, "resnet_tiny" (a ResNet for CPUs), or "vit_tiny", "vit_small",
            "vit_base".
        image_size: height and width of the images, in pixels.

    Returns:
        A module with ``num_features`` (F) and ``stem_rule`` (str, what was changed for the image
        size). Residual branches start with batch-norm weight 1, as in torchvision's ResNets which
        ASCL uses, where timm's default is 0.

    Raises:
        ImportError: timm is not installed.
        TypeError: name is no string, or image_size no int.
        ValueError: the name is unknown, or the model cannot take images of this size.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    image_size = as_int("image_size", image_size, least=8)
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            'backbones need timm, which is not installed: pip install "softcl[train]"'
        ) from error
    if name in OWN_RESNETS:
        backbone, rule = _own_resnet(name), "as defined"
    else:
        options, rule = _options(name, image_size)
        try:
            backbone = timm.create_model(
                ALIASES.get(name, name), pretrained=False, num_classes=0, **options
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"{name!r} cannot take {image_size} px images: {error}") from error
    _check_patches(backbone, name, image_size)
    if isinstance(backbone, timm.models.resnet.ResNet):
        rule = _fit_resnet_stem(backbone, image_size, stride=2 if name in OWN_RESNETS else 1)
    if name in MOCO3_VITS:
        _make_moco3(backbone)
        rule += ", sin-cos positions, frozen patch embedding"
    backbone.num_features = _count_features(backbone, name, image_size)
    backbone.stem_rule = rule
    return backbone


def _options(name: str, image_size: int) -> tuple[dict[str, Any], str]:
    """Constructor arguments for a timm model at this image size, and the rule in words."""
    import timm

    full_name = ALIASES.get(name, name)
    architecture = full_name.split(".")[0]
    if not timm.is_model(architecture):
        known = [*OWN_RESNETS, *ALIASES, *timm.list_models()]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown backbone {name!r}{hint}")
    module = timm.models.model_entrypoint(architecture).__module__
    if module == "timm.models.resnet":
        return {"zero_init_last": False}, "as defined"
    config = timm.get_pretrained_cfg(full_name)
    if config is None or not config.fixed_input_size:
        return {}, "as defined"
    options: dict[str, Any] = {"img_size": image_size}
    if name in MOCO3_VITS:
        options["num_heads"] = MOCO3_VITS[name][1]
    rule = f"built for {image_size} px"
    if module in PATCH_MODULES and image_size <= SMALL_IMAGE:
        options["patch_size"] = _small_patch(name, image_size)
        rule += f", patches of {options['patch_size']} px"
    return options, rule


def _small_patch(name: str, image_size: int) -> int:
    for patch in range(image_size // 7, 1, -1):
        if image_size % patch == 0:
            return patch
    raise ValueError(f"no patch size for {name!r} divides image_size={image_size} evenly")


def _check_patches(backbone: nn.Module, name: str, image_size: int) -> None:
    """Refuse patches that do not cover the image: timm would drop the rest without a word."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and image_size % patch[0]:
        raise ValueError(
            f"{name!r} cannot take {image_size} px images: "
            f"its patches of {patch[0]} px do not divide them"
        )


def _make_moco3(vit: nn.Module) -> None:
    """Initialise a timm ViT as MoCo v3 does, and freeze what it freezes."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in vit.blocks:
        out, into = block.attn.qkv.weight.shape  # three matrices on top of each other
        bound = (6.0 / (out // 3 + into)) ** 0.5
        nn.init.uniform_(block.attn.qkv.weight, -bound, bound)
    projection = vit.patch_embed.proj
    bound = (6.0 / (projection.weight[0].numel() + projection.out_channels)) ** 0.5
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)
    nn.init.normal_(vit.cls_token, std=1e-6)
    positions = sincos_positions(*vit.patch_embed.grid_size, projection.out_channels)
    class_position = torch.zeros(vit.num_prefix_tokens, positions.shape[1])
    vit.pos_embed = nn.Parameter(torch.cat([class_position, positions])[None], requires_grad=False)


def sincos_positions(rows: int, columns: int, dim: int) -> torch.Tensor:
    """Fixed 2-D position embeddings (rows * columns, dim), rows outermost.

    A quarter each of sin and cos of the column and of the row times 10000^(-k / (dim / 4)).

    Raises:
        ValueError: dim is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4 for 2-D sin-cos positions, got {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    x, y = x.flatten()[:, None] * frequency, y.flatten()[:, None] * frequency
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).float()


def _own_resnet(name: str) -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    shape = OWN_RESNETS[name]
    return ResNet(
        BasicBlock,
        shape["layers"],
        channels=shape["channels"],
        # timm's plain stem always has 64 channels; the deep one has twice stem_width.
        stem_type="deep",
        stem_width=shape["channels"][0] // 2,
        num_classes=0,
        zero_init_last=False,
    )


def building_lines(
    backbone: nn.Module, name: str, image_size: int, library: str = "timm"
) -> tuple[list[str], list[str]]:
    """Python that builds the same network without softcl: imports, and what makes `model`.

    Args:
        backbone: what build_backbone(name, image_size) gave.
        library: "timm", or "torchvision" for its ResNets.
    """
    imports = [f"import {library}"]
    if library == "torchvision":
        lines = [f"model = torchvision.models.{name.split('.')[0]}()"]
        lines.append("model.fc = torch.nn.Identity()")
    elif name in OWN_RESNETS:
        shape = OWN_RESNETS[name]
        imports = ["from timm.models.resnet import BasicBlock, ResNet"]
        stem = f"stem_type='deep', stem_width={shape['channels'][0] // 2}"
        lines = [
            f"shape = dict(layers={shape['layers']}, channels={shape['channels']}, {stem})",
            "model = ResNet(BasicBlock, num_classes=0, **shape)",
        ]
    else:
        options, _ = _options(name, image_size)
        options.pop("zero_init_last", None)  # of random weights
        words = "".join(f", {key}={value!r}" for key, value in options.items())
        lines = [f"model = timm.create_model({ALIASES.get(name, name)!r}, num_classes=0{words})"]
    conv = getattr(backbone, "conv1", None)
    if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
        shape = f"3, {conv.out_channels}, 3, {conv.stride[0]}, padding=1, bias=False"
        lines.append(f"model.conv1 = torch.nn.Conv2d({shape})")
    if isinstance(getattr(backbone, "maxpool", None), nn.Identity):
        lines.append("model.maxpool = torch.nn.Identity()")
    if any("torch.nn" in line for line in lines):
        imports.append("import torch")
    return imports, lines


def _fit_resnet_stem(backbone: nn.Module, image_size: int, stride: int) -> str:
    """Give a timm ResNet the stem for its image size (see above); return the rule in words."""
    if image_size > SMALL_IMAGE:
        return "ImageNet stem"
    conv = nn.Conv2d(3, backbone.bn1.num_features, 3, stride, padding=1, bias=False)
    if stride == 2:  # our own, as timm's others; the released codes leave theirs at PyTorch's
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    backbone.conv1 = conv
    if image_size > TINY_IMAGE:
        return f"3x3 stride {stride} stem, max-pool kept"
    backbone.maxpool = nn.Identity()
    return f"3x3 stride {stride} stem, no max-pool"


def _count_features(backbone: nn.Module, name: str, image_size: int) -> int:
    """F, from one forward pass, so that a model that cannot take these images fails here."""
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"{name!r} cannot take {image_size} px images: {line}") from error
    finally:
        backbone.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise ValueError(f"{name!r} does not give one feature vector per image")
    return features.shape[1]
