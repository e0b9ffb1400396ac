"""Recipes of augmentation, and the parameters of views drawn from them.

A row of the table of parameters is one sample's view: the PyTorch form (views.py), the compiled
kernel (csrc/cpu) and Triton's (kernels/views.py) all read it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

CROP_TRIES = 10
CROP_COLUMNS = 2 * CROP_TRIES + 3  # numbers in [0, 1): areas, ratios, two places and the mirror
ORDERS = 24  # of the jitter's four operations
_BELOW_ONE = 1 - 2**-22  # times a number in [0, 1) and times n, in float32, stays below n


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

    @property
    def colors(self) -> bool:
        """Whether anything follows the crop and the flip."""
        return max(self.jitter, self.grayscale, self.blur, self.solarize) > 0

    @property
    def columns(self) -> int:
        """Numbers in [0, 1) that a sample's view takes."""
        return CROP_COLUMNS + (9 if self.colors else 0) + (1 if self.solarize > 0 else 0)


RECIPE = Recipe()
# The asymmetric pair of BYOL and MoCo v3 (github.com/facebookresearch/moco-v3), which SNCLR uses on
# ImageNet.
_WIDE = (0.08, 1.0)  # torchvision's own
_PAIR = {"saturation": 0.2}
RECIPES: dict[str, Recipe] = {
    "strong": RECIPE,
    "weak": Recipe(jitter=0.0, grayscale=0.0, blur=0.0),
    "byol_first": Recipe(**_PAIR, scale=_WIDE, blur=1.0),
    "byol_second": Recipe(**_PAIR, scale=_WIDE, blur=0.1, solarize=0.2),
    # SCE's on ImageNet (github.com/CEA-LIST/SCE): narrower crops, the second never mirrored.
    "sce_first": Recipe(**_PAIR, blur=1.0),
    "sce_second": Recipe(**_PAIR, flip=0.0, blur=0.1, solarize=0.2),
    # MoCo's notebook for CIFAR-10.
    "moco_cifar": Recipe(scale=_WIDE, blur=0.0),
}


class Parameters(NamedTuple):
    """The columns (N,) float32 of a table of parameters; a flag is set where it is above 0.

    `order` in [0, 24) is the order of the jitter's operations, `slots` says which.
    """

    top: torch.Tensor  # of the crop, in whole pixels
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    mirror: torch.Tensor  # flag
    jittered: torch.Tensor  # flag
    order: torch.Tensor
    brightness: torch.Tensor  # factors
    contrast: torch.Tensor
    saturation: torch.Tensor
    hue: torch.Tensor  # turns
    grayed: torch.Tensor  # flag
    blurred: torch.Tensor  # flag
    sigma: torch.Tensor  # pixels of the view
    solarized: torch.Tensor  # flag


COLUMNS = Parameters._fields
_REST = len(COLUMNS) - 4  # those after the crop


def slots(order: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What an order (N,) stands for: the three blends in turn, and how many precede the hue.

    A blend is 0 brightness, 1 contrast, 2 saturation; all are (N,) int64. order % 3 is the first
    blend, order // 3 % 2 whether the others follow it in cyclic order, order // 6 the hue's place.
    """
    order = order.long()
    first = order % 3
    second = (first + 1 + order // 3 % 2) % 3
    return (first, second, 3 - first - second), order // 6


def draw(
    uniform: torch.Tensor,  # (N, recipe.columns) in [0, 1)
    height: int,
    width: int,
    recipe: Recipe = RECIPE,
    *,
    whole: bool = False,
) -> torch.Tensor:
    """The table (N, len(COLUMNS)) of the views of images height x width.

    Crops as torchvision's RandomResizedCrop has them: ten tries of area and aspect ratio, sides
    rounded to whole pixels; the first that fits is taken; if none does, the largest centred crop
    whose ratio is allowed. That one is the eleventh try here, so that some try always fits.

    Few operations on whole batches: on a GPU each is a launch. Everything drawn is linear in a
    number, up to an exponential and a root.

    Args:
        whole: crop nothing; the images have been cut before.
    """
    line = _lines(height, width, recipe, whole, uniform.device)
    # Not addcmul, which may round otherwise at the end of a batch than within it.
    tries = uniform[:, line.source].mul_(line.spread).add_(line.least)  # (N, tries, columns)
    _, sides, _, ratios = tries.split((2, 2, _REST, 2), dim=2)
    sides.mul_(ratios.exp_()).sqrt_().round_()
    first = (sides <= line.full).sum(2, keepdim=True).argmax(1, keepdim=True)  # both sides fit
    table = tries.gather(1, first.expand(-1, -1, len(COLUMNS))).squeeze(1)
    places, sides, _ = table.split((2, 2, _REST), dim=1)
    places.mul_(line.beyond - sides).floor_()
    return table


class _Lines(NamedTuple):
    """Each try of each column as least + spread * uniform[source]; (tries, columns).

    The columns are those of the table, then the logarithms of height / width and width / height.
    Sides stand for an area until they are multiplied by the ratios, places for shares of the room.
    """

    least: torch.Tensor
    spread: torch.Tensor
    source: torch.Tensor
    full: torch.Tensor  # (2,) the image's sides
    beyond: torch.Tensor  # (2,) one more


@lru_cache(maxsize=64)  # kept, because copying it to a GPU waits for that
def _lines(height: int, width: int, r: Recipe, whole: bool, device: torch.device) -> _Lines:
    low, high = _areas(height, width, r)
    log_low, log_high = (math.log(ratio) for ratio in r.ratio)
    columns = iter(range(CROP_COLUMNS - 1, r.columns))

    def flag(share: float) -> tuple[float, float, int]:
        return share, -1.0, next(columns)

    def between(least: float, most: float) -> tuple[float, float, int]:
        return least, most - least, next(columns)

    rest = [flag(r.flip)]
    if r.colors:
        rest += [flag(r.jitter), (0.0, ORDERS * _BELOW_ONE, next(columns))]
        rest += [between(1 - x, 1 + x) for x in (r.brightness, r.contrast, r.saturation)]
        rest += [between(-r.hue, r.hue), flag(r.grayscale), flag(r.blur), between(*r.sigma)]
    if r.solarize > 0:
        rest += [flag(r.solarize)]
    rest += [(0.0, 0.0, 0)] * (_REST - len(rest))
    places = [(0.0, _BELOW_ONE, 2 * CROP_TRIES), (0.0, _BELOW_ONE, 2 * CROP_TRIES + 1)]
    tries = []
    for k in range(CROP_TRIES):
        area, ratio = (low, high - low, k), CROP_TRIES + k
        stretch = [(-log_low, log_low - log_high, ratio), (log_low, log_high - log_low, ratio)]
        tries.append([*places, area, area, *rest, *stretch])
    # Half of the room, an odd pixel of it at the far end; or none where the image is whole.
    h, w = (height, width) if whole else _central_sides(height, width, r.ratio)
    half = 0.0 if whole else 0.5 - 2**-20
    fixed = [*[half] * 2, *[float(h * w)] * 2, *[0.0] * _REST, math.log(h / w), math.log(w / h)]
    last = [(value, 0.0, 0) for value in fixed]
    last[4 : 4 + _REST] = rest
    tries = [last] if whole else [*tries, last]
    least, spread, source = torch.tensor(tries, dtype=torch.float64).unbind(2)
    full = torch.tensor((height, width), dtype=torch.float32)
    lines = (least.float(), spread.float(), source.long(), full, full + 1)
    return _Lines(*(tensor.to(device) for tensor in lines))


def draw_box(
    uniform: Sequence[float], height: int, width: int, recipe: Recipe = RECIPE
) -> tuple[int, int, int, int]:
    """`draw`'s crop of one image, from CROP_COLUMNS numbers: top, left, height and width.

    In plain numbers, because threads that decode images of different sizes cannot share a tensor
    operation, and twenty of them for each image would take turns at the interpreter.
    """
    low, high = _areas(height, width, recipe)
    log_low, log_high = (math.log(ratio) for ratio in recipe.ratio)
    vertical, horizontal = uniform[2 * CROP_TRIES : CROP_COLUMNS - 1]
    tries = zip(uniform[:CROP_TRIES], uniform[CROP_TRIES : 2 * CROP_TRIES], strict=True)
    for share, shape in tries:
        area = low + (high - low) * share
        ratio = math.exp(log_low + (log_high - log_low) * shape)
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if h <= height and w <= width:
            return int(vertical * (height - h + 1)), int(horizontal * (width - w + 1)), h, w
    h, w = _central_sides(height, width, recipe.ratio)
    return (height - h) // 2, (width - w) // 2, h, w


def _areas(height: int, width: int, recipe: Recipe) -> tuple[float, float]:
    """The least and the largest crop, in pixels; none so small that a side would round to 0."""
    least = 0.26 * max(recipe.ratio[1], 1 / recipe.ratio[0])
    low, high = (max(scale * height * width, least) for scale in recipe.scale)
    return low, high


def _central_sides(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest box whose ratio is allowed."""
    if width / height < ratio[0]:
        return max(round(width / ratio[0]), 1), width
    if width / height > ratio[1]:
        return height, max(round(height * ratio[1]), 1)
    return height, width


def central_table(number: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """The table of the largest centred square, not mirrored, `number` times."""
    side = min(height, width)
    row = [(height - side) // 2, (width - side) // 2, side, side, *[0] * _REST]
    return torch.tensor(row, dtype=torch.float32, device=device).expand(number, -1)
