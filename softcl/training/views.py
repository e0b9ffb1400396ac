"""The views of a run: on the device, of whole images or of crops that were cut of their files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from softcl import methods
from softcl.data import VIEWS, ImageSet
from softcl.data.image_set import CropOrder, Cut
from softcl.data.recipe import CROP_COLUMNS, RECIPE, Recipe
from softcl.data.views import Share
from softcl.distributed import ALONE, World
from softcl.methods import Method
from softcl.training.config import ConfigError, did_you_mean
from softcl.training.step import View, derived_seed


@dataclass(frozen=True)
class RecipeView:
    """One of the method's views; called as any `View`, and also with crops.

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


def build_views(
    method: Method, images: ImageSet, size: int, kernel: bool | None = None
) -> dict[str, View]:
    """How each of the method's views is made of a batch.

    Raises:
        ConfigError: a recipe that there is not.
    """

    def make(view: methods.View, field: str) -> View:
        if view.recipe not in VIEWS:
            hint = did_you_mean(view.recipe, VIEWS)
            raise ConfigError(field, view.recipe, f"must be one of {', '.join(VIEWS)}{hint}")
        function = VIEWS[view.recipe]
        recipe = getattr(function, "keywords", {}).get("recipe", RECIPE)
        if view.scale is not None:
            recipe = dataclasses.replace(recipe, scale=view.scale)
        side = side_of(view, size)
        return RecipeView(function, recipe, side, images.mean, images.std, kernel)

    teacher_only = set(method.teacher_sees()) - set(method.student_sees())
    return {
        name: make(view, "teacher_view" if name in teacher_only else "student_view")
        for name, view in method.views().items()
    }


def side_of(view: methods.View, image_size: int) -> int:
    """Side of a view in pixels."""
    return max(round(image_size * view.share), 1)


def crop_order(
    indices: Tensor, views: Mapping[str, View], seed: int, step: int, world: World = ALONE
) -> CropOrder:
    """What a step needs of the files of its images: a random crop for each view.

    Args:
        indices: (N / W,) of this process's images.
        views: as `build_views` makes them.

    The boxes' numbers are a function of the seed and the step, whatever the device and the number
    of threads and of processes: sample i of the batch has row i of them.
    """
    cuts = {}
    for name, view in views.items():
        generator = torch.Generator().manual_seed(derived_seed(seed, step, f"crop {name}"))
        numbers = torch.rand((len(indices) * world.size, CROP_COLUMNS), generator=generator)
        cuts[name] = Cut(view.side, view.recipe, numbers[world.rank :: world.size])
    return CropOrder(indices, cuts)
