"""The kernels of the views: which one runs where.

On CPUs it is the compiled one (csrc/cpu), on GPUs that of Triton (kernels/views.py). Both compute
what `softcl.data.views.render` does in PyTorch, from the same table of parameters; Triton's leaves
the blur and the solarisation to the caller. Triton's has not run on a GPU yet.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch

from softcl import trust
from softcl.data.recipe import COLUMNS

LARGEST_IMAGE = 2**31 // 3  # pixels: places inside one image are counted in 32 bits

# From images (N, 3, H, W) uint8, table (N, columns), constants (2, 3), size and colors to views.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, bool], torch.Tensor]


def kernel_for(images: torch.Tensor, wanted: bool | None = None) -> Kernel | None:
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
        return native()[1] or None
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
        "softcl.data.kernels:try_kernel", "the views' kernel", device, columns=len(COLUMNS)
    )
    return None if reason is None else f"failed on this machine: {reason}"


def try_kernel(device: str, columns: int) -> None:
    """Weak and strong views of random images, by the device's kernel and by PyTorch.

    Raises:
        AssertionError: they differ by more than rounding does.
        Exception: the kernel fails.
    """
    from softcl.data.recipe import RECIPES
    from softcl.data.views import random_view

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
    return f"by the compiled kernel ({native()[0].isa()})"


def _is_tritons(device: torch.device) -> bool:
    """Whether the kernel for a device is Triton's: on GPUs, and on CPUs in its interpreter."""
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def native() -> tuple[ModuleType | None, str]:
    """softcl._C, or None and why its kernel cannot be used."""
    try:
        from softcl import _C  # after torch: its OpenMP runtime then serves softcl._C too
    except ImportError as error:
        return None, f"needs softcl._C, which is not built ({error})"
    try:
        _C.isa()
    except ValueError as error:  # SOFTCL_CPU_ISA names something that this processor lacks
        return None, f"needs an instruction set: {error}"
    return _C, ""


def triton_view(
    images: torch.Tensor,
    table: torch.Tensor,
    constants: torch.Tensor,
    size: int,
    colors: bool,
) -> torch.Tensor:
    """The views (N, 3, size, size) float32, not blurred nor solarized."""
    from softcl.kernels import views

    arguments = (images.contiguous(), table.contiguous(), constants, size, colors)
    if images.device.type != "cuda":
        return views.launch(*arguments)
    with torch.cuda.device(images.device):  # Triton launches on the current device
        return views.launch(*arguments)


def compiled_view(
    images: torch.Tensor,
    table: torch.Tensor,
    constants: torch.Tensor,
    size: int,
    colors: bool,
) -> torch.Tensor:
    """The views (N, 3, size, size) float32; without `colors` of the crop's columns alone.

    A view's bits are a function of its own image, its parameters and the instruction set
    (`softcl._C.isa()`): other samples of the batch and the number of threads change nothing.

    Raises:
        ValueError: naming a number of the table that is out of range.
    """
    assert table.shape == (len(images), len(COLUMNS)) and table.dtype == torch.float32
    images, table, constants = images.contiguous(), table.contiguous(), constants.contiguous()
    views = torch.empty((len(images), 3, size, size))
    native()[0].cpu_views(
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
