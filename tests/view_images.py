"""Images for the tests of the views' kernels."""

from __future__ import annotations

import torch


def noise(number: int, height: int, width: int, seed: int = 9) -> torch.Tensor:
    """Half noise, half smooth, with grey and saturated parts."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (number, 3, height, width), generator=generator)
    coarse = torch.rand((number, 3, 3, 3), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images[::2] = (smooth * 300 - 20).clamp(0, 255).long()[::2]
    images[:, :, : height // 3] = images[:, :1, : height // 3]
    images[1::4, :, :, -1:] = 255
    return images.to(torch.uint8)
