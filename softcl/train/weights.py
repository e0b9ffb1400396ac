"""What ``--init SPEC``, and whatever else takes a backbone from elsewhere, understands by SPEC.

timm:NAME[.TAG]    timm's published weights, by timm's own loading
a run              its folder, or a checkpoint in it
a file             safetensors or torch.save, with the keys of softcl.nn.pretrained
a folder           with model.safetensors, as the Hugging Face Hub has them
"""

from __future__ import annotations

from pathlib import Path

from softcl.command import ConfigError
from softcl.nn.pretrained import Pretrained, fit_backbone
from softcl.nn.weights import TIMM, Weights, WeightsError, read_file, read_timm
from softcl.train import checkpoint

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
    path = Path(spec).expanduser()
    if path.is_dir() and (path / _OF_FOLDER).is_file():
        return read_file(path / _OF_FOLDER)
    if path.is_dir() or checkpoint.is_checkpoint(path):
        return _read_run(path, network)
    return read_file(path)


def _read_run(path: Path, network: str) -> Weights:
    try:
        stored = checkpoint.load_backbone(path, network)
    except (checkpoint.CheckpointError, ConfigError) as error:
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
