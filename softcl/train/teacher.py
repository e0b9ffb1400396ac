"""The frozen teacher of a run that distils: from --teacher, or a module of the caller's."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softcl.data import ImageSet
from softcl.data.image_set import Triple
from softcl.errors import ConfigError, RunError, WeightsError
from softcl.methods import METHODS, Method
from softcl.nn import Encoder
from softcl.train.config import TrainConfig
from softcl.train.given import Given, count_features
from softcl.train.weights import load_pretrained


class FrozenTeacher(Encoder):
    """The features (N, F) of a backbone that never changes, of views made for the student.

    It stays in evaluation mode: its batch norm has the statistics that it came with. A checkpoint
    holds a digest in its place: the weights are where they came from.

    Args:
        backbone: (N, 3, S, S) -> (N, F).
        made_with: mean and std by which the views are normalised.
        trained_with: those that the backbone expects; None for the same.

    Attributes:
        notes: lines about where its weights come from.
    """

    notes: Sequence[str] = ()

    def __init__(
        self,
        backbone: nn.Module,
        made_with: tuple[Triple, Triple] | None = None,
        trained_with: tuple[Triple, Triple] | None = None,
    ) -> None:
        super().__init__(backbone.requires_grad_(False), nn.Identity())
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        if trained_with is not None and tuple(made_with) != tuple(trained_with):
            # A view is (pixels - mean) / std; the backbone wants (pixels - its mean) / its std.
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in made_with)
            own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in trained_with)
            self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        self.digest = _digest(backbone)
        self.train()

    def train(self, mode: bool = True) -> FrozenTeacher:
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if self.scale is None else images * self.scale + self.shift)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"digest": self.digest}

    def load_state_dict(self, stored: Mapping[str, Any], *_: Any, **__: Any) -> None:
        """Check that this is the teacher that the run began with.

        Raises:
            RunError: it is another.
        """
        if stored.get("digest") != self.digest:
            raise RunError("--teacher: not the weights that the run was started with")


def _digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def check_teacher(config: TrainConfig) -> None:
    """Refuse a method without the frozen teacher that it needs, and a teacher that nobody asks.

    Raises:
        ConfigError: naming --teacher.
    """
    distilling = [name for name, kind in METHODS.items() if kind.teacher_follows == "never"]
    if config.teacher is None and config.method in distilling:
        reason = f"method {config.method} needs the frozen network that it learns from"
        raise ConfigError("teacher", "", reason)
    if config.teacher is not None and config.method not in distilling:
        reason = f"does not apply to method {config.method} (but to {', '.join(distilling)})"
        raise ConfigError("teacher", config.teacher, reason)


def build_teacher(
    config: TrainConfig, method: Method, images: ImageSet, given: Given
) -> FrozenTeacher | None:
    """The teacher of a method that distils; None for the others.

    Raises:
        ConfigError: it cannot take the run's images.
        WeightsError: its weights cannot be read.
    """
    if method.teacher_follows != "never":
        return None
    if given.teacher is not None:
        count_features(given.teacher, config.image_size, "teacher")
        return FrozenTeacher(copy.deepcopy(given.teacher))
    try:
        found = load_pretrained(config.teacher, config.image_size)
    except WeightsError as error:
        raise WeightsError(f"--teacher {error}") from error
    teacher = FrozenTeacher(found.backbone, (images.mean, images.std), (found.mean, found.std))
    teacher.notes = list(found.describe())
    return teacher


def fit_to_teacher(
    config: TrainConfig, method: Method, teacher: FrozenTeacher, given_dim: int | None
) -> tuple[TrainConfig, Method]:
    """The settings with the teacher's width as the dimension of what is compared.

    Raises:
        ConfigError: --projection-dim says another.
    """
    width = count_features(teacher, config.image_size, "teacher")
    if given_dim not in (None, width):
        reason = f"the teacher's features have {width} dimensions; leave it out"
        raise ConfigError("projection_dim", given_dim, reason)
    config = config.changed(projection_dim=width)
    return config, type(method)(**config.numbers)
