"""The peers of the views: torchvision's transforms on one PIL image after the other.

    torchvision            the weak and the strong view of each image of a batch, in this process
    torchvision workers    the same in a DataLoader with as many worker processes as threads

The transforms are those of MoCo's and ASCL's released code. Each peer is made of images and a side
and then called; it returns two float32 batches (N, 3, side, side) and the batches it stands for:
from worker processes, which work ahead, several are taken at once.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable

import torch
from torch import Tensor

from softcl.data import ImageSet
from softcl.data.recipe import RECIPE, Parameters, slots

PEERS = ("torchvision", "torchvision workers")
AHEAD = 8  # batches taken at once from worker processes

Make = Callable[[], object]


def absent() -> str | None:
    """Why the peers cannot run here, or None."""
    for module in ("torchvision", "PIL"):
        if importlib.util.find_spec(module) is None:
            return f"not run: {module} is not installed"
    return None


class _Blur:
    """Pillow's blur with a radius of its own for each image."""

    def __call__(self, image):
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(random.uniform(*RECIPE.sigma)))


def transforms(images: ImageSet, side: int):
    """The weak and the strong recipe as their authors wrote them, for one PIL image."""
    from torchvision import transforms as T

    crop = [T.RandomResizedCrop(side, scale=RECIPE.scale), T.RandomHorizontalFlip()]
    end = [T.ToTensor(), T.Normalize(images.mean, images.std)]
    ranges = (RECIPE.brightness, RECIPE.contrast, RECIPE.saturation, RECIPE.hue)
    colors = [
        T.RandomApply([T.ColorJitter(*ranges)], p=RECIPE.jitter),
        T.RandomGrayscale(p=RECIPE.grayscale),
        T.RandomApply([_Blur()], p=RECIPE.blur),
    ]
    return T.Compose([*crop, *end]), T.Compose([*crop, *colors, *end])


class _Pairs(torch.utils.data.Dataset):
    """The two views of each image, as a data set of pairs."""

    def __init__(self, images: ImageSet, side: int) -> None:
        from torchvision.transforms.functional import to_pil_image

        self.pictures = [to_pil_image(image) for image in images.images]
        self.weak, self.strong = transforms(images, side)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self.pictures[index]
        return self.weak(picture), self.strong(picture)


def make_peer(peer: str, images: ImageSet, batch: int, side: int) -> tuple[Make, int]:
    """What makes the views, and the batches that one call of it makes."""
    pairs = _Pairs(images, side)
    if peer == "torchvision":
        return lambda: _collate([pairs[i % len(pairs)] for i in range(batch)]), 1
    indices = torch.utils.data.RandomSampler(pairs, replacement=True, num_samples=1 << 40)
    workers = torch.get_num_threads()
    loader = torch.utils.data.DataLoader(pairs, batch, sampler=indices, num_workers=workers)
    stream = iter(loader)
    return lambda: [next(stream) for _ in range(AHEAD)], AHEAD


def _collate(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    weak, strong = zip(*pairs, strict=True)
    return torch.stack(weak), torch.stack(strong)


def by_pillow(image: Tensor, row: Tensor, side: int) -> Tensor:
    """One sample's view by Pillow, with the parameters of its row of the table.

    image uint8 (3, H, W) -> float32 (3, side, side) in [0, 1], rounded to 8 bits at every step.
    """
    from PIL import ImageFilter
    from torchvision.transforms import functional as F

    p = Parameters(*row.tolist())
    box = [int(x) for x in p[:4]]
    picture = F.resized_crop(F.to_pil_image(image), *box, [side, side])
    if p.mirror > 0:
        picture = F.hflip(picture)
    if p.jittered > 0:
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
        factors = (p.brightness, p.contrast, p.saturation)
        kinds, hue_slot = slots(torch.tensor(p.order))
        steps = [(adjust[kind], factors[kind]) for kind in map(int, kinds)]
        steps.insert(int(hue_slot), (F.adjust_hue, p.hue))
        for step, amount in steps:
            picture = step(picture, amount)
    if p.grayed > 0:
        picture = F.to_grayscale(picture, num_output_channels=3)
    if p.blurred > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(p.sigma))
    return F.to_tensor(picture)
