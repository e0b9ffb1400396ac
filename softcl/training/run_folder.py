"""The folder of a run: what is in it, who may write to it, and how it survives a kill.

config.json      the configuration, defaults filled in, and where it ran
metrics.jsonl    one JSON object per line, see RunFolder.log
events.*         the same numbers for TensorBoard
last.pt          the newest checkpoint (checkpoint.py); last-1.pt and best.pt: see rotation.py
baselines.json   k-NN accuracy of raw pixels and of the untrained backbone
skipped.txt      unreadable images, if there were any
neighbors.png    images and their nearest training images
views.png        images and what the networks see of them, with --show-views
result.json      the final numbers; its presence says that the run is finished
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softcl.training.checkpoint import replace_file
from softcl.training.events import EventFile
from softcl.training.lock import FolderLock
from softcl.training.rotation import (
    BEST,
    LAST,
    SET_ASIDE,
    earlier,
    name_too,
    put_back,
    write_rotating,
)
from softcl.training.view_sheet import SHEET

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
BASELINES, PICTURE, SKIPPED = "baselines.json", "neighbors.png", "skipped.txt"
_FILES = (CONFIG, METRICS, LAST, BEST, SET_ASIDE, RESULT, BASELINES, PICTURE, SKIPPED, SHEET)
_EVENTS = "events.out.tfevents.*"


class RunFolderError(RuntimeError):
    """The folder cannot be used; the message names its path and what to do."""


class RunFolder:
    """Paths and files of one run, which no other process may write to until it is closed.

    Make one with `create`, `create_next` or `reopen`; a context closes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: int | None = None
        self._events: EventFile | None = None
        self._resumed_at: int | None = None
        self._lock = FolderLock()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_lock(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._lock.take(self.path):
            raise RunFolderError(f"{self.path}: another process is writing to this run")

    @classmethod
    def check_free(cls, path: Path, *, overwrite: bool = False) -> None:
        """Refuse a folder that `create` would refuse, and change nothing.

        Raises:
            RunFolderError: the folder holds a run (unless it may be overwritten), or other files.
        """
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path}: is a file; --out needs a folder")
        if not path.is_dir() or not any(path.iterdir()):
            return
        if not (path / CONFIG).exists():
            raise RunFolderError(f"{path}: holds other files and no run; name another folder")
        if not overwrite:
            raise RunFolderError(cls(path)._taken())

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
        for _, checkpoint in earlier(path):
            checkpoint.unlink(missing_ok=True)
        # config.json, which marks a run, goes last: an interrupted removal can be repeated.
        for name in (*(name for name in _FILES if name != CONFIG), CONFIG):
            (path / name).unlink(missing_ok=True)
        folder._remove_events()
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
                folder = cls(path)
                folder._take_lock()
                return folder
            except FileExistsError:
                number += 1

    @classmethod
    def reopen(cls, path: Path, step: int, checkpoint: Path) -> RunFolder:
        """An existing run, continued from a checkpoint of `step`: what it logged later is dropped.

        Raises:
            RunFolderError: another process writes to it.
        """
        folder = cls(path)
        folder._take_lock()
        put_back(path, checkpoint)
        folder._drop_metrics_after(step)
        folder._resumed_at = step
        for name in (RESULT, PICTURE):
            (path / name).unlink(missing_ok=True)
        return folder

    def _taken(self) -> str:
        if (self.path / RESULT).exists():
            return f"{self.path}: holds a finished run; name another --out or add --overwrite"
        if holds_checkpoint(self.path):
            return (
                f"{self.path}: holds an unfinished run; continue it with --resume {self.path}, "
                "or add --overwrite"
            )
        return f"{self.path}: holds a run without a checkpoint; add --overwrite to start over"

    def _remove_events(self) -> None:
        for path in self.path.glob(_EVENTS):
            path.unlink(missing_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.path / LAST

    def write_checkpoint(self, content: dict[str, Any], *, keep: int) -> None:
        """Make it the newest of `keep` checkpoints; see `rotation.write_rotating`."""
        write_rotating(self.path, content, keep=keep)

    def mark_best(self) -> None:
        """Give the newest checkpoint the name of the best as well."""
        name_too(self.path / LAST, self.path / BEST)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a whole file, atomically."""
        replace_file(self.path / name, text.encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of one of the folder's JSON files; None if it is absent or unreadable."""
        return read_json(self.path / name)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, and its numbers to the TensorBoard events.

        A line has ``step`` (steps done), ``epoch`` and either the training numbers (loss, lr,
        images_per_s, data_wait, confidence, ...) or an evaluation (knn_top1). NaN, which JSON
        lacks, is written as null. The line goes out in one write, so a killed process leaves whole
        lines.
        """
        plain = {key: _json_number(value) for key, value in row.items()}
        line = (json.dumps(plain) + "\n").encode()
        if self._metrics is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._metrics = os.open(self.path / METRICS, flags, 0o644)
        try:
            written = os.write(self._metrics, line)
            if written != len(line):  # the disk is full: the rest fails, and says so
                os.write(self._metrics, line[written:])
        except OSError as error:
            reason = error.strerror or error
            raise RunFolderError(f"{self.path / METRICS}: cannot write: {reason}") from error
        self._log_events(plain)

    def _log_events(self, row: Mapping[str, Any]) -> None:
        if self._events is None:
            purge = None if self._resumed_at is None else self._resumed_at + 1
            self._events = EventFile(self.path, purge)
        hidden = ("step", "epoch", "seconds")
        scalars = {k: v for k, v in row.items() if k not in hidden and v is not None}
        self._events.add(row["step"], scalars)

    def _drop_metrics_after(self, step: int) -> None:
        path = self.path / METRICS
        if not path.exists():
            return
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        replace_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def close(self) -> None:
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None
        if self._events is not None:
            self._events.close()
            self._events = None
        self._lock.release()


class Onlooker(RunFolder):
    """The folder as it is to the processes that do not write: it takes everything and does nothing.

    The first process has the `RunFolder` itself.
    """

    def write_checkpoint(self, content: dict[str, Any], *, keep: int) -> None:
        pass

    def mark_best(self) -> None:
        pass

    def write_text(self, name: str, text: str) -> None:
        pass

    def log(self, row: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def holds_checkpoint(path: Path) -> bool:
    """Whether a folder has a checkpoint to go on from."""
    return (path / LAST).exists() or bool(earlier(path))


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, broken lines left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
