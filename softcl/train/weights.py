"""What ``--init SPEC``, and whatever else takes a backbone from elsewhere, understands by SPEC.

timm:NAME[.TAG]    timm's published weights, by timm's own loading
a run              its folder, or a checkpoint in it
a file             safetensors or torch.save, with the keys of softcl.nn.pretrained
a folder           with model.safetensors, as the Hugging Face Hub has them
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from softcl.data import ImageSet
from softcl.errors import CheckpointError, ConfigError
from softcl.files import user_path
from softcl.nn import Encoder, build_backbone
from softcl.nn.pretrained import Pretrained, fit_backbone
from softcl.nn.weights import TIMM, Weights, WeightsError, read_file, read_timm
from softcl.train.checkpoint import is_checkpoint, load_backbone
from softcl.train.config import TrainConfig
from softcl.train.optim import freeze_parts
from softcl.train.step import derived_seed

_OF_FOLDER = "model.safetensors"


def read_weights(spec: str, network: str = "student") -> Weights:
    """The weights that a spec names, not yet in a backbone.

    Args:
        network: of a run, "student" or "teacher".

    Raises:
        WeightsError: there are none, or they cannot be read; one line.
    """
    if spec.startswith(TIMM):
        return read_timm(spec.removeprefix(TIMM))
    try:
        path = user_path(spec)
    except OSError as error:
        raise WeightsError(f"{spec}: {error.strerror}") from error
    if path.is_dir() and (path / _OF_FOLDER).is_file():
        return read_file(path / _OF_FOLDER)
    if path.is_dir() or is_checkpoint(path):
        return _read_run(path, network)
    return read_file(path)


def _read_run(path: Path, network: str) -> Weights:
    try:
        stored = load_backbone(path, network)
    except (CheckpointError, ConfigError) as error:
        raise WeightsError(str(error)) from error
    config = stored.config
    known = {"arch": config.arch, "image_size": config.image_size}
    if "normalisation" in stored.content:
        known["mean"], known["std"] = map(tuple, stored.content["normalisation"])
        known["normalisation"] = "normalised as in its run"
    return Weights(str(stored.path), {"": stored.backbone.state_dict()}, **known)


def load_pretrained(
    spec: str, image_size: int | None = None, arch: str | None = None, *, network: str = "student"
) -> Pretrained:
    """A backbone with the weights that a spec names; on the CPU, in train mode.

    Args:
        image_size: of the images it will see; None for the weights' own, or 224.
        arch: None for the one that the weights name, or that their keys fit.
        network: of a run, "student" or "teacher".

    Raises:
        WeightsError: they cannot be read or do not fit; one line.
    """
    try:
        return fit_backbone(read_weights(spec, network), image_size, arch)
    except ValueError as error:
        raise WeightsError(f"{spec}: {error}") from error


# --------------------------------------------------------------------------------- of a run


def read_first_weights(spec: str) -> Weights:
    """The weights of --init.

    Raises:
        WeightsError: they cannot be read.
    """
    try:
        return read_weights(spec)
    except WeightsError as error:
        raise WeightsError(f"--init {error}") from error


def fit_first_weights(weights: Weights, config: TrainConfig) -> Pretrained:
    """The backbone with the weights of --init; what they lack is random, by the run's seed.

    Raises:
        ConfigError: the backbone cannot take images of this size.
        WeightsError: the weights do not fit it.
    """
    torch.manual_seed(derived_seed(config.seed, "init"))
    try:
        return fit_backbone(weights, config.image_size, config.arch)
    except ValueError as error:
        raise ConfigError("arch", config.arch, str(error)) from error
    except WeightsError as error:
        raise WeightsError(f"--init {error}") from error


def normalise_as(sets: Iterable[ImageSet], mean: Sequence[float], std: Sequence[float]) -> None:
    """Normalise images as those that the weights of --init were trained on."""
    for images in sets:
        images.mean, images.std = tuple(mean), tuple(std)
        images.statistics = "the first weights"


def untrained_encoder(config: TrainConfig, device: torch.device) -> Encoder:
    """The backbone of a run with random weights, for evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "init"))
        backbone = build_backbone(config.arch, config.image_size)
    return Encoder(backbone, nn.Identity()).to(device)


def freeze(config: TrainConfig, encoder: Encoder) -> None:
    """Freeze what --freeze names.

    Raises:
        ConfigError: the backbone has no such part.
    """
    try:
        if config.freeze is not None:
            freeze_parts(encoder.backbone, config.freeze)
    except ValueError as error:
        raise ConfigError("freeze", config.freeze, str(error)) from error
