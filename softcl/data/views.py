"""Random views of a batch, made on its device, with parameters drawn for every sample.

A view is a pure function of the images and of the generator's state: all its numbers come from
one `torch.rand(N, columns, generator=...)`. A generator on the CPU gives the same views on every
device and lets each operation run on the samples that need it; a CUDA generator keeps everything
on the GPU with no synchronisation and no shape that depends on the data.

    strong  crop, flip, colour jitter (p 0.8), grayscale (p 0.2), blur (p 0.5), normalise
    weak    crop, flip, normalise
    byol_first, byol_second    strong with wider crops; blurred always, and seldom but solarized

The first two are the recipes of MoCo v2, ReSSL and ASCL, the pair that of BYOL and MoCo v3. Pixels
stay floating point from the crop to the end, where the originals round to uint8 after each
operation.

The operations here are the reference of two kernels (fused.py): on CPUs a compiled one makes the
whole view of a sample, on GPUs one of Triton does crop, flip, colours and normalisation. A view by
a kernel differs from the reference's by rounding (1e-5 in normalised units) and nothing else: the
numbers drawn are the same. Which of them makes the views follows from the device and from what is
installed; a run is repeated to the bit by the same one alone, and says which it is. The Triton
kernel has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from softcl.data import color
from softcl.data.fused import fused_view, kernel_for
from softcl.data.image_set import Triple
from softcl.data.recipe import (
    BYOL_FIRST,
    BYOL_SECOND,
    COLOR_COLUMNS,
    CROP_COLUMNS,
    RECIPE,
    Colors,
    Crop,
    Recipe,
    central_crop,
    draw_colors,
    draw_crop,
    mirror_of,
    whole_crop,
)
from softcl.data.resample import apply_rows_then_columns, blur_matrix, crop_matrix


def crop_resize(images: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, size, 3, size) in [0, 1], rows outermost."""
    height, width = images.shape[-2:]
    rows = crop_matrix(crop.top, crop.height, None, size, height).mul_(1 / 255)
    columns = crop_matrix(crop.left, crop.width, crop.mirror, size, width)
    pixels = images.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    return apply_rows_then_columns(pixels, rows, columns)


def mirrored(images: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """`crop_resize` of crops that were cut before: uint8 (N, 3, S, S) -> float32 (N, S, 3, S)."""
    pixels = images.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    pixels.mul_(1 / 255)
    return torch.where(mirror.view(-1, 1, 1, 1), pixels.flip(3), pixels)


@lru_cache(maxsize=16)
def _scale_and_offset(mean: Triple, std: Triple, device: torch.device) -> torch.Tensor:
    rows = [[1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]]
    return torch.tensor(rows, device=device).view(2, 3, 1, 1)


def normalize(pixels: torch.Tensor, mean: Triple, std: Triple) -> torch.Tensor:
    """(N, H, 3, W) in [0, 1] -> (pixels - mean) / std as contiguous (N, 3, H, W)."""
    number, height, channels, width = pixels.shape
    scale, offset = _scale_and_offset(tuple(mean), tuple(std), pixels.device)
    result = torch.empty((number, channels, height, width), device=pixels.device)
    return torch.addcmul(offset, pixels.transpose(1, 2), scale, out=result)


def color_chosen(pixels: torch.Tensor, colors: Colors) -> torch.Tensor:
    """Colour operations, each on its samples alone: parameters on the CPU, pixels anywhere.

    Modifies pixels (N, S, 3, S) and returns them.
    """

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(pixels.device, non_blocking=True)

    chosen = colors.jittered.nonzero().squeeze(1)
    if len(chosen):
        slots, order = colors.hue_slot[chosen].sort(stable=True)
        chosen = chosen[order]
        counts = torch.bincount(slots, minlength=4).cumsum(0).tolist()
        parameters = [t[chosen] for t in (colors.kinds, colors.factors, colors.hue)]
        index = there(chosen)
        selected = pixels.index_select(0, index)
        moved = map(there, (*parameters, slots))
        color.jitter(selected, color.Jitter(*moved, counts=tuple(counts[:3])))
        pixels.index_copy_(0, index, selected)
    chosen = colors.grayed.nonzero().squeeze(1)
    if len(chosen):
        index = there(chosen)
        gray = color.gray(pixels.index_select(0, index))
        pixels.index_copy_(0, index, gray.expand(-1, -1, 3, -1))
    chosen = colors.blurred.nonzero().squeeze(1)
    if len(chosen):
        index = there(chosen)
        matrix = blur_matrix(there(colors.sigma[chosen]), pixels.shape[1])
        selected = apply_rows_then_columns(pixels.index_select(0, index), matrix, matrix)
        pixels.index_copy_(0, index, selected)
    return pixels


def color_masked(pixels: torch.Tensor, colors: Colors) -> torch.Tensor:
    """The same with fixed shapes: every operation on every sample, kept where it is chosen."""
    shape = (-1, 1, 1, 1)
    changed = pixels.clone()
    color.jitter(changed, color.Jitter(colors.kinds, colors.factors, colors.hue, colors.hue_slot))
    pixels = torch.where(colors.jittered.view(shape), changed, pixels)
    pixels = torch.where(colors.grayed.view(shape), color.gray(pixels), pixels)
    matrix = blur_matrix(colors.sigma, pixels.shape[1])
    changed = apply_rows_then_columns(pixels, matrix, matrix)
    return torch.where(colors.blurred.view(shape), changed, pixels)


def _check(images: torch.Tensor, size: int, cropped: bool = False) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must have shape (N, 3, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if cropped and tuple(images.shape[2:]) != (size, size):
        raise ValueError(f"crops must have {size} pixels a side, got {tuple(images.shape)}")


class Share(NamedTuple):
    """In place of a generator: the numbers of every ``size``-th sample, from ``rank`` on.

    Processes that each have such a share of a batch then make the views of the whole batch.
    """

    generator: torch.Generator
    rank: int
    size: int


def _draw(images: torch.Tensor, columns: int, generator: torch.Generator | Share) -> torch.Tensor:
    if isinstance(generator, Share):
        generator, rank, size = generator
        whole = images[:1].expand(len(images) * size, *images.shape[1:])  # of its length
        return _draw(whole, columns, generator)[rank::size]
    if generator.device.type not in ("cpu", images.device.type):
        raise ValueError(
            f"generator must be on the CPU or on the images' device {images.device}, "
            f"got one on {generator.device}"
        )
    return torch.rand((len(images), columns), generator=generator, device=generator.device)


def _crop(uniform: torch.Tensor, images: torch.Tensor, recipe: Recipe, cropped: bool) -> Crop:
    """The crops that numbers (N, CROP_COLUMNS) stand for; of crops, the whole, mirrored or not."""
    if cropped:
        return whole_crop(mirror_of(uniform, recipe), *images.shape[-2:])
    return draw_crop(uniform, *images.shape[-2:], recipe)


def _resized(images: torch.Tensor, crop: Crop, size: int, cropped: bool) -> torch.Tensor:
    """(N, size, 3, size) float32 in [0, 1], rows outermost."""
    if cropped:
        return mirrored(images, crop.mirror.to(images.device, non_blocking=True))
    return crop_resize(images, crop.to(images.device), size)


def _full_precision(images: torch.Tensor) -> torch.autocast:
    # Autocast would run the resampling products in half precision.
    return torch.autocast(images.device.type, enabled=False)


@torch.no_grad()
def strong_view(
    images: torch.Tensor,  # (N, 3, H, W) uint8
    size: int,
    mean: Triple,
    std: Triple,
    generator: torch.Generator,
    *,
    recipe: Recipe = RECIPE,
    cropped: bool = False,
    kernel: bool | None = None,
) -> torch.Tensor:
    """Crop, flip, colour jitter, grayscale, blur, normalise: float32 (N, 3, size, size).

    Args:
        cropped: the images are random crops of that size already, and keep their pixels' places.
        kernel: demand the device's kernel, or leave it; None for the kernel where it runs.
    """
    _check(images, size, cropped)
    columns = CROP_COLUMNS + COLOR_COLUMNS
    uniform = _draw(images, columns + (recipe.solarize > 0), generator)
    crop = _crop(uniform[:, :CROP_COLUMNS], images, recipe, cropped)
    colors = draw_colors(uniform[:, CROP_COLUMNS:columns], recipe)
    chosen = uniform[:, columns] < recipe.solarize if recipe.solarize > 0 else None
    module = kernel_for(images, kernel)
    if module is not None:
        return fused_view(module, images, size, mean, std, crop, colors, chosen)
    apply_colors = color_chosen if uniform.device.type == "cpu" else color_masked
    with _full_precision(images):
        pixels = apply_colors(_resized(images, crop, size, cropped), colors)
        if chosen is not None:
            pixels = color.solarize(pixels, chosen.to(images.device, non_blocking=True))
        return normalize(pixels, mean, std)


@torch.no_grad()
def weak_view(
    images: torch.Tensor,  # (N, 3, H, W) uint8
    size: int,
    mean: Triple,
    std: Triple,
    generator: torch.Generator,
    *,
    recipe: Recipe = RECIPE,
    cropped: bool = False,
    kernel: bool | None = None,
) -> torch.Tensor:
    """Crop, flip, normalise: float32 (N, 3, size, size); arguments as of `strong_view`."""
    _check(images, size, cropped)
    uniform = _draw(images, CROP_COLUMNS, generator)
    crop = _crop(uniform, images, recipe, cropped)
    module = kernel_for(images, kernel)
    if module is not None:
        return fused_view(module, images, size, mean, std, crop, None)
    with _full_precision(images):
        return normalize(_resized(images, crop, size, cropped), mean, std)


@torch.no_grad()
def center_view(images: torch.Tensor, size: int, mean: Triple, std: Triple) -> torch.Tensor:
    """The view for evaluation, not random: the largest centred square, resized, normalised.

    images uint8 (N, 3, H, W) -> float32 (N, 3, size, size).
    """
    _check(images, size)
    crop = central_crop(len(images), *images.shape[-2:], images.device)
    with _full_precision(images):
        return normalize(crop_resize(images, crop, size), mean, std)


View = Callable[[torch.Tensor, int, Triple, Triple, torch.Generator], torch.Tensor]
VIEWS: dict[str, View] = {
    "strong": strong_view,
    "weak": weak_view,
    "byol_first": partial(strong_view, recipe=BYOL_FIRST),
    "byol_second": partial(strong_view, recipe=BYOL_SECOND),
}
