"""Separable resampling of batches: every sample has its own matrices, applied with torch.bmm.

A batch is kept in the layout (N, H, 3, W), rows outermost, because a matrix on the rows is then
one product (S, H) x (H, 3 W) and a matrix on the columns one product (3 S, W) x (W, S) per
sample, with no copy between them.
"""

from __future__ import annotations

import torch


def crop_matrix(
    start: torch.Tensor,  # (N,) first row or column of the crop, float32 integers
    length: torch.Tensor,  # (N,) rows or columns in the crop, float32 integers
    mirror: torch.Tensor | None,  # (N,) bool, or None for no mirroring
    size: int,  # length of the result
    full: int,  # length of the image
) -> torch.Tensor:
    """Matrices (N, size, full) that crop, resize and mirror one axis.

    The resize is the bilinear one of Pillow, which widens the triangle filter when it shrinks
    (torchvision's antialias=True): with scale = length/size, width = max(scale, 1) and output i
    centred at start + (i + 1/2) scale, the weight of input j is max(0, 1 - |j + 1/2 - centre_i| /
    width) inside the crop, 0 outside, divided by the row's sum. Mirroring reverses the outputs.
    """
    device = start.device
    outputs = torch.arange(size, device=device, dtype=torch.float32) + 0.5
    if mirror is not None:
        outputs = torch.where(mirror[:, None], size - outputs, outputs)  # (N, size)
    scale = length / size
    centre = start[:, None] + outputs * scale[:, None]  # (N, size)
    inputs = torch.arange(full, device=device, dtype=torch.float32) + 0.5
    inverse_width = scale.clamp(min=1.0).reciprocal()
    weights = inputs - centre[..., None]  # (N, size, full)
    weights = weights.abs_().mul_(inverse_width[:, None, None]).neg_().add_(1.0).clamp_(min=0.0)
    inside = (inputs > start[:, None]) & (inputs < (start + length)[:, None])  # (N, full)
    weights.mul_(inside[:, None, :])
    return weights.div_(weights.sum(dim=2, keepdim=True))


def blur_matrix(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """Matrices (N, size, size) of Pillow's GaussianBlur(radius=sigma) along one axis, sigma (N,).

    Pillow approximates the Gaussian by three box filters of a fractional radius chosen to give
    the variance sigma^2 (Gwosdek et al., "Theoretical foundations of Gaussian convolution by
    extended box filtering", 2011), and continues the image past its border with the border's
    pixels. One box of radius r is B[i, j] = min(1, max(0, r + 1 - |i - j|)) / (2 r + 1); what
    falls outside is added to the first and the last column. The result is B^3. Pillow rounds to
    uint8 after each box; this does not.
    """
    variance = sigma.square() / 3.0
    whole = torch.floor((torch.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - (whole + 1).square()))
    radius = (whole + part)[:, None]  # (N, 1)
    index = torch.arange(size, device=sigma.device, dtype=torch.float32)
    distance = (index[:, None] - index[None, :]).abs()  # (size, size)
    box = (radius[..., None] + 1.0 - distance).clamp_(0.0, 1.0)  # (N, size, size)
    if size > 1:
        box[:, :, 0] = (radius + 1.0 - index).clamp(min=0.0)
        box[:, :, -1] = (radius + 1.0 - index.flip(0)).clamp(min=0.0)
        box /= 2.0 * radius[..., None] + 1.0
    else:
        box.fill_(1.0)
    return torch.bmm(torch.bmm(box, box), box)


def apply_rows_then_columns(
    images: torch.Tensor,  # (N, H, 3, W) float32
    rows: torch.Tensor,  # (N, S, H)
    columns: torch.Tensor,  # (N, T, W)
) -> torch.Tensor:
    """rows · image · columns^T for every sample and channel: (N, S, 3, T)."""
    number, height, channels, width = images.shape
    result = torch.bmm(rows, images.reshape(number, height, channels * width))
    result = result.view(number, rows.shape[1] * channels, width)
    result = torch.bmm(result, columns.transpose(1, 2))
    return result.view(number, rows.shape[1], channels, columns.shape[1])
