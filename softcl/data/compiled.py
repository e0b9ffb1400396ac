"""The compiled kernel of the views for CPUs (csrc/cpu/views), and its table of parameters.

It computes all of what softcl/data/views.py does in PyTorch, which is its reference. A view's bits
are a function of its own image, its parameters and the instruction set (`softcl._C.isa()`): other
samples of the batch and the number of threads change nothing.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
import torch

from softcl.data.recipe import Colors, Crop

# Columns of the table of parameters: those of kernels/views.py, and two for what follows it there.
COLUMNS = (
    *("top", "left", "height", "width", "mirror"),
    *("jittered", "kind_0", "kind_1", "kind_2", "factor_0", "factor_1", "factor_2"),
    *("hue", "hue_slot", "grayed", "sigma", "solarized"),
)


@functools.cache
def load() -> tuple[ModuleType | None, str]:
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


def parameter_table(
    crop: Crop,
    colors: Colors | None,
    solarized: torch.Tensor | None,  # (N,) bool
) -> torch.Tensor:
    """(N, len(COLUMNS)) float32; in NumPy, for so small arrays take less time there than a call."""
    table = np.zeros((len(crop.top), len(COLUMNS)), dtype=np.float32)
    columns = [crop.top, crop.left, crop.height, crop.width, crop.mirror]
    if colors is not None:
        columns += [colors.jittered]
        table[:, 6:9], table[:, 9:12] = colors.kinds.numpy(), colors.factors.numpy()
        table[:, 12], table[:, 13] = colors.hue.numpy(), colors.hue_slot.numpy()
        table[:, 14] = colors.grayed.numpy()
        np.multiply(colors.sigma.numpy(), colors.blurred.numpy(), out=table[:, 15])
    for place, column in enumerate(columns):
        table[:, place] = column.numpy()
    if solarized is not None:
        table[:, 16] = solarized.numpy()
    return torch.from_numpy(table)


def launch(
    images: torch.Tensor,  # (N, 3, H, W) uint8, on the CPU
    table: torch.Tensor,  # (N, len(COLUMNS)) float32
    constants: torch.Tensor,  # (2, 3) float32: 1 / std and -mean / std
    size: int,
    colors: bool,
) -> torch.Tensor:
    """The views (N, 3, size, size) float32; without `colors` of the first five columns alone.

    Raises:
        ValueError: naming the argument that has another type or shape, or numbers out of range.
    """
    _check("images", images, torch.uint8, (None, 3, None, None))
    _check("table", table, torch.float32, (len(images), len(COLUMNS)))
    _check("constants", constants, torch.float32, (2, 3))
    module, reason = load()
    if module is None:
        raise ValueError(f"the views' kernel {reason}")
    images, table, constants = images.contiguous(), table.contiguous(), constants.contiguous()
    views = torch.empty((len(images), 3, size, size))
    module.cpu_views(
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


def _check(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    fits = tensor.dim() == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if side is None else str(side) for side in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be {dtype} on the CPU, got {tensor.dtype} on {tensor.device}"
        )
