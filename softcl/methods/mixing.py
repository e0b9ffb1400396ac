"""Two batches of images mixed at the pixels: CutMix and mixup."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cutmix(
    images: Tensor,  # (N, C, H, W)
    others: Tensor,  # (N, C, H, W)
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """Paste one box of ``others`` into ``images``; also the share of each image that is left.

    r is uniform in [0, 1] (Beta(1, 1)); the box has sides sqrt(1 - r) of the image's, its centre is
    uniform, and it is clipped at the border, after which r is its area's complement. One r and one
    box for the whole batch (CutMix, arXiv 1905.04899, as ReCo's code uses it).

    The generator is on the CPU.
    """
    height, width = images.shape[-2:]
    r, y, x = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    half_height = int(height * math.sqrt(1.0 - r)) // 2
    half_width = int(width * math.sqrt(1.0 - r)) // 2
    y, x = int(y * height), int(x * width)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)


def mixup(images: Tensor, others: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """``r images + (1 - r) others`` with one r, uniform in [0, 1], for the batch; also r."""
    r = float(torch.rand((), generator=generator, dtype=torch.float64))
    return torch.lerp(others, images, r), r


MIXES = {"cutmix": cutmix, "mixup": mixup}
