"""Random views of a batch, made on its device, with parameters drawn for every sample.

A view is a pure function of the images and of the generator's state: all its numbers come from
one `torch.rand(N, columns, generator=...)`. A generator on the CPU gives the same numbers for every
device; a CUDA generator keeps everything on the GPU with no synchronisation.

    strong  crop, flip, colour jitter (p 0.8), grayscale (p 0.2), blur (p 0.5), normalise
    weak    crop, flip, normalise
    byol_first, byol_second    strong with wider crops; blurred always, and seldom but solarized

The first two are the recipes of MoCo v2, ReSSL and ASCL, the pair that of BYOL and MoCo v3.

From the table of parameters (recipe.py) a kernel makes the views: on CPUs the compiled one
(csrc/cpu/views), on GPUs Triton's (kernels/views.py), which leaves the blur and the solarisation to
PyTorch and has not run on a GPU yet. Both differ from `render`, the PyTorch form, by rounding (1e-5
in normalised units) and nothing else. Which of the three makes the views follows from the device
and from what is installed; a run is repeated to the bit by the same one alone, and says which.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from softcl import native, trust
from softcl.data.image_set import Triple
from softcl.data.recipe import COLUMNS, RECIPE, RECIPES, Parameters, Recipe, central_table, draw
from softcl.data.render import THRESHOLD, blur, constants_of, render, solarize


def _after_triton(views: Tensor, table: Tensor, mean: Triple, std: Triple) -> Tensor:
    """The blur and the solarisation, which Triton's kernel leaves out, of normalised views.

    The blur's weights sum to 1, so that it may follow the normalisation.
    """
    p = Parameters(*table.unbind(1))
    with torch.autocast(views.device.type, enabled=False):
        views = blur(views.transpose(1, 2), p).transpose(1, 2)
    scale, offset = constants_of(tuple(mean), tuple(std), views.device).view(2, 3, 1, 1)
    return solarize(views, p, THRESHOLD * scale + offset, scale + 2 * offset).contiguous()


def _check(images: Tensor, size: int, cropped: bool = False) -> None:
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


def uniforms(
    number: int, columns: int, generator: torch.Generator | Share, device: torch.device
) -> Tensor:
    """Numbers (number, columns) in [0, 1) for samples whose images are on `device`."""
    generator, rank, size = generator if isinstance(generator, Share) else (generator, 0, 1)
    if generator.device.type not in ("cpu", device.type):
        raise ValueError(
            f"generator must be on the CPU or on the images' device {device}, "
            f"got one on {generator.device}"
        )
    numbers = torch.rand((number * size, columns), generator=generator, device=generator.device)
    return numbers[rank::size] if size > 1 else numbers


@torch.no_grad()
def random_view(
    images: Tensor,  # (N, 3, H, W) uint8
    size: int,
    mean: Triple,
    std: Triple,
    generator: torch.Generator | Share,
    *,
    recipe: Recipe = RECIPE,
    cropped: bool = False,
    kernel: bool | None = None,
) -> Tensor:
    """Crop, flip, what the recipe has of colours, normalise: float32 (N, 3, size, size).

    Args:
        cropped: the images are random crops of that size already, and keep their pixels' places.
        kernel: demand the device's kernel, or leave it; None for the kernel where it runs.
    """
    _check(images, size, cropped)
    numbers = uniforms(len(images), recipe.columns, generator, images.device)
    table = draw(numbers, *images.shape[-2:], recipe, whole=cropped)
    table = table.to(images.device, non_blocking=True)
    make = kernel_for(images, kernel)
    if make is None:
        return render(images, table, size, mean, std, recipe.colors)
    constants = constants_of(tuple(mean), tuple(std), images.device)
    views = make(images, table, constants, size, recipe.colors)
    if make is triton_view and recipe.colors:
        return _after_triton(views, table, mean, std)
    return views


@torch.no_grad()
def center_view(images: Tensor, size: int, mean: Triple, std: Triple) -> Tensor:
    """The view for evaluation, not random: the largest centred square, resized, normalised.

    images uint8 (N, 3, H, W) -> float32 (N, 3, size, size).
    """
    _check(images, size)
    table = central_table(len(images), *images.shape[-2:], images.device)
    return render(images, table, size, mean, std, colors=False)


# Transforms, called as `random_view`, by the name of their recipe.
VIEWS: dict[str, Callable[..., Tensor]] = {
    name: functools.partial(random_view, recipe=recipe) for name, recipe in RECIPES.items()
}
strong_view, weak_view = VIEWS["strong"], VIEWS["weak"]


# -------------------------------------------------------------------------------------- transforms

# uint8 (N, 3, H, W) -> float (N, 3, S, S)
Transform = Callable[[Tensor, torch.Generator | Share], Tensor]
Images = Tensor | Mapping[str, Tensor]  # of a batch; crops by the name of their view


@dataclass(frozen=True)
class RecipeTransform:
    """What makes one of the method's views; also of crops, which were cut out of image files.

    Attributes:
        make: `softcl.data.strong_view` or another of VIEWS.
        recipe: what it does to each sample.
        side: of the view, in pixels.
        mean, std: of the normalisation.
        kernel: whether the device's kernel is demanded or left; None for where it runs.
    """

    make: Callable[..., Tensor]
    recipe: Recipe
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    kernel: bool | None = None

    def __call__(
        self, images: Tensor, generator: torch.Generator | Share, *, cropped: bool = False
    ) -> Tensor:
        return self.make(
            images, self.side, self.mean, self.std, generator,
            recipe=self.recipe, cropped=cropped, kernel=self.kernel,
        )  # fmt: skip


@dataclass(frozen=True)
class PaddedCrop:
    """Crops of the images' own size, out of images padded by black, and flips: the usual
    augmentation of supervised training on small images. Of whole images alone.

    Attributes:
        side: of the view, in pixels, to which the crop is resized.
        mean, std: of the normalisation.
        padding: pixels at each border.
    """

    side: int
    mean: Triple
    std: Triple
    padding: int = 4

    def __call__(self, images: Tensor, generator: torch.Generator | Share) -> Tensor:
        _check(images, self.side)
        count, _, height, width = images.shape
        numbers = uniforms(count, 3, generator, images.device)
        places = (numbers[:, :2] * (2 * self.padding + 1)).floor()
        crop = torch.tensor([height, width], dtype=torch.float32, device=numbers.device)
        mirror = (numbers[:, 2:] < 0.5).float()
        table = torch.cat([places, crop.expand(count, 2), mirror], dim=1)
        table = F.pad(table, (0, len(COLUMNS) - table.shape[1])).to(images.device)
        padded = F.pad(images, (self.padding,) * 4)
        return render(padded, table, self.side, self.mean, self.std, colors=False)


def make_view(
    views: Mapping[str, Transform], name: str, images: Images, generator: torch.Generator | Share
) -> Tensor:
    """One view (N, 3, S, S) of a batch of whole images, or of its crops."""
    if isinstance(images, Mapping):
        return views[name](images[name], generator, cropped=True)
    return views[name](images, generator)


def device_of(images: Images) -> torch.device:
    return (next(iter(images.values())) if isinstance(images, Mapping) else images).device


# ----------------------------------------------------------------------------------------- kernels

LARGEST_IMAGE = 2**31 // 3  # pixels: places inside one image are counted in 32 bits

# From images (N, 3, H, W) uint8, table (N, columns), constants (2, 3), size and colors to views.
Kernel = Callable[[Tensor, Tensor, Tensor, int, bool], Tensor]


def kernel_for(images: Tensor, wanted: bool | None = None) -> Kernel | None:
    """The kernel that makes views of these images if it is wanted, else None.

    Args:
        wanted: False for never, True to demand it, None for where it runs.

    Raises:
        RuntimeError: it is demanded and does not run.
    """
    if wanted is False:
        return None
    reason = kernel_missing(images.device, tried=wanted is None)
    if reason is None and images.shape[-2] * images.shape[-1] >= LARGEST_IMAGE:
        reason = f"takes images of less than {LARGEST_IMAGE} pixels"
    if reason is None:
        return triton_view if _is_tritons(images.device) else compiled_view
    if wanted:
        raise RuntimeError(f"the views' kernel {reason}")
    return None


def kernel_missing(device: torch.device, tried: bool = True) -> str | None:
    """Why no kernel runs on a device, or None where one does.

    A GPU's is used, unless it is demanded, after it was right once there (softcl/trust.py).
    """
    if not _is_tritons(device):
        reason = native.load_for_cpu()[1]
        return f"does not run: {reason}" if reason else None
    if device.type not in ("cpu", "cuda"):
        return "needs a CPU or a CUDA device"
    if device.type == "cuda" and torch.version.hip is None:
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 or later"
    if not _has_triton():
        return "needs triton"
    if device.type == "cpu" or not tried:
        return None
    reason = trust.reason_against(
        "softcl.data.views:try_kernel", "the views' kernel", device, columns=len(COLUMNS)
    )
    return None if reason is None else f"failed on this machine: {reason}"


def try_kernel(device: str, columns: int) -> None:
    """Weak and strong views of random images, by the device's kernel and by PyTorch.

    Raises:
        AssertionError: they differ by more than rounding does.
        Exception: the kernel fails.
    """
    images = torch.randint(256, (16, 3, 40, 48), generator=torch.Generator().manual_seed(0))
    images = images.to(device, torch.uint8)
    for name in ("weak", "strong"):
        found, expected = (
            random_view(
                images, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), torch.Generator().manual_seed(1),
                recipe=RECIPES[name], kernel=kernel,
            )
            for kernel in (True, False)
        )  # fmt: skip
        error = float((found - expected).abs().max())
        assert error <= 0.02, f"a {name} view is off by {error:.2e}"  # of a range of 4


def describe_kernel(device: torch.device, wanted: bool | None = None) -> str:
    """What makes the views on a device, in words."""
    if wanted is False:
        return "by PyTorch, as asked for"
    reason = kernel_missing(device)
    if reason is not None:
        return f"by PyTorch (the kernel {reason})"
    if _is_tritons(device):
        return "by the Triton kernel"
    return f"by the compiled kernel ({native.load()[0].isa()})"


def _is_tritons(device: torch.device) -> bool:
    """Whether the kernel for a device is Triton's: on GPUs, and on CPUs in its interpreter."""
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_view(
    images: Tensor,
    table: Tensor,
    constants: Tensor,
    size: int,
    colors: bool,
) -> Tensor:
    """The views (N, 3, size, size) float32, not blurred nor solarized."""
    from softcl.kernels import views

    arguments = (images.contiguous(), table.contiguous(), constants, size, colors)
    if images.device.type != "cuda":
        return views.launch(*arguments)
    with torch.cuda.device(images.device):  # Triton launches on the current device
        return views.launch(*arguments)


def compiled_view(
    images: Tensor,
    table: Tensor,
    constants: Tensor,
    size: int,
    colors: bool,
) -> Tensor:
    """The views (N, 3, size, size) float32; without `colors` of the crop's columns alone.

    A view's bits are a function of its own image, its parameters and the instruction set
    (`softcl._C.isa()`): other samples of the batch and the number of threads change nothing.

    Raises:
        ValueError: naming a number of the table that is out of range.
    """
    assert table.shape == (len(images), len(COLUMNS)) and table.dtype == torch.float32
    images, table, constants = images.contiguous(), table.contiguous(), constants.contiguous()
    views = torch.empty((len(images), 3, size, size))
    native.load()[0].cpu_views(
        images=images.data_ptr(),
        table=table.data_ptr(),
        constants=constants.data_ptr(),
        views=views.data_ptr(),
        num_images=len(images),
        height=images.shape[2],
        width=images.shape[3],
        size=size,
        colors=colors,
        num_threads=torch.get_num_threads(),
    )
    return views
