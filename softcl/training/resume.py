"""Continuing a run: its checkpoint, its configuration, and what may differ this time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from softcl.training.rotation import LAST, read_newest
from softcl.training.run_folder import (
    CONFIG,
    RESULT,
    RunFolderError,
    holds_checkpoint,
    read_json,
)

FORMAT = 2  # of a checkpoint's content
AUTO = "auto"
_PARTS = (
    *("step", "student", "teacher", "queues", "optimizer", "heads"),
    *("config", "config_hash", "meter"),
)


@dataclass(frozen=True)
class StoredRun:
    """A run as its checkpoint left it.

    Attributes:
        folder: of the run.
        config: to go on with: the stored one and what the flags may change.
        checkpoint, content: the file and what is in it.
        finished: the run has nothing left to do.
        warnings: lines about newer checkpoints that could not be read.
    """

    folder: Path
    config: TrainConfig
    checkpoint: Path
    content: dict[str, Any]
    finished: bool
    warnings: list[str]


def settle_restart(given: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The flags of a worker that torchrun started again: go on with the run in --out.

    torchrun repeats the command as it was; without --out nothing says which run it was.
    """
    restarted = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not restarted or "resume" in given or "out" not in given:
        return given
    rest = {name: value for name, value in given.items() if name != "overwrite"}
    return {**rest, "resume": AUTO}


def settle_auto(given: dict[str, Any]) -> dict[str, Any]:
    """What ``--resume auto`` means: continue the run in --out if there is one, else start it.

    Raises:
        ConfigError: there is no --out.
    """
    if given.get("resume") != AUTO:
        return given
    if "out" not in given:
        raise ConfigError("resume", AUTO, "needs --out, the folder to continue or to start in")
    rest = {name: value for name, value in given.items() if name not in ("resume", "out")}
    path = Path(given["out"]).expanduser()
    if holds_checkpoint(path):
        return {**rest, "resume": given["out"]}
    # Killed before its first checkpoint: nothing is lost by starting over.
    stub = {"overwrite": True} if (path / CONFIG).exists() else {}
    return {**rest, "out": given["out"], **stub}


def read_run(given: dict[str, Any]) -> StoredRun:
    """The run that ``given["resume"]`` names, with the other given flags applied.

    Raises:
        ConfigError: a given flag would make it another run.
        RunFolderError, CheckpointError: there is nothing usable to continue.
    """
    if "out" in given:
        raise ConfigError("out", given["out"], "cannot be combined with --resume")
    path = Path(given["resume"]).expanduser()
    file, content, warnings = _read(path)
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
    finished = (file.parent / RESULT).exists() and not warnings
    return StoredRun(file.parent, config, file, content, finished, warnings)


def _read(path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint that --resume names: the file, or the newest of the folder that is whole."""
    if not path.is_dir():
        return path, read_checkpoint(path), []
    if not holds_checkpoint(path):
        if (path / CONFIG).exists():
            reason = "stopped before its first checkpoint; start it again with --overwrite"
            raise RunFolderError(f"{path}: {reason}")
        raise RunFolderError(f"{path}: holds no run to resume (no {LAST})")
    return read_newest(path)


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
