"""What a view does to each sample: ranges and probabilities, and parameters drawn from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

CROP_TRIES = 10
CROP_COLUMNS = 2 * CROP_TRIES + 3
COLOR_COLUMNS = 9


@dataclass(frozen=True)
class Recipe:
    """Brightness, contrast and saturation factors are uniform in [1 - x, 1 + x]."""

    scale: tuple[float, float] = (0.2, 1.0)  # crop area / image area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # crop width / height, uniform in its logarithm
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # turns, uniform in [-hue, hue]
    grayscale: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the view
    solarize: float = 0.0  # values from 128 / 255 up are inverted


RECIPE = Recipe()

# The asymmetric pair of BYOL and MoCo v3 (github.com/facebookresearch/moco-v3), which SNCLR and SCE
# use on ImageNet.
_PAIR = {"scale": (0.08, 1.0), "saturation": 0.2}
BYOL_FIRST = Recipe(**_PAIR, blur=1.0)
BYOL_SECOND = Recipe(**_PAIR, blur=0.1, solarize=0.2)


@dataclass(frozen=True)
class Crop:
    """The crop of each sample: float32 (N,) whole pixels, and mirror (N,) bool."""

    top: torch.Tensor
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    mirror: torch.Tensor

    def to(self, device: torch.device) -> Crop:
        """The same on another device, in one copy."""
        if self.top.device == device:
            return self
        parts = (self.top, self.left, self.height, self.width, self.mirror.float())
        *box, mirror = torch.stack(parts).to(device, non_blocking=True)
        return Crop(*box, mirror > 0)


@dataclass(frozen=True)
class Colors:
    """The colour operations of each sample; those of the jitter as in `color.Jitter`."""

    jittered: torch.Tensor  # (N,) bool
    kinds: torch.Tensor  # (N, 3) int64
    factors: torch.Tensor  # (N, 3)
    hue: torch.Tensor  # (N,)
    hue_slot: torch.Tensor  # (N,) int64
    grayed: torch.Tensor  # (N,) bool
    blurred: torch.Tensor  # (N,) bool
    sigma: torch.Tensor  # (N,) pixels


def draw_crop(uniform: torch.Tensor, height: int, width: int, recipe: Recipe = RECIPE) -> Crop:
    """Crops from numbers (N, CROP_COLUMNS) in [0, 1), as torchvision's RandomResizedCrop has them.

    Ten tries of area and aspect ratio, with sides rounded to whole pixels; the first that fits is
    taken; if none does, the largest centred crop whose ratio is allowed.
    """
    low, high = recipe.scale
    area = (low + (high - low) * uniform[:, :CROP_TRIES]) * (height * width)
    low, high = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    ratio = torch.exp(low + (high - low) * uniform[:, CROP_TRIES : 2 * CROP_TRIES])
    # Heights and widths in one tensor, (2, N, tries): the time goes by the number of calls.
    sides = torch.stack((area / ratio, area * ratio)).sqrt_().round_()
    full, central, corner = _limits(height, width, recipe.ratio, uniform.device)
    fits = ((sides > 0) & (sides <= full[..., None])).all(dim=0)  # (N, tries)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    any_fits = fits.any(dim=1)
    sides = sides.gather(2, first.expand(2, -1, -1)).squeeze(2)
    sides = torch.where(any_fits, sides, central)  # (2, N)
    free = full - sides
    places = uniform[:, 2 * CROP_TRIES : CROP_COLUMNS - 1].t() * (free + 1)
    # minimum: u (n + 1) rounds up to n + 1 for the largest u below 1.
    places = torch.minimum(places.floor_(), free)
    places = torch.where(any_fits, places, corner)
    return Crop(*places.unbind(0), *sides.unbind(0), mirror_of(uniform, recipe))


@lru_cache(maxsize=64)
def _limits(
    height: int, width: int, ratio: tuple[float, float], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(2, 1) each: the image's sides, those of its largest centred crop, and where that begins."""
    sides = _central_sides(height, width, ratio)
    rows = ((height, width), sides, ((height - sides[0]) // 2, (width - sides[1]) // 2))
    return torch.tensor(rows, dtype=torch.float32, device=device)[..., None].unbind(0)


def draw_box(
    uniform: Sequence[float], height: int, width: int, recipe: Recipe = RECIPE
) -> tuple[int, int, int, int]:
    """`draw_crop` of one image, from CROP_COLUMNS numbers: top, left, height and width of its box.

    In plain numbers, because threads that decode images of different sizes cannot share a tensor
    operation, and thirty of them for each image would take turns at the interpreter.
    """
    low, high = recipe.scale
    log_low, log_high = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    vertical, horizontal = uniform[2 * CROP_TRIES : CROP_COLUMNS - 1]
    tries = zip(uniform[:CROP_TRIES], uniform[CROP_TRIES : 2 * CROP_TRIES], strict=True)
    for share, shape in tries:
        area = (low + (high - low) * share) * (height * width)
        ratio = math.exp(log_low + (log_high - log_low) * shape)
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(vertical * (height - h + 1)), int(horizontal * (width - w + 1)), h, w
    h, w = _central_sides(height, width, recipe.ratio)
    return (height - h) // 2, (width - w) // 2, h, w


def _central_sides(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest box whose ratio is allowed."""
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def mirror_of(uniform: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Which samples are mirrored, (N,) bool, from numbers (N, CROP_COLUMNS)."""
    return uniform[:, CROP_COLUMNS - 1] < recipe.flip


def whole_crop(mirror: torch.Tensor, height: int, width: int) -> Crop:
    """Whole images, mirrored where mirror (N,) says so."""

    def full(value: int) -> torch.Tensor:
        return torch.full(mirror.shape, float(value), device=mirror.device)

    return Crop(full(0), full(0), full(height), full(width), mirror)


def central_crop(number: int, height: int, width: int, device: torch.device) -> Crop:
    """The largest centred square, not mirrored, `number` times."""
    side = min(height, width)

    def full(value: int) -> torch.Tensor:
        return torch.full((number,), float(value), device=device)

    top, left = full((height - side) // 2), full((width - side) // 2)
    return Crop(top, left, full(side), full(side), torch.zeros_like(top, dtype=torch.bool))


def draw_colors(uniform: torch.Tensor, recipe: Recipe = RECIPE) -> Colors:
    """Colour operations from numbers (N, COLOR_COLUMNS) in [0, 1)."""
    jittered, order, _, _, _, hue, grayed, blurred, sigma = uniform.unbind(1)
    order = torch.floor(order * 24).clamp_(max=23).to(torch.int64)
    order = _orders(uniform.device).index_select(0, order)
    kinds = order[:, :3]
    ranges = (recipe.brightness, recipe.contrast, recipe.saturation)
    least, spread = _factors(ranges, uniform.device)
    factors = (uniform[:, 2:5] * spread).add_(least)
    low, high = recipe.sigma
    return Colors(
        jittered=jittered < recipe.jitter,
        kinds=kinds,
        factors=factors.gather(1, kinds),
        hue=(2 * hue - 1) * recipe.hue,
        hue_slot=order[:, 3],
        grayed=grayed < recipe.grayscale,
        blurred=blurred < recipe.blur,
        sigma=low + (high - low) * sigma,
    )


@lru_cache(maxsize=16)
def _orders(device: torch.device) -> torch.Tensor:
    """The 24 orders of four operations, (24, 4) int64: three blends, and the hue's place in them.

    By the first of the blends, then whether the other two follow it in cyclic order. Kept, because
    copying it to a GPU synchronises.
    """
    rows = []
    for order in range(24):
        first = order % 3
        second = (first + 1 + order // 3 % 2) % 3
        rows.append((first, second, 3 - first - second, order // 6))
    return torch.tensor(rows, device=device)


@lru_cache(maxsize=64)
def _factors(ranges: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """(2, 3): the least factor of each blend, and by how much the largest exceeds it."""
    return torch.tensor([[1 - x for x in ranges], [2 * x for x in ranges]], device=device)
