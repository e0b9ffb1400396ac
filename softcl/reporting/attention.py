"""Where vision transformers look: the attention of the class token, over the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcl.data import center_view
from softcl.reporting.figures import Figure
from softcl.reporting.samples import Sets
from softcl.reporting.tiles import SIDE, table_of, tile
from softcl.train.checkpoint import Stored

IMAGES, HEADS = 6, 6  # that are shown
_STRENGTH = 0.65  # of the colours over the image


def has_class_token(backbone: nn.Module) -> bool:
    """Whether it is one of timm's plain vision transformers with a class token."""
    blocks = getattr(backbone, "blocks", None)
    if getattr(backbone, "cls_token", None) is None or not isinstance(blocks, nn.Sequential):
        return False
    attention = getattr(blocks[-1], "attn", None)
    return hasattr(attention, "fused_attn") and hasattr(attention, "attn_drop")


@torch.no_grad()
def class_attention(backbone: nn.Module, views: Tensor) -> Tensor:
    """Attention of the class token in the last block: views (N, 3, S, S) -> (N, heads, h, w).

    Each head's sums to 1 over the patches and the other tokens before them.
    """
    attention = backbone.blocks[-1].attn
    kept: list[Tensor] = []
    handle = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    fused, attention.fused_attn = attention.fused_attn, False  # which never has the weights
    try:
        backbone(views)
    finally:
        attention.fused_attn = fused
        handle.remove()
    (weights,) = kept  # (N, heads, tokens, tokens)
    patches = weights[:, :, 0, backbone.num_prefix_tokens :]
    return patches.unflatten(-1, backbone.patch_embed.grid_size)


def draw_attention(stored: Stored, sets: Sets, device: torch.device) -> Figure:
    """Images, the mean over the heads, and each of the first heads."""
    size, images = stored.config.image_size, sets.test
    count = min(IMAGES, len(images))
    indices = torch.arange(count) * len(images) // count
    batch = images.batch(indices).to(device)
    found = class_attention(
        stored.backbone.to(device), center_view(batch, size, images.mean, images.std)
    )
    heads = min(found.shape[1], HEADS)
    maps = torch.cat([found.mean(1, keepdim=True), found[:, :heads]], dim=1).cpu()
    seen = center_view(batch, size, (0.0,) * 3, (1.0,) * 3).cpu()  # in [0, 1]
    rows = []
    for image, lines in zip(seen, maps, strict=True):
        side = max(size, SIDE)
        large = F.interpolate(image[None], size=(side, side), mode="nearest")[0]
        cells = [tile(_pixels(large), "image")]
        cells += [tile(_overlaid(large, line)) for line in lines]
        rows.append(cells)
    names = ["image", "mean of heads", *(f"head {number + 1}" for number in range(heads))]
    caption = (
        "How much the class token attends to each patch in the last block, on test images; each "
        "map from its least (dark) to its most (bright)."
    )
    if heads < found.shape[1]:
        caption += f" The first {heads} of {found.shape[1]} heads."
    return Figure("attention", "Attention of the class token", caption, [table_of(rows, names)])


def _overlaid(image: Tensor, weights: Tensor) -> Tensor:
    """Colours of the weights (h, w) over a grey image (3, S, S) in [0, 1]."""
    import matplotlib

    low, high = weights.min(), weights.max()
    scaled = (weights - low) / (high - low).clamp(min=1e-12)
    scaled = F.interpolate(scaled[None, None], size=image.shape[-2:], mode="nearest")[0, 0]
    paint = torch.from_numpy(matplotlib.colormaps["inferno"](scaled.numpy())[..., :3]).float()
    gray = image.mean(0, keepdim=True)
    return _pixels(_STRENGTH * paint.permute(2, 0, 1) + (1 - _STRENGTH) * gray)


def _pixels(image: Tensor) -> Tensor:
    return (image * 255 + 0.5).clamp(0, 255).to(torch.uint8)
