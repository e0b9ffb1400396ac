"""A set of images with its labels, and the table of normalisation constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from softcl.data.recipe import Recipe

Triple = tuple[float, float, float]


class DataError(Exception):
    """A data set that cannot be read; the message is one line that names the path."""


# Per-channel mean and standard deviation of pixels in [0, 1].
STATISTICS: dict[str, tuple[Triple, Triple]] = {
    # The constants of ASCL's released code (MrChenFeng/ASCL_ICPR2022) for its four small sets.
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "stl10": ((0.4408, 0.4279, 0.3867), (0.2682, 0.2610, 0.2686)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    # torchvision's constants for ImageNet-1k; also the choice for a set without a row here.
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # Measured on the first 20,000 training images of `shapes`, seed 0.
    "shapes": ((0.5, 0.5, 0.5), (0.233, 0.233, 0.233)),
}


class Cut(NamedTuple):
    """Random crops of a batch of image files, for one of its views.

    side:    of the crops, in pixels
    recipe:  the ranges of their areas and ratios
    numbers: (N, CROP_COLUMNS) in [0, 1), from which the boxes are drawn
    """

    side: int
    recipe: Recipe
    numbers: torch.Tensor


class CropOrder(NamedTuple):
    """What is to be cut of which images: indices (N,), and a cut for each view by its name."""

    indices: torch.Tensor
    cuts: Mapping[str, Cut]


class DecodedOnDemand(Protocol):
    """What `ImageSet.images` is when the set is not resident in memory, and `ImageSet.files`."""

    skipped: list[str]
    size: tuple[int, int]  # height, width

    def __len__(self) -> int: ...
    def batch(self, indices: torch.Tensor) -> torch.Tensor: ...  # uint8 (N, 3, H, W)

    # uint8 (N, 3, side, side) of each cut
    def crops(self, indices: torch.Tensor, cuts: Mapping[str, Cut]) -> dict[str, torch.Tensor]: ...


@dataclass
class ImageSet:
    """Images with optional labels.

    images:     uint8 tensor (M, 3, H, W) when resident, else an object that decodes on demand
    labels:     int64 (M,) or None
    classes:    names of the classes, in the order of the labels; empty without labels
    mean, std:  normalisation constants for pixels in [0, 1]
    statistics: the row of STATISTICS they come from
    factors:    further int64 labels (M,), by name (`shapes` only)
    skipped:    "path: reason" for each unreadable image left out
    notes:      lines worth printing about how the set was read
    data_format: how it is stored, a word of formats.FORMATS
    files:      where `images` are centred squares, what cuts crops of the whole image files
    """

    images: torch.Tensor | DecodedOnDemand
    labels: torch.Tensor | None
    classes: list[str]
    mean: Triple
    std: Triple
    name: str
    statistics: str = "imagenet"
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data_format: str = "folder"
    files: DecodedOnDemand | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def resident(self) -> bool:
        return isinstance(self.images, torch.Tensor)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the stored images."""
        if isinstance(self.images, torch.Tensor):
            return tuple(self.images.shape[-2:])
        return self.images.size

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """The images of `indices` (N,), on any device: uint8 (N, 3, H, W)."""
        if isinstance(self.images, torch.Tensor):
            return self.images.index_select(0, indices.to(self.images.device))
        return self.images.batch(indices.cpu())

    def read(self, wanted: torch.Tensor | CropOrder) -> torch.Tensor | dict[str, torch.Tensor]:
        """The images of some indices, or crops of their files."""
        if isinstance(wanted, torch.Tensor):
            return self.batch(wanted)
        return self.files.crops(wanted.indices.cpu(), wanted.cuts)

    def to(self, device: torch.device | str) -> ImageSet:
        """Move a resident set's images; a set decoded on demand stays where it is. Returns self."""
        if isinstance(self.images, torch.Tensor):
            self.images = self.images.to(device)
        return self

    def describe(self) -> str:
        """One line for a log: how many images, their size, where they are, how normalised."""
        height, width = self.size
        parts = [f"{self.name}: {len(self)} images", f"{width}x{height}", self.data_format]
        if isinstance(self.images, torch.Tensor):
            parts.append(f"{self.images.numel() / 1e6:.0f} MB in memory")
        else:
            parts.append("decoded on demand")
        if self.files is not None:
            parts.append("crops of the whole files")
        parts.append(f"{len(self.classes)} classes" if self.labels is not None else "no labels")
        parts.append(f"normalised as {self.statistics}")
        if self.skipped:
            parts.append(f"{len(self.skipped)} unreadable skipped")
        return ", ".join(parts)
