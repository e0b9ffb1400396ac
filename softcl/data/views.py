"""Random views of a batch, on its device, with parameters drawn for every sample.

A view is a pure function of the images and of the generator's state: all numbers come from one
`torch.rand(N, columns, generator=...)`. A generator on the CPU gives the same views on every device and
lets each operation run on the samples that need it; a CUDA generator keeps everything on the GPU, with
no synchronisation and no shape that depends on the data.

The recipes are those of ASCL, MoCo v2 and their successors:
    strong  crop, flip, colour jitter (p 0.8), grayscale (p 0.2), blur (p 0.5), normalise
    weak    crop, flip, normalise
Pixels stay floating point from the crop to the end; the originals round to uint8 after each operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from softcl.data import color
from softcl.data.image_set import Triple
from softcl.data.resample import apply_rows_then_columns, blur_matrix, crop_matrix

CROP_TRIES = 10
CROP_COLUMNS = 2 * CROP_TRIES + 3
STRONG_COLUMNS = CROP_COLUMNS + 9
# The six orders of brightness, contrast and saturation.
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True)
class Recipe:
    """Ranges and probabilities of a view; factors are drawn uniformly from 1 - x to 1 + x."""

    scale: tuple[float, float] = (0.2, 1.0)  # crop area / image area
    ratio: tuple[float, float] = (
        3 / 4,
        4 / 3,
    )  # crop width / crop height, uniform in its logarithm
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # turns, from -hue to hue
    grayscale: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the view


RECIPE = Recipe()


@dataclass(frozen=True)
class Crop:
    """Crop of each sample: float32 (N,) integers in pixels, and mirror (N,) bool."""

    top: torch.Tensor
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    mirror: torch.Tensor


@dataclass(frozen=True)
class Colors:
    """Colour operations of each sample: everything (N, ...), masks bool, sigma float32 in pixels."""

    jittered: torch.Tensor
    kinds: torch.Tensor
    factors: torch.Tensor
    hue: torch.Tensor
    hue_slot: torch.Tensor
    grayed: torch.Tensor
    blurred: torch.Tensor
    sigma: torch.Tensor


def draw_crop(uniform: torch.Tensor, height: int, width: int, recipe: Recipe = RECIPE) -> Crop:
    """Crops from numbers (N, CROP_COLUMNS) in [0, 1), distributed as torchvision's RandomResizedCrop.

    Ten tries of area and aspect ratio, sides rounded to whole pixels; the first that fits is taken; if
    none fits, the largest centred crop whose ratio is allowed.
    """
    low, high = recipe.scale
    area = (low + (high - low) * uniform[:, :CROP_TRIES]) * (height * width)
    low, high = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    ratio = torch.exp(low + (high - low) * uniform[:, CROP_TRIES : 2 * CROP_TRIES])
    w = torch.round(torch.sqrt(area * ratio))
    h = torch.round(torch.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    any_fits = fits.any(dim=1)

    central_w, central_h = float(width), float(height)
    if width / height < recipe.ratio[0]:
        central_h = float(round(width / recipe.ratio[0]))
    elif width / height > recipe.ratio[1]:
        central_w = float(round(height * recipe.ratio[1]))
    w = torch.where(any_fits, w.gather(1, first).squeeze(1), central_w)
    h = torch.where(any_fits, h.gather(1, first).squeeze(1), central_h)
    vertical, horizontal, mirror = uniform[:, 2 * CROP_TRIES : CROP_COLUMNS].unbind(1)
    # minimum: u (n + 1) can round up to n + 1 for u just below 1.
    top = torch.minimum(torch.floor(vertical * (height - h + 1)), height - h)
    left = torch.minimum(torch.floor(horizontal * (width - w + 1)), width - w)
    top = torch.where(any_fits, top, (height - central_h) // 2)
    left = torch.where(any_fits, left, (width - central_w) // 2)
    return Crop(top, left, h, w, mirror < recipe.flip)


def draw_colors(uniform: torch.Tensor, recipe: Recipe = RECIPE) -> Colors:
    """Colour operations from numbers (N, 9) in [0, 1)."""
    jittered, order, brightness, contrast, saturation, hue, grayed, blurred, sigma = uniform.unbind(
        1
    )
    order = torch.floor(order * 24).clamp_(max=23).to(torch.int64)
    kinds = torch.tensor(ORDERS, device=uniform.device)[order % 6]  # (N, 3)
    spread = (
        (brightness, recipe.brightness),
        (contrast, recipe.contrast),
        (saturation, recipe.saturation),
    )
    factors = torch.stack([1 - x + 2 * x * u for u, x in spread], dim=1)
    return Colors(
        jittered=jittered < recipe.jitter,
        kinds=kinds,
        factors=factors.gather(1, kinds),
        hue=(2 * hue - 1) * recipe.hue,
        hue_slot=order // 6,
        grayed=grayed < recipe.grayscale,
        blurred=blurred < recipe.blur,
        sigma=recipe.sigma[0] + (recipe.sigma[1] - recipe.sigma[0]) * sigma,
    )


def crop_resize(images: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, size, 3, size) in [0, 1], rows outermost."""
    height, width = images.shape[-2:]
    rows = crop_matrix(crop.top, crop.height, None, size, height).mul_(1 / 255)
    columns = crop_matrix(crop.left, crop.width, crop.mirror, size, width)
    pixels = images.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    return apply_rows_then_columns(pixels, rows, columns)


def normalize(pixels: torch.Tensor, mean: Triple, std: Triple) -> torch.Tensor:
    """(N, H, 3, W) in [0, 1] -> (pixels - mean) / std as contiguous (N, 3, H, W)."""
    number, height, channels, width = pixels.shape
    scale = torch.tensor([1 / s for s in std], device=pixels.device).view(3, 1, 1)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=pixels.device)
    result = torch.empty((number, channels, height, width), device=pixels.device)
    return torch.addcmul(offset.view(3, 1, 1), pixels.transpose(1, 2), scale, out=result)


def _color_subsets(pixels: torch.Tensor, colors: Colors) -> torch.Tensor:
    """Colour operations, each on its samples only; parameters on the CPU, pixels anywhere."""
    device = pixels.device
    chosen = colors.jittered.nonzero().squeeze(1)
    slots = colors.hue_slot[chosen]
    chosen = chosen[torch.argsort(slots, stable=True)]
    before = torch.bincount(slots, minlength=4).cumsum(0).tolist()
    if len(chosen):
        parameters = color.Jitter(
            colors.kinds[chosen],
            colors.factors[chosen],
            colors.hue[chosen],
            colors.hue_slot[chosen],
            before=tuple(before),
        ).to(device)
        index = chosen.to(device, non_blocking=True)
        selected = pixels.index_select(0, index)
        color.jitter(selected, parameters)
        pixels.index_copy_(0, index, selected)
    chosen = colors.grayed.nonzero().squeeze(1)
    if len(chosen):
        index = chosen.to(device, non_blocking=True)
        gray = color.gray(pixels.index_select(0, index))
        pixels.index_copy_(0, index, gray.expand(-1, -1, 3, -1))
    chosen = colors.blurred.nonzero().squeeze(1)
    if len(chosen):
        index = chosen.to(device, non_blocking=True)
        matrix = blur_matrix(colors.sigma[chosen].to(device, non_blocking=True), pixels.shape[1])
        pixels.index_copy_(
            0, index, apply_rows_then_columns(pixels.index_select(0, index), matrix, matrix)
        )
    return pixels


def _color_dense(pixels: torch.Tensor, colors: Colors) -> torch.Tensor:
    """The same with fixed shapes: every operation on every sample, the result kept where chosen."""
    shape = (-1, 1, 1, 1)
    changed = pixels.clone()
    color.jitter(changed, color.Jitter(colors.kinds, colors.factors, colors.hue, colors.hue_slot))
    pixels = torch.where(colors.jittered.view(shape), changed, pixels)
    pixels = torch.where(colors.grayed.view(shape), color.gray(pixels), pixels)
    matrix = blur_matrix(colors.sigma, pixels.shape[1])
    changed = apply_rows_then_columns(pixels, matrix, matrix)
    return torch.where(colors.blurred.view(shape), changed, pixels)


def _check(images: torch.Tensor, size: int) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (N, 3, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")


def _draw(images: torch.Tensor, columns: int, generator: torch.Generator) -> torch.Tensor:
    if generator.device.type not in ("cpu", images.device.type):
        raise ValueError(f"generator is on {generator.device}, images are on {images.device}")
    return torch.rand((len(images), columns), generator=generator, device=generator.device)


def _to(crop: Crop, device: torch.device) -> Crop:
    return Crop(*(t.to(device, non_blocking=True) for t in vars(crop).values()))


@torch.no_grad()
def strong_view(
    images: torch.Tensor,  # (N, 3, H, W) uint8
    size: int,
    mean: Triple,
    std: Triple,
    generator: torch.Generator,
) -> torch.Tensor:
    """Crop, flip, colour jitter, grayscale, blur, normalise: float32 (N, 3, size, size)."""
    _check(images, size)
    uniform = _draw(images, STRONG_COLUMNS, generator)
    crop = draw_crop(uniform[:, :CROP_COLUMNS], *images.shape[-2:])
    colors = draw_colors(uniform[:, CROP_COLUMNS:])
    pixels = crop_resize(images, _to(crop, images.device), size)
    apply = _color_subsets if uniform.device.type == "cpu" else _color_dense
    return normalize(apply(pixels, colors), mean, std)


@torch.no_grad()
def weak_view(
    images: torch.Tensor,  # (N, 3, H, W) uint8
    size: int,
    mean: Triple,
    std: Triple,
    generator: torch.Generator,
) -> torch.Tensor:
    """Crop, flip, normalise: float32 (N, 3, size, size)."""
    _check(images, size)
    uniform = _draw(images, CROP_COLUMNS, generator)
    crop = draw_crop(uniform, *images.shape[-2:])
    return normalize(crop_resize(images, _to(crop, images.device), size), mean, std)


@torch.no_grad()
def center_view(images: torch.Tensor, size: int, mean: Triple, std: Triple) -> torch.Tensor:
    """The view for evaluation: largest centred square, resized to size, normalised; not random.

    images uint8 (N, 3, H, W) -> float32 (N, 3, size, size).
    """
    _check(images, size)
    height, width = images.shape[-2:]
    side = min(height, width)
    fixed = torch.tensor(
        [[(height - side) // 2], [(width - side) // 2], [side]],
        dtype=torch.float32,
        device=images.device,
    )
    top, left, side = fixed.expand(3, len(images))
    return normalize(crop_resize(images, Crop(top, left, side, side, side < 0), size), mean, std)


View = Callable[[torch.Tensor, int, Triple, Triple, torch.Generator], torch.Tensor]
VIEWS: dict[str, View] = {"strong": strong_view, "weak": weak_view}
