"""Colour operations on batches, one parameter per sample, on pixels in [0, 1].

Layout (N, H, 3, W), as in `softcl.data.resample`. The formulas are those of torchvision's
ColorJitter on floating images, with Pillow's grey 0.299 R + 0.587 G + 0.114 B (torchvision has
0.2989 for red). Nothing is rounded to uint8 between operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The operations that blend with a reference image; the fourth of a jitter is the hue.
BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2


def gray(images: torch.Tensor) -> torch.Tensor:
    """Grey value of each pixel: (N, H, 3, W) -> (N, H, 1, W)."""
    result = images[:, :, 0:1] * 0.299
    result.add_(images[:, :, 1:2], alpha=0.587)
    return result.add_(images[:, :, 2:3], alpha=0.114)


def blend(images: torch.Tensor, kind: torch.Tensor, factor: torch.Tensor) -> None:
    """images <- clamp(factor images + (1 - factor) reference, 0, 1), in place.

    kind (N,) chooses the reference: black (BRIGHTNESS), the mean of the image's grey (CONTRAST) or
    the pixel's own grey (SATURATION); factor (N,) float32.
    """
    shape = (-1, 1, 1, 1)
    reference = gray(images)
    mean = reference.mean(dim=(1, 3), keepdim=True)
    remainder = 1.0 - factor
    reference.mul_((remainder * (kind == SATURATION)).view(shape))
    reference.add_(mean.mul_((remainder * (kind == CONTRAST)).view(shape)))
    images.mul_(factor.view(shape)).add_(reference).clamp_(0.0, 1.0)


def shift_hue(images: torch.Tensor, shift: torch.Tensor) -> None:
    """Turn the hue by `shift` (N,), in turns, at constant HSV saturation and value, in place.

    With M and m the largest and smallest channel and h in [0, 6) the hue, the channel that peaks at
    hue p (red 0, green 2, blue 4) is m + (M - m) clamp(2 - |h - p|, 0, 1), |.| on the circle.
    """
    red, green, blue = images[:, :, 0], images[:, :, 1], images[:, :, 2]
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    spread = largest - smallest
    is_red = largest == red
    is_green = largest == green
    hue = torch.where(is_green, blue - red, red - green)
    hue = torch.where(is_red, green - blue, hue)
    hue.div_(spread.clamp(min=1e-12))  # a grey pixel has spread 0 and any hue
    offset = torch.where(is_green, 2.0, 4.0).masked_fill_(is_red, 0.0)
    hue.add_(offset).add_(6.0 * shift[:, None, None])
    peaks = torch.arange(0.0, 6.0, 2.0, device=images.device)
    distance = hue[:, :, None] - peaks[:, None]  # (N, H, 3, W)
    distance.sub_(torch.round(distance / 6.0), alpha=6.0)
    weight = distance.abs_().neg_().add_(2.0).clamp_(0.0, 1.0)
    torch.addcmul(smallest[:, :, None], weight, spread[:, :, None], out=images)


@dataclass(frozen=True)
class Jitter:
    """Parameters of a colour jitter of n samples, each with its own order of the four operations.

    kinds (n, 3) int64: brightness, contrast and saturation in the order they come
    factors (n, 3):     theirs, in that order
    hue (n,):           in turns
    hue_slot (n,):      int64 in 0..3, how many of the three come before the hue
    counts:             for slots 0, 1, 2 how many samples have hue_slot <= slot, the samples then
                        being sorted by hue_slot; or None
    """

    kinds: torch.Tensor
    factors: torch.Tensor
    hue: torch.Tensor
    hue_slot: torch.Tensor
    counts: tuple[int, int, int] | None = None


def jitter(images: torch.Tensor, parameters: Jitter) -> None:
    """Apply `parameters` to images (n, H, 3, W) in place.

    With counts, each operation runs on exactly the samples that need it. Without them (on a GPU
    they would cost a synchronisation) each runs on all, with factor 1 where it comes on the hue's
    other side.
    """
    p = parameters
    for slot in range(3):
        _blend_slot(images, p, slot, before_hue=True)
    shift_hue(images, p.hue)
    for slot in range(3):
        _blend_slot(images, p, slot, before_hue=False)


def _blend_slot(images: torch.Tensor, p: Jitter, slot: int, *, before_hue: bool) -> None:
    """The operation `slot` of the samples where it comes before (or after) the hue."""
    if p.counts is None:
        concerned = (p.hue_slot > slot) == before_hue
        blend(images, p.kinds[:, slot], torch.where(concerned, p.factors[:, slot], 1.0))
    else:
        count = p.counts[slot]
        part = slice(count, None) if before_hue else slice(0, count)
        blend(images[part], p.kinds[part, slot], p.factors[part, slot])


def solarize(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Images with every value from 128 / 255 up inverted, where chosen (N,); Pillow's threshold."""
    inverted = torch.where(images < 128 / 255, images, 1.0 - images)
    return torch.where(chosen.view(-1, 1, 1, 1), inverted, images)
