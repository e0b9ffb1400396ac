"""Features of whole images: what a backbone, or any other function, makes of a set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcl.data import ImageSet, center_view

PIECE = 512  # images per call

FeatureFunction = Callable[[Tensor], Tensor]  # float images (N, 3, S, S) -> (N, F)


def thinned(count: int, limit: int) -> Tensor:
    """Indices of at most `limit` of `count` images, evenly spaced (files are sorted by class)."""
    if count <= limit:
        return torch.arange(count)
    return torch.arange(limit) * count // limit


def sampled(count: int, limit: int) -> Tensor:
    """At most `limit` of `count` indices, ascending, drawn by a fixed seed.

    Evenly spaced ones would miss classes in a set whose classes come in turn.
    """
    if count <= limit:
        return torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:limit].sort().values


def central(images: Tensor, share: float) -> Tensor:
    """The centred squares of images (N, 3, H, W) whose side is a share of the shorter one's."""
    if share == 1.0:
        return images
    height, width = images.shape[-2:]
    side = max(round(min(height, width) * share), 1)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


@torch.no_grad()
def extract(
    images: ImageSet,
    indices: Tensor,
    features: FeatureFunction,
    size: int,
    device: torch.device,
    *,
    normalize: bool = True,
    store: torch.device | None = None,
    crop_share: float = 1.0,
) -> Tensor:
    """`features` of the images of `indices`, seen at `size` pixels.

    Args:
        crop_share: side of the centred square that is seen, as a share of the shorter side.
        normalize: make them unit rows.
        store: where they are kept; None for the device.

    Returns:
        (len(indices), F) float32.
    """
    pieces = []
    for part in indices.split(PIECE):
        batch = central(images.batch(part), crop_share).to(device)
        views = center_view(batch, size, images.mean, images.std)
        # Convolutions of a network in eval mode are 1.6 times as fast in this order on a CPU.
        views = views.contiguous(memory_format=torch.channels_last)
        rows = features(views).float()
        rows = F.normalize(rows, dim=1) if normalize else rows
        pieces.append(rows if store is None else rows.to(store))
    return torch.cat(pieces)


class eval_mode:
    """Context in which a module is in eval mode; every submodule's mode is restored after it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> nn.Module:
        self.modes = [(module, module.training) for module in self.module.modules()]
        return self.module.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self.modes:
            module.training = training
