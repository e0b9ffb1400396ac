"""What the flags leave open: a method's defaults for the data, and what must fit together."""

from __future__ import annotations

import dataclasses
from typing import Any

from softcl.data import ImageSet
from softcl.errors import ConfigError
from softcl.methods import Defaults, Method
from softcl.train.config import TrainConfig, defaults_of, refusal
from softcl.train.optim import standard_settings

SMALL_IMAGE = 64  # sets without defaults of their own: up to here CIFAR-10's, above it ImageNet's


def defaults_for(
    method: str, images: ImageSet, image_size: int, arch: str | None = None
) -> tuple[str, Defaults]:
    """A method's defaults for a set of images, and the name they go by.

    Where a method has some of its own for vision transformers, ``arch`` picks it.
    """
    known, name = defaults_of(method), images.statistics
    # "imagenet" is also the normalisation of sets that nobody published constants for.
    if name not in known or name == "imagenet":
        name = "cifar10" if image_size <= SMALL_IMAGE else "imagenet"
    if arch is not None and "vit" in arch and f"{name}:vit" in known:
        name = f"{name}:vit"
    return name, known[name]


def default_size(method: str, images: ImageSet) -> int | None:
    """Side of the views in the method's defaults for these very images; None if it has none."""
    known, name = defaults_of(method), images.statistics
    return known[name].image_size if name in known and name != "imagenet" else None


def fill(config: TrainConfig, images: ImageSet, image_size: int) -> tuple[TrainConfig, Method, str]:
    """Fill every open setting that decides what a run computes.

    Returns:
        The configuration, the method's dataclass made from it, and the name of the defaults.

    Raises:
        ConfigError: settings that do not fit the method, the data or each other.
    """
    name, defaults = defaults_for(config.method, images, image_size, config.arch)
    filled: dict[str, Any] = {"image_size": image_size}
    for key in ("arch", "epochs", "batch_size", "warmup_epochs"):
        filled[key] = _first(getattr(config, key), getattr(defaults, key))
    numbers = {**dataclasses.asdict(defaults.method), **config.numbers}
    _fit_to_data(config, filled, numbers, images)
    filled.update(_optimizer_settings(config, defaults, filled["batch_size"]))
    _check_together({**filled, **numbers}, config.accumulate)
    try:
        method = type(defaults.method)(**numbers)
    except ValueError as error:
        raise refusal(config.method, error, numbers) from error
    # As the method has them: one may follow from another.
    return config.changed(**filled, **dataclasses.asdict(method)), method, name


def _optimizer_settings(config: TrainConfig, defaults: Defaults, batch_size: int) -> dict[str, Any]:
    """The optimiser and its numbers: given, or of the method, or the standard ones of another."""
    name = _first(config.optimizer, defaults.optimizer)
    usual = {key: getattr(defaults, key) for key in ("lr", "weight_decay", "decay_norms")}
    if name != defaults.optimizer:
        usual = {**standard_settings(name, batch_size), "decay_norms": name == "sgd"}
    settings = {key: _first(getattr(config, key), value) for key, value in usual.items()}
    if name == "adamw" and config.sgd_momentum is not None:
        raise ConfigError("sgd_momentum", config.sgd_momentum, "does not apply to AdamW")
    momentum = None if name == "adamw" else _first(config.sgd_momentum, defaults.sgd_momentum)
    return {"optimizer": name, "sgd_momentum": momentum, **settings}


def _first(given: Any, default: Any) -> Any:
    return default if given is None else given


def _fit_to_data(
    config: TrainConfig, filled: dict[str, Any], numbers: dict[str, Any], images: ImageSet
) -> None:
    """Make defaults fit a small set, with a note, or a short run; refuse given values that do not.

    Raises:
        ConfigError: fewer than two images, or than a batch that was asked for.
    """
    count = len(images)
    if count < 2:
        raise ConfigError("data", config.data, f"{count} image; training needs at least two")
    if config.batch_size is None and filled["batch_size"] > count:
        splits = numbers["num_splits"]
        if "num_splits" not in config.numbers:
            numbers["num_splits"] = splits = max(min(splits, count // 2), 1)
        filled["batch_size"] = max(count // splits * splits, 2)
        fitted = f"batch size {filled['batch_size']}, splits of batch norm {splits}"
        images.notes.append(f"fitted to {count} images: {fitted}")
    if filled["batch_size"] > count:
        reason = f"larger than the data, which has {count} images"
        raise ConfigError("batch_size", filled["batch_size"], reason)
    if config.warmup_epochs is None:
        # The default warm-up is meant for the default number of epochs.
        filled["warmup_epochs"] = min(float(filled["warmup_epochs"]), filled["epochs"] / 10)


def _check_together(filled: dict[str, Any], accumulate: int) -> None:
    batch, splits = filled["batch_size"], filled.get("num_splits", 1)
    if batch % splits:
        raise ConfigError(
            "batch_size", batch, f"must be a multiple of --num-splits {splits} (split batch norm)"
        )
    if batch < 2 * splits:
        reason = f"leaves one image in each of --num-splits {splits}; batch norm needs two"
        raise ConfigError("batch_size", batch, reason)
    part, rest = divmod(batch, accumulate)
    if accumulate > 1 and (rest or part % splits or part < 2 * splits):
        norm = f" a multiple of --num-splits {splits} and" if splits > 1 else ""
        reason = f"--batch-size {batch} must divide into equal parts of{norm} two images or more"
        raise ConfigError("accumulate", accumulate, reason)
    if filled["warmup_epochs"] > filled["epochs"]:
        reason = f"longer than the run of --epochs {filled['epochs']}"
        raise ConfigError("warmup_epochs", filled["warmup_epochs"], reason)
    neighbors, rows = filled.get("num_neighbors", 0), filled.get("queue_size")
    if rows is not None and neighbors > rows:
        reason = f"more than the rows of --queue-size {rows}"
        raise ConfigError("num_neighbors", neighbors, reason)
