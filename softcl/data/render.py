"""A view as PyTorch makes it from a table of parameters: the specification of the kernels.

Plain operations of fixed shapes, each on every sample, kept where the parameters say so. The
formulas are those of torchvision on floating images, with Pillow's grey 0.299 R + 0.587 G + 0.114 B
(torchvision has 0.2989 for red). Pixels stay floating point from the crop to the end, where the
originals round to uint8 after each operation.

Pixels are (N, H, 3, W), rows outermost: a matrix on the rows is then one product (S, H) x (H, 3 W)
and a matrix on the columns one product (3 S, W) x (W, S) per sample, with no copy between them.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from softcl.data.image_set import Triple
from softcl.data.recipe import Parameters, slots

BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2
THRESHOLD = 128 / 255  # of solarisation: Pillow's

# ------------------------------------------------------------------------------ crop, resize, blur


def crop_matrix(
    start: torch.Tensor,  # (N,) first row or column of the crop, whole numbers
    length: torch.Tensor,  # (N,) rows or columns in the crop, whole numbers
    mirror: torch.Tensor | None,  # (N,) flag, or None for no mirroring
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
    outputs = torch.arange(size, device=device, dtype=start.dtype) + 0.5
    if mirror is not None:
        outputs = torch.where(mirror[:, None] > 0, size - outputs, outputs)  # (N, size)
    scale = length / size
    centre = start[:, None] + outputs * scale[:, None]  # (N, size)
    inputs = torch.arange(full, device=device, dtype=start.dtype) + 0.5
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
    index = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
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
    images: torch.Tensor,  # (N, H, 3, W)
    rows: torch.Tensor,  # (N, S, H)
    columns: torch.Tensor,  # (N, T, W)
) -> torch.Tensor:
    """rows · image · columns^T for every sample and channel: (N, S, 3, T)."""
    number, height, channels, width = images.shape
    result = torch.bmm(rows, images.reshape(number, height, channels * width))
    result = result.view(number, rows.shape[1] * channels, width)
    result = torch.bmm(result, columns.transpose(1, 2))
    return result.view(number, rows.shape[1], channels, columns.shape[1])


def crop_resize(images: torch.Tensor, p: Parameters, size: int) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> (N, size, 3, size) in [0, 1], of the parameters' dtype."""
    height, width = images.shape[-2:]
    rows = crop_matrix(p.top, p.height, None, size, height).mul_(1 / 255)
    columns = crop_matrix(p.left, p.width, p.mirror, size, width)
    pixels = images.permute(0, 2, 1, 3).to(rows.dtype, memory_format=torch.contiguous_format)
    return apply_rows_then_columns(pixels, rows, columns)


def blur(pixels: torch.Tensor, p: Parameters) -> torch.Tensor:
    """Pixels (N, S, 3, S) with the samples blurred that are to be."""
    matrix = blur_matrix(p.sigma, pixels.shape[1])
    return _where(p.blurred, apply_rows_then_columns(pixels, matrix, matrix), pixels)


# ------------------------------------------------------------------------------------------ colours


def _where(flag: torch.Tensor, changed: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    return torch.where(flag.view(-1, 1, 1, 1) > 0, changed, pixels)


def gray(pixels: torch.Tensor) -> torch.Tensor:
    """Grey value of each pixel: (N, H, 3, W) -> (N, H, 1, W)."""
    red, green, blue = pixels.split(1, dim=2)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def blend(pixels: torch.Tensor, kind: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """clamp(factor pixels + (1 - factor) reference, 0, 1).

    kind (N,) chooses the reference: black (BRIGHTNESS), the mean of the image's grey (CONTRAST) or
    the pixel's own grey (SATURATION); factor (N,).
    """
    factor, kind = factor.view(-1, 1, 1, 1), kind.view(-1, 1, 1, 1)
    own = gray(pixels)
    reference = (kind == SATURATION) * own + (kind == CONTRAST) * own.mean((1, 3), keepdim=True)
    return (factor * pixels + (1.0 - factor) * reference).clamp_(0.0, 1.0)


def shift_hue(pixels: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn the hue by `shift` (N,), in turns, at constant HSV saturation and value.

    With M and m the largest and smallest channel and h in [0, 6) the hue, the channel that peaks at
    hue p (red 0, green 2, blue 4) is m + (M - m) clamp(2 - |h - p|, 0, 1), |.| on the circle.
    """
    red, green, blue = pixels.unbind(2)
    largest, smallest = pixels.amax(2), pixels.amin(2)
    spread = largest - smallest
    is_red, is_green = largest == red, largest == green
    hue = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    hue.div_(spread.clamp(min=1e-12))  # a grey pixel has spread 0 and any hue
    hue.add_(torch.where(is_green, 2.0, 4.0).masked_fill_(is_red, 0.0))
    hue.add_(6.0 * shift[:, None, None])
    peaks = torch.arange(0.0, 6.0, 2.0, device=pixels.device)
    distance = hue[:, :, None] - peaks[:, None]  # (N, H, 3, W)
    distance.sub_(torch.round(distance / 6.0), alpha=6.0)
    weight = distance.abs_().neg_().add_(2.0).clamp_(0.0, 1.0)
    return torch.addcmul(smallest[:, :, None], weight, spread[:, :, None])


def jitter(pixels: torch.Tensor, p: Parameters) -> torch.Tensor:
    """The three blends and the hue in each sample's order, whether it is jittered or not.

    Each blend runs on all samples, with factor 1 where it comes on the hue's other side.
    """
    kinds, hue_slot = slots(p.order)
    factors = torch.stack((p.brightness, p.contrast, p.saturation), dim=1)
    factors = factors.gather(1, torch.stack(kinds, dim=1)).unbind(1)
    for slot in range(3):
        pixels = blend(pixels, kinds[slot], torch.where(hue_slot > slot, factors[slot], 1.0))
    pixels = shift_hue(pixels, p.hue)
    for slot in range(3):
        pixels = blend(pixels, kinds[slot], torch.where(hue_slot <= slot, factors[slot], 1.0))
    return pixels


def color(pixels: torch.Tensor, p: Parameters) -> torch.Tensor:
    """Jitter, grey, blur and solarisation of the samples (N, S, 3, S) that are to have them."""
    pixels = _where(p.jittered, jitter(pixels, p), pixels)
    pixels = blur(_where(p.grayed, gray(pixels), pixels), p)
    return solarize(pixels, p, THRESHOLD, 1.0)


def solarize(
    pixels: torch.Tensor,
    p: Parameters,
    threshold: torch.Tensor | float,
    whole: torch.Tensor | float,
) -> torch.Tensor:
    """Values from `threshold` up taken from `whole`, black and white together, where flagged."""
    chosen = (p.solarized.view(-1, 1, 1, 1) > 0) & (pixels >= threshold)
    return torch.where(chosen, whole - pixels, pixels)


# -------------------------------------------------------------------------------------------- views


@lru_cache(maxsize=16)
def constants_of(
    mean: Triple, std: Triple, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(2, 3): 1 / std and -mean / std."""
    rows = [[1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]]
    return torch.tensor(rows, device=device, dtype=dtype)


def normalize(pixels: torch.Tensor, mean: Triple, std: Triple) -> torch.Tensor:
    """(N, H, 3, W) in [0, 1] -> (pixels - mean) / std as contiguous (N, 3, H, W)."""
    constants = constants_of(tuple(mean), tuple(std), pixels.device, pixels.dtype)
    scale, offset = constants.view(2, 3, 1, 1)
    result = pixels.new_empty((len(pixels), 3, pixels.shape[1], pixels.shape[3]))
    return torch.addcmul(offset, pixels.transpose(1, 2), scale, out=result)


def render(
    images: torch.Tensor,  # (N, 3, H, W) uint8
    table: torch.Tensor,  # (N, columns): recipe.COLUMNS
    size: int,
    mean: Triple,
    std: Triple,
    colors: bool = True,
) -> torch.Tensor:
    """The views (N, 3, size, size) that a table stands for, in its dtype: the specification.

    Args:
        colors: whether anything follows the crop; without, its columns alone are read.
    """
    p = Parameters(*table.unbind(1))
    # Autocast would run the resampling products in half precision.
    with torch.autocast(images.device.type, enabled=False):
        pixels = crop_resize(images, p, size)
        return normalize(color(pixels, p) if colors else pixels, mean, std)
