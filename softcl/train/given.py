"""What `softcl.train.fit` takes besides settings: data, networks and functions of the caller's."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softcl.data.given import is_object, name_of
from softcl.errors import ConfigError
from softcl.train.config import TrainConfig
from softcl.train.step import MEASURES

_OBJECTS = {"data": "data", "eval_data": "eval_data", "arch": "backbone", "teacher": "teacher"}


@dataclass(frozen=True)
class Moment:
    """Where a run stands, as `on_step` and `on_epoch` are told.

    Attributes:
        step, total_steps: done, and of the whole run.
        epoch: done, in fractions.
        lr: learning rate of this step.
        knn: accuracy of the last evaluation, or None.
        backbone: as it is now. To look at, in whatever mode it is left.
    """

    step: int
    total_steps: int
    epoch: float
    lr: float
    knn: float | None
    backbone: nn.Module
    _measures: Tensor

    @property
    def loss(self) -> float:
        """Of this step. On a GPU reading it waits for the device."""
        return float(self._measures[0])

    @property
    def measures(self) -> dict[str, float]:
        """Loss, confidence, entropy, positive_top1, query_spread; NaN where the method has none."""
        return dict(zip(MEASURES, self._measures.tolist(), strict=True))


Callback = Callable[[Moment], object]


@dataclass(frozen=True)
class Given:
    """Objects in place of settings: a configuration has their types' names, as ``<ResNet>``.

    Attributes:
        data, eval_data: what `softcl.data.image_set_of` takes.
        backbone: trained by a run in a copy.
        teacher: frozen, of method seed.
        on_step, on_epoch: called after each.
    """

    data: Any = None
    eval_data: Any = None
    backbone: nn.Module | None = None
    teacher: nn.Module | None = None
    on_step: Callback | None = None
    on_epoch: Callback | None = None

    @property
    def settings(self) -> dict[str, str]:
        """What stands for the objects in a configuration."""
        objects = {name: getattr(self, field) for name, field in _OBJECTS.items()}
        return {name: name_of(value) for name, value in objects.items() if value is not None}

    def check_complete(self, config: TrainConfig) -> None:
        """Refuse a stored configuration whose objects are not given again.

        Raises:
            ConfigError: naming the first.
        """
        for name, field in _OBJECTS.items():
            word = getattr(config, name, None)
            if is_object(word) and getattr(self, field) is None:
                reason = f"was an object of Python: softcl.train.fit({field}=..., resume=...) goes"
                raise ConfigError(name, word, f"{reason} on")


NOTHING = Given()


def sort_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Given]:
    """The settings among the arguments of `fit`, and the objects.

    Raises:
        ConfigError: an argument is of another kind.
    """
    settings = {name: value for name, value in arguments.items() if value is not None}
    objects = {name: settings.pop(name) for name in ("on_step", "on_epoch") if name in settings}
    for name, function in objects.items():
        if not callable(function):
            raise ConfigError(name, repr(function), "must be a function of one argument")
    for name in ("data", "eval_data"):
        if name in settings and not isinstance(settings[name], (str, os.PathLike)):
            objects[name] = settings.pop(name)
    for name, flag in (("backbone", "arch"), ("teacher", "teacher")):
        if name in settings and not isinstance(settings[name], (str, os.PathLike)):
            objects[name] = settings.pop(name)
            if not isinstance(objects[name], nn.Module):
                reason = "must be a name or a torch.nn.Module"
                raise ConfigError(flag, repr(objects[name]), reason)
    if "backbone" in settings:
        if settings.get("arch", settings["backbone"]) != settings["backbone"]:
            raise ConfigError("arch", settings["arch"], "is backbone by its flag's name; give one")
        settings["arch"] = settings.pop("backbone")
    for name, value in settings.items():
        if isinstance(value, Path):
            settings[name] = str(value)
    given = Given(**objects)
    return {**settings, **given.settings}, given


def copied_backbone(module: nn.Module, image_size: int) -> nn.Module:
    """A copy of the caller's backbone, which a run trains.

    Raises:
        ConfigError: it does not make a feature vector of each image.
    """
    backbone = copy.deepcopy(module)
    backbone.num_features = count_features(backbone, image_size, "arch")
    backbone.stem_rule = "given"
    return backbone


@torch.no_grad()
def count_features(module: nn.Module, image_size: int, field: str) -> int:
    """F of a module (N, 3, S, S) -> (N, F), by a dry run with two images.

    Raises:
        ConfigError: it cannot take them, or gives something else.
    """
    first = next(module.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        found = module(torch.zeros(2, 3, image_size, image_size, device=device))
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        reason = f"cannot take {image_size} px images: {type(error).__name__}: {line}"
        raise ConfigError(field, name_of(module), reason) from error
    finally:
        for part, training in modes:
            part.training = training
    if not isinstance(found, Tensor):
        reason = f"gives a {type(found).__name__}; it must give one tensor (N, F)"
        raise ConfigError(field, name_of(module), reason)
    if found.ndim != 2 or len(found) != 2 or not found.is_floating_point():
        pool = "nn.Sequential(module, nn.AdaptiveAvgPool2d(1), nn.Flatten())"
        reason = f"gives {tuple(found.shape)} for two images; it must give (2, F)"
        reason += f": {pool}" * (found.ndim == 4)
        raise ConfigError(field, name_of(module), reason)
    return found.shape[1]
