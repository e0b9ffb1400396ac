"""The kernels of the views: which one runs where, and the Triton kernel's table of parameters.

On CPUs it is the compiled one (compiled.py), on GPUs that of Triton (kernels/views.py). Both
compute what softcl/data/views.py does in PyTorch, which is their reference. The Triton kernel
leaves out the blur and the solarisation: those follow it here, on the normalised view.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch

from softcl.data import color, compiled
from softcl.data.image_set import Triple
from softcl.data.recipe import Colors, Crop
from softcl.data.resample import apply_rows_then_columns, blur_matrix

LARGEST_IMAGE = 2**31 // 3  # pixels: places inside one image are counted in 32 bits


def kernel_for(images: torch.Tensor, wanted: bool | None = None) -> ModuleType | None:
    """The module that makes views of these images (`fused_view`) if it is wanted, else None.

    Args:
        wanted: False for never, True to demand it, None for where it runs.

    Raises:
        RuntimeError: it is demanded and does not run.
    """
    if wanted is False:
        return None
    reason = kernel_missing(images.device)
    if reason is None and images.shape[-2] * images.shape[-1] >= LARGEST_IMAGE:
        reason = f"takes images of less than {LARGEST_IMAGE} pixels"
    if reason is None:
        return _kernel() if _is_tritons(images.device) else compiled
    if wanted:
        raise RuntimeError(f"the views' kernel {reason}")
    return None


def kernel_missing(device: torch.device) -> str | None:
    """Why no kernel runs on a device, or None where one does."""
    if not _is_tritons(device):
        return compiled.load()[1] or None
    if device.type not in ("cpu", "cuda"):
        return "needs a CPU or a CUDA device"
    if device.type == "cuda" and torch.version.hip is None:
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 or later"
    return "needs triton" if _kernel() is None else None


def describe_kernel(device: torch.device, wanted: bool | None = None) -> str:
    """What makes the views on a device, in words."""
    if wanted is False:
        return "by PyTorch, as asked for"
    reason = kernel_missing(device)
    if reason is not None:
        return f"by PyTorch (the kernel {reason})"
    if _is_tritons(device):
        return "by the Triton kernel"
    return f"by the compiled kernel ({compiled.load()[0].isa()})"


def _is_tritons(device: torch.device) -> bool:
    """Whether the kernel for a device is Triton's: on GPUs, and on CPUs in its interpreter."""
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _kernel() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from softcl.kernels import views

    return views


def fused_view(
    kernel: ModuleType,
    images: torch.Tensor,  # (N, 3, H, W) uint8
    size: int,
    mean: Triple,
    std: Triple,
    crop: Crop,
    colors: Colors | None,
    solarized: torch.Tensor | None = None,  # (N,) bool
) -> torch.Tensor:
    """(N, 3, size, size) float32; the parameters may be on the CPU."""
    device = images.device
    if kernel is compiled:
        table = compiled.parameter_table(crop, colors, solarized)
        constants = _constants(tuple(mean), tuple(std), device)
        return compiled.launch(images, table, constants, size, colors is not None)
    table = parameter_table(crop, colors, kernel.STRIDE.value).to(device, non_blocking=True)
    constants = _constants(tuple(mean), tuple(std), device)
    images = images.contiguous()
    if device.type == "cuda":
        with torch.cuda.device(device):  # Triton launches on the current device
            views = kernel.launch(images, table, constants, size, colors is not None)
    else:
        views = kernel.launch(images, table, constants, size, colors is not None)
    if colors is not None:
        views = _blur(views, colors)
    if solarized is not None:
        # The only step that asks for the pixels themselves.
        scale, offset = constants.view(2, 3, 1, 1)
        pixels = (views - offset) / scale
        pixels = color.solarize(pixels, solarized.to(device, non_blocking=True))
        views = torch.addcmul(offset, pixels, scale)
    return views


def parameter_table(crop: Crop, colors: Colors | None, stride: int) -> torch.Tensor:
    """(N, stride) float32 on the parameters' device, in the order of the kernel's COLUMNS."""
    columns = [crop.top, crop.left, crop.height, crop.width, crop.mirror]
    if colors is not None:
        columns += [colors.jittered, *colors.kinds.unbind(1), *colors.factors.unbind(1)]
        columns += [colors.hue, colors.hue_slot, colors.grayed]
    columns = [column.to(torch.float32) for column in columns]
    columns += [torch.zeros_like(columns[0])] * (stride - len(columns))
    return torch.stack(columns, dim=1)


@functools.lru_cache(maxsize=16)
def _constants(mean: Triple, std: Triple, device: torch.device) -> torch.Tensor:
    rows = [[1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]]
    return torch.tensor(rows, device=device)


def _blur(views: torch.Tensor, colors: Colors) -> torch.Tensor:
    """The chosen views blurred. The filter's weights sum to 1, so normalised pixels may be."""
    device = views.device
    if colors.blurred.device.type == "cpu":  # which they are is known: those alone
        chosen = colors.blurred.nonzero().squeeze(1)
        if len(chosen) == 0:
            return views
        index = chosen.to(device, non_blocking=True)
        sigma = colors.sigma[chosen].to(device, non_blocking=True)
        views.index_copy_(0, index, _blurred(views.index_select(0, index), sigma))
        return views
    changed = _blurred(views, colors.sigma)
    return torch.where(colors.blurred.view(-1, 1, 1, 1), changed, views)


def _blurred(views: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    rows_outermost = views.transpose(1, 2)  # (N, S, 3, S)
    with torch.autocast(views.device.type, enabled=False):  # it would run in half precision
        matrix = blur_matrix(sigma, views.shape[-1])
        return apply_rows_then_columns(rows_outermost, matrix, matrix).transpose(1, 2)
