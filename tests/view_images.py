"""Images and tables of parameters for the tests of the views."""

from __future__ import annotations

import torch

from softcl.data.recipe import Parameters


def noise(number: int, height: int, width: int, seed: int = 9) -> torch.Tensor:
    """Half noise, half smooth, with grey and saturated parts."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (number, 3, height, width), generator=generator)
    coarse = torch.rand((number, 3, 3, 3), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images[::2] = (smooth * 300 - 20).clamp(0, 255).long()[::2]
    images[:, :, : height // 3] = images[:, :1, : height // 3]
    images[1::4, :, :, -1:] = 255
    return images.to(torch.uint8)


def table_of(*boxes: tuple[int, int, int, int], **columns: float | torch.Tensor) -> torch.Tensor:
    """A row for each box (top, left, height, width); columns are 0 and factors 1 unless given."""
    crop = torch.tensor(boxes, dtype=torch.float32).unbind(1)
    plain = dict(brightness=1.0, contrast=1.0, saturation=1.0, sigma=1.0)
    rest = {name: plain.get(name, 0.0) for name in Parameters._fields[4:]} | columns
    rows = [torch.as_tensor(x, dtype=torch.float32).expand(len(boxes)) for x in rest.values()]
    assert len(rest) == len(Parameters._fields) - 4, columns
    return torch.stack([*crop, *rows], dim=1)


def parameters(table: torch.Tensor) -> Parameters:
    return Parameters(*table.unbind(1))
