"""Colour operations on batches with one parameter per sample, in place, on pixels in [0, 1].

Layout (N, H, 3, W), as in `softcl.data.resample`. Formulas are those of torchvision's ColorJitter on
floating images, with Pillow's grey 0.299 R + 0.587 G + 0.114 B (torchvision has 0.2989 for red).
Nothing is rounded to uint8 between operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The operations that blend with a reference image; hue is the fourth, done apart.
BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2


def gray(images: torch.Tensor) -> torch.Tensor:
    """Grey value of each pixel: (N, H, 3, W) -> (N, H, 1, W)."""
    result = images[:, :, 0:1] * 0.299
    result.add_(images[:, :, 1:2], alpha=0.587)
    return result.add_(images[:, :, 2:3], alpha=0.114)


def blend(images: torch.Tensor, kind: torch.Tensor, factor: torch.Tensor) -> None:
    """images <- clamp(factor images + (1 - factor) reference, 0, 1), in place.

    kind (N,) chooses the reference: black (brightness), the mean of the image's grey (contrast), the
    pixel's grey (saturation); factor (N,).
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

    With M, m the largest and smallest channel and h in [0, 6) the hue, the channel that peaks at hue p
    (red 0, green 2, blue 4) is m + (M - m) clamp(2 - |h - p| on the circle, 0, 1).
    """
    red, green, blue = images[:, :, 0], images[:, :, 1], images[:, :, 2]
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    spread = largest - smallest
    is_red = largest == red
    is_green = largest == green
    hue = torch.where(is_green, blue - red, red - green)
    hue = torch.where(is_red, green - blue, hue)
    hue.div_(spread.clamp(min=1e-12))
    offset = torch.where(is_green, 2.0, 4.0)
    hue.add_(offset.masked_fill_(is_red, 0.0)).add_(6.0 * shift[:, None, None])
    peaks = torch.tensor([0.0, 2.0, 4.0], device=images.device).view(3, 1)
    distance = hue[:, :, None] - peaks  # (N, H, 3, W), in (-6, 7)
    distance.sub_(torch.round(distance / 6.0), alpha=6.0)
    weight = distance.abs_().neg_().add_(2.0).clamp_(0.0, 1.0)
    torch.addcmul(smallest[:, :, None], weight, spread[:, :, None], out=images)


@dataclass(frozen=True)
class Jitter:
    """Parameters of a colour jitter for n samples, each with its own order of the four operations.

    kinds (n, 3) are brightness, contrast and saturation in the order they come; factors (n, 3) theirs;
    hue (n,) in turns; hue_slot (n,) in 0..3 says how many of the three come before the hue shift.
    """

    kinds: torch.Tensor
    factors: torch.Tensor
    hue: torch.Tensor
    hue_slot: torch.Tensor
    before: tuple[int, int, int, int] | None = None

    def to(self, device: torch.device) -> Jitter:
        move = [
            t.to(device, non_blocking=True)
            for t in (self.kinds, self.factors, self.hue, self.hue_slot)
        ]
        return Jitter(*move, before=self.before)


def jitter(images: torch.Tensor, parameters: Jitter) -> None:
    """Apply `parameters` to images (n, H, 3, W) in place.

    Where the samples are sorted by hue_slot and `before[s]` counts those with hue_slot <= s, each
    operation runs on exactly the samples that need it. Without the counts (they would cost a
    synchronisation on a GPU) every step runs on all samples, with factor 1 where it has no effect.
    """
    p = parameters
    if p.before is not None:
        for slot in range(3):
            rest = slice(p.before[slot], None)
            blend(images[rest], p.kinds[rest, slot], p.factors[rest, slot])
        shift_hue(images, p.hue)
        for slot in range(3):
            rest = slice(0, p.before[slot])
            blend(images[rest], p.kinds[rest, slot], p.factors[rest, slot])
        return
    for slot in range(3):
        factor = torch.where(p.hue_slot > slot, p.factors[:, slot], 1.0)
        blend(images, p.kinds[:, slot], factor)
    shift_hue(images, p.hue)
    for slot in range(3):
        factor = torch.where(p.hue_slot <= slot, p.factors[:, slot], 1.0)
        blend(images, p.kinds[:, slot], factor)
