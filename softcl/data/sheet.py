"""A sheet of images, to look at."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from softcl.data.image_set import Triple


def contact_sheet(
    images: torch.Tensor,
    path: str | Path,
    *,
    columns: int | None = None,
    enlarge: int = 1,
    mean: Triple | None = None,
    std: Triple | None = None,
) -> None:
    """Write images (N, 3, H, W) as a PNG grid, row by row, two pixels apart.

    Either uint8, or floating in [0, 1], or views normalised with `mean` and `std`, which are
    undone. `columns` defaults to a square grid; `enlarge` repeats every pixel.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("contact_sheet needs pillow: pip install 'softcl[train]'") from error
    if images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images must have shape (N, 3, H, W), N >= 1, got {tuple(images.shape)}")
    images = images.detach().cpu()
    if images.dtype != torch.uint8:
        images = images.float()
        if mean is not None and std is not None:
            images = images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        images = (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    images = images.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    number, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    sheet = torch.full(
        (rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, dtype=torch.uint8
    )
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 2) + 2, (i % columns) * (width + 2) + 2
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    Image.fromarray(sheet.numpy()).save(Path(path), format="PNG")
