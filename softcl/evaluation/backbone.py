"""The backbone in a checkpoint of a training run, ready for features or export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcl.nn import build_backbone
from softcl.training.checkpoint import CheckpointError, read_checkpoint
from softcl.training.config import ConfigError, TrainConfig
from softcl.training.rotation import BEST, read_newest

NETWORKS = ("student", "teacher")


@dataclass(frozen=True)
class Stored:
    """A backbone in eval mode, and the run that it comes from.

    Attributes:
        path: of the checkpoint.
        config: of the run.
        content: of the checkpoint.
    """

    path: Path
    backbone: nn.Module
    config: TrainConfig
    content: dict[str, Any]


def find_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a path names: a file, or a run folder's best.pt or else newest.

    Raises:
        CheckpointError: there is none that is whole.
    """
    if not path.is_dir():
        return path, read_checkpoint(path)
    if (path / BEST).exists():
        return path / BEST, read_checkpoint(path / BEST)
    newest, content, _ = read_newest(path)
    return newest, content


def load_backbone(path: Path, network: str = "student") -> Stored:
    """Read a checkpoint and build its backbone: plain batch norm, eval mode, on the CPU.

    Args:
        path: a checkpoint or a run folder.
        network: "student" or "teacher".

    Raises:
        CheckpointError: there is none, it is damaged, or of another version.
        ConfigError: its configuration is not one of this version.
    """
    file, content = find_checkpoint(path)
    try:
        config = TrainConfig.from_dict(content["config"])
        stored = content[network]
    except KeyError as error:
        raise CheckpointError(f"{file}: not a training checkpoint (without {error})") from error
    try:
        backbone = build_backbone(config.arch, config.image_size)
    except ValueError as error:
        raise ConfigError("arch", config.arch, str(error)) from error
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file}: does not fit {config.arch}: {reason}") from error
    return Stored(file, backbone.eval().requires_grad_(False), config, content)


def features_of(backbone: nn.Module, device: torch.device) -> nn.Module:
    """The backbone on a device, in the memory order that convolutions like."""
    return backbone.to(device).to(memory_format=torch.channels_last)
