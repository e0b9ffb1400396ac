"""Continuing a run: its checkpoint, its configuration, and what may differ this time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcl.training.checkpoint import CheckpointError, read_checkpoint
from softcl.training.config import (
    IDENTITY,
    ConfigError,
    TrainConfig,
    first_difference,
    flag_name,
    identity_hash,
)
from softcl.training.run_folder import CHECKPOINT, CONFIG, RESULT, RunFolderError, read_json

FORMAT = 2  # of a checkpoint's content
_PARTS = (
    "step",
    "student",
    "teacher",
    "queues",
    "optimizer",
    "heads",
    "config",
    "config_hash",
    "meter",
)


@dataclass(frozen=True)
class StoredRun:
    """A run as its checkpoint left it.

    Attributes:
        folder: of the run.
        config: to go on with: the stored one and what the flags may change.
        content: of the checkpoint.
        finished: the run has nothing left to do.
    """

    folder: Path
    config: TrainConfig
    content: dict[str, Any]
    finished: bool


def read_run(given: dict[str, Any]) -> StoredRun:
    """The run that ``given["resume"]`` names, with the other given flags applied.

    Raises:
        ConfigError: a given flag would make it another run.
        RunFolderError, CheckpointError: there is nothing usable to continue.
    """
    if "out" in given:
        raise ConfigError("out", given["out"], "cannot be combined with --resume")
    path = Path(given["resume"]).expanduser()
    file = path / CHECKPOINT if path.is_dir() else path
    if path.is_dir() and not file.exists():
        if (path / CONFIG).exists():
            reason = "stopped before its first checkpoint; start it again with --overwrite"
            raise RunFolderError(f"{path}: {reason}")
        raise RunFolderError(f"{path}: holds no run to resume (no {CHECKPOINT})")
    content = read_checkpoint(file)
    _check_content(file, content)
    stored = TrainConfig.from_dict(content["config"])
    _check_config_file(file.parent / CONFIG, stored)
    for name, value in given.items():
        if name in IDENTITY and value != getattr(stored, name):
            reason = f"the run to resume has {flag_name(name)} {getattr(stored, name)}"
            raise ConfigError(name, value, reason)
    # What the earlier command limited is done with; how it computed stays, unless said otherwise.
    changes = {"max_steps": None, "overwrite": False}
    if {"fused", "backend"} & given.keys():
        changes |= {"fused": None, "backend": "auto"}
    changes |= {name: value for name, value in given.items() if name not in IDENTITY}
    config = dataclasses.replace(stored, **changes)
    return StoredRun(file.parent, config, content, (file.parent / RESULT).exists())


def _check_content(file: Path, content: dict[str, Any]) -> None:
    missing = [name for name in _PARTS if name not in content]
    if content.get("format") != FORMAT or missing:
        what = f"format {content.get('format')}" if not missing else f"without {missing[0]!r}"
        raise CheckpointError(f"{file}: not a training checkpoint of this version ({what})")


def _check_config_file(path: Path, stored: TrainConfig) -> None:
    """Refuse a config.json that was edited: the checkpoint was made with other settings."""
    content = read_json(path)
    if content is None or not isinstance(content.get("config"), dict):
        return  # a checkpoint outside of its folder: it knows its own configuration
    written = TrainConfig.from_dict(content["config"])
    if identity_hash(written) == identity_hash(stored):
        return
    name = first_difference(stored, written)
    raise RunFolderError(
        f"{path}: has {flag_name(name)} {getattr(written, name)}, but the checkpoint was made with "
        f"{getattr(stored, name)}; put it back, or start a new run"
    )
