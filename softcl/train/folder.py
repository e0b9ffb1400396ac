"""The folder of a run: what is in it, who may write to it, and how a run goes on from it.

config.json      the configuration, defaults filled in, and where it ran
metrics.jsonl    one JSON object per line, see log.py
events.*         the same numbers for TensorBoard
last.pt          the newest checkpoint; last-1.pt, best.pt and set-aside.pt: see checkpoint.py
baselines.json   k-NN accuracy of raw pixels and of the untrained backbone
skipped.txt      unreadable images, if there were any
neighbors.png    images and their nearest training images
views.png        images and what the networks see of them, with --show-views
result.json      the final numbers; its presence says that the run is finished
.lock            held by the process that writes
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcl.command import LARGEST
from softcl.distributed.world import number_from
from softcl.errors import CheckpointError, ConfigError, RunFolderError, flag_name
from softcl.files import TEMPORARY, check_folder, read_file, replace_file, user_path
from softcl.train.checkpoint import (
    BEST,
    ENTRIES,
    LAST,
    PREVIOUS,
    SET_ASIDE,
    check_content,
    config_of,
    holds_checkpoint,
    put_back,
    read_checkpoint,
    read_newest,
)
from softcl.train.config import TrainConfig, check_numbers, own_settings

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
BASELINES, PICTURE, SKIPPED = "baselines.json", "neighbors.png", "skipped.txt"
VIEWS, LOCK = "views.png", ".lock"
_CHECKPOINTS = (LAST, PREVIOUS, BEST, SET_ASIDE)
_FILES = (*_CHECKPOINTS, METRICS, RESULT, BASELINES, PICTURE, SKIPPED, VIEWS)
_EVENTS = "events.out.tfevents.*"

FORMAT = 3  # of a checkpoint's content
AUTO = "auto"


class RunFolder:
    """The files of one run, which no other process may write to until it is closed.

    Make one with `create`, `create_next` or `reopen`; a context closes it.

    Attributes:
        path: of the folder.
        resumed_at: the step from which the run goes on; None for a new one.
    """

    def __init__(self, path: Path, resumed_at: int | None = None) -> None:
        self.path, self.resumed_at = path, resumed_at
        self._lock: Any = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take_lock(self) -> None:
        """A lock that ends with the process that holds it, by kill -9 too.

        Where the file system has no locks (some NFS), nothing is locked.
        """
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
            self._lock = lock
        except Timeout:
            reason = "another process is writing to this run"
            raise RunFolderError(f"{self.path}: {reason}") from None
        except (NotImplementedError, OSError):
            if not self.path.is_dir():
                raise

    @classmethod
    def check_free(cls, path: Path, *, overwrite: bool = False) -> None:
        """Refuse a folder that `create` would refuse, and change nothing.

        Raises:
            RunFolderError: the folder holds a run (unless it may be overwritten), or other files.
            OSError: nothing can be written there.
        """
        try:
            str(path).encode()
        except UnicodeEncodeError:
            reason = "no name in UTF-8, which TensorBoard needs; name another folder"
            raise RunFolderError(f"{path}: {reason}") from None
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path}: is a file, and has to be a folder")
        check_folder(path)
        if not path.is_dir() or all(_is_passing(file.name) for file in path.iterdir()):
            return
        if not (path / CONFIG).exists():
            raise RunFolderError(f"{path}: holds other files and no run; name another folder")
        if overwrite:
            return
        if (path / RESULT).exists():
            reason = "holds a finished run; name another --out or add --overwrite"
        elif holds_checkpoint(path):
            reason = f"holds an unfinished run; continue it with --resume {shlex.quote(str(path))}"
            reason += ", or add --overwrite"
        else:
            reason = "holds a run without a checkpoint; add --overwrite to start over"
        raise RunFolderError(f"{path}: {reason}")

    @classmethod
    def create(cls, path: Path, *, overwrite: bool = False) -> RunFolder:
        """A new run in `path`: absent, empty, or holding a run to overwrite.

        Overwriting removes the files of a run and no others.

        Raises:
            RunFolderError: as `check_free`; or another process writes to it.
        """
        cls.check_free(path, overwrite=overwrite)
        folder = cls(path)
        folder._take_lock()
        # config.json, which marks a run, goes last: an interrupted removal can be repeated.
        passing = [file.name for pattern in (_EVENTS, TEMPORARY) for file in path.glob(pattern)]
        for name in (*_FILES, *passing, CONFIG):
            (path / name).unlink(missing_ok=True)
        return folder

    @classmethod
    def create_next(cls, parent: Path, stem: str) -> RunFolder:
        """A new folder ``parent/stem-NN`` with the first free number."""
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = parent / f"{stem}-{number:02d}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
                continue
            folder = cls(path)
            folder._take_lock()
            return folder

    @classmethod
    def reopen(cls, path: Path, step: int, checkpoint: Path) -> RunFolder:
        """An existing run, continued from a checkpoint of `step`: what it logged later is dropped.

        Raises:
            RunFolderError: another process writes to it.
        """
        folder = cls(path, resumed_at=step)
        folder._take_lock()
        put_back(path, checkpoint)
        for left in path.glob(TEMPORARY):  # by a process that was killed
            left.unlink()
        if (path / METRICS).exists():
            kept = [row for row in read_metrics(path / METRICS) if row["step"] <= step]
            folder.write_text(METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        for name in (RESULT, PICTURE):
            (path / name).unlink(missing_ok=True)
        return folder

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(finite(content), indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a whole file, atomically."""
        replace_file(self.path / name, text.encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of one of the folder's JSON files; None if it is absent or unreadable."""
        return read_json(self.path / name)


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """With None in place of the numbers that JSON lacks."""
    bad = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return {key: None if key in bad else value for key, value in row.items()}


def _is_passing(name: str) -> bool:
    """Whether a file belongs to a process that writes, or was killed, and not to a run."""
    return name == LOCK or Path(name).match(TEMPORARY)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, whatever is there in its place."""
    try:
        content = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_run_config(path: Path) -> TrainConfig | None:
    """The configuration in a config.json; None where it holds none that can be used."""
    try:
        return TrainConfig.of(**(read_json(path) or {})["config"])
    except (ConfigError, KeyError, TypeError):
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl: numbers, or None; what is neither is left out."""
    rows = []
    for line in read_file(path).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        row = numbers_of(row)
        if isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def numbers_of(content: Any) -> dict[str, Any]:
    """The finite numbers of a JSON object, and its nulls."""
    if not isinstance(content, dict):
        return {}
    return {name: value for name, value in content.items() if value is None or _is_number(value)}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value)


# ------------------------------------------------------------------------------------- going on


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
    """The settings of a worker that torchrun started again: go on with the run in --out.

    torchrun repeats the command as it was; without --out nothing says which run it was.
    """
    restarted = number_from(environment, "TORCHELASTIC_RESTART_COUNT", 0) > 0
    if not restarted or "resume" in given or "out" not in given:
        return given
    rest = {name: value for name, value in given.items() if name != "overwrite"}
    return {**rest, "resume": AUTO}


def settle_auto(given: dict[str, Any]) -> dict[str, Any]:
    """What ``--resume auto`` means: continue the run in --out if there is one, else start it.

    Raises:
        ConfigError: there is no --out; or --init beside a run to resume.
    """
    if given.get("resume") != AUTO:
        if "resume" in given and "init" in given:
            reason = "cannot be combined with --resume RUN, which goes on from the run's weights"
            raise ConfigError("init", given["init"], reason)
        return given
    if "out" not in given:
        raise ConfigError("resume", AUTO, "needs --out, the folder to continue or to start in")
    rest = {name: value for name, value in given.items() if name not in ("resume", "out")}
    path = user_path(given["out"])
    if holds_checkpoint(path):
        return {**rest, "resume": given["out"]}
    # Killed before its first checkpoint: nothing is lost by starting over.
    stub = {"overwrite": True} if (path / CONFIG).exists() else {}
    return {**rest, "out": given["out"], **stub}


def read_run(given: dict[str, Any]) -> StoredRun:
    """The run that ``given["resume"]`` names, with the other given settings applied.

    Raises:
        ConfigError: a given setting would make it another run.
        RunFolderError, CheckpointError: there is nothing usable to continue.
    """
    if "out" in given:
        raise ConfigError("out", given["out"], "cannot be combined with --resume")
    file, content, warnings = _read(user_path(given["resume"]))
    if content.get("format") != FORMAT:
        what = f"format {content.get('format')}"
        raise CheckpointError(f"{file}: not a training checkpoint of this version ({what})")
    check_content(file, content, ENTRIES)
    stored = config_of(file, content)
    _check_config_file(file.parent / CONFIG, stored)
    identity, own = stored.identity(), own_settings()
    for name, value in given.items():
        if name in identity and value != identity[name]:
            reason = f"the run to resume has {flag_name(name)} {identity[name]}"
            raise ConfigError(name, value, reason)
        if name not in own:
            check_numbers(stored.method, {name: value})
    # What the earlier command limited is done with; how it computed stays, unless said otherwise.
    changes: dict[str, Any] = {"max_steps": None, "overwrite": None}
    if {"fused", "backend"} & given.keys():
        changes |= {"fused": None, "backend": None}
    changes |= {name: value for name, value in given.items() if name not in identity}
    finished = (file.parent / RESULT).exists() and not warnings
    return StoredRun(file.parent, stored.changed(**changes), file, content, finished, warnings)


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


def _check_config_file(path: Path, stored: TrainConfig) -> None:
    """Refuse a config.json that was edited: the checkpoint was made with other settings."""
    config = read_run_config(path)
    if config is None:
        return  # absent or damaged: the checkpoint knows its own configuration
    written, made = config.identity(), stored.identity()
    for name in {**made, **written}:
        if written.get(name) != made.get(name):
            raise RunFolderError(
                f"{path}: has {flag_name(name)} {written.get(name)}, but the checkpoint was made "
                f"with {made.get(name)}; put it back, or start a new run"
            )
