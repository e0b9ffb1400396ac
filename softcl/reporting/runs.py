"""What run folders hold, read for a report; anything may be damaged, and most may be missing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcl.train.checkpoint import CheckpointError, check_content, find_checkpoint
from softcl.train.folder import (
    BASELINES,
    CONFIG,
    METRICS,
    PICTURE,
    RESULT,
    RunFolderError,
    numbers_of,
    read_json,
    read_metrics,
    read_run_config,
)

Row = dict[str, Any]
MEASURES = ("knn_top1", "rankme")  # of which a run has one at least, the first being its choice
# Columns that an evaluation fills.
EVALUATED = (*MEASURES, "knn_purity", "feature_spread", "alignment", "uniformity")


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        name: told apart from the others of the report.
        config, versions, device, backend: of config.json.
        steps: rows of metrics.jsonl with the numbers of training steps.
        evaluations: rows with a k-NN accuracy, or with RankMe where there are no labels.
        baselines, result: of the JSON files; empty while there are none.
    """

    name: str
    path: Path
    config: Row
    versions: Row
    device: str
    backend: str
    steps: list[Row]
    evaluations: list[Row]
    baselines: Row
    result: Row

    @property
    def picture(self) -> Path | None:
        path = self.path / PICTURE
        return path if path.exists() else None

    @property
    def finished(self) -> bool:
        return bool(self.result)

    def best(self) -> Row | None:
        """The evaluation with the highest accuracy or, without labels, the highest RankMe."""
        for measure in MEASURES:
            rows = [row for row in self.evaluations if row.get(measure) is not None]
            if rows:
                return max(rows, key=lambda row: row[measure])
        return None

    def median(self, column: str) -> float | None:
        """Of a column of the training rows, after the first tenth (warming up)."""
        values = sorted(value for _, value in self.series(column)[len(self.steps) // 10 :])
        return values[len(values) // 2] if values else None

    def series(self, column: str, x: str = "epoch") -> list[tuple[float, float]]:
        """(x, value) of the rows that have both."""
        rows = self.evaluations if column in EVALUATED else self.steps
        return [
            (row[x], row[column])
            for row in rows
            if row.get(column) is not None and row.get(x) is not None
        ]


def read_runs(paths: list[Path]) -> list[RunData]:
    """Read the runs, in the order given.

    Raises:
        RunFolderError: a path is no run folder, or is given twice.
    """
    folders = [Path(os.path.realpath(path)) for path in paths]  # of loops of links too
    for path, folder in zip(paths, folders, strict=True):
        if folders.count(folder) > 1:
            raise RunFolderError(f"{path}: is given twice")
    return [read_run(path, name) for path, name in zip(paths, short_names(folders), strict=True)]


def short_names(folders: list[Path]) -> list[str]:
    """The folders' own names or, where two are alike, their paths below what they share."""
    if len({folder.name for folder in folders}) == len(folders):
        return [folder.name for folder in folders]
    shared = os.path.commonpath([str(folder) for folder in folders])
    return [os.path.relpath(folder, shared) for folder in folders]


def read_run(path: Path, name: str) -> RunData:
    content = read_json(path / CONFIG) or {}
    config = content.get("config")
    if read_run_config(path / CONFIG) is None:
        config = _stored_config(path, config if isinstance(config, dict) else None)
    versions, backend = content.get("versions"), content.get("backend")
    rows = read_metrics(path / METRICS) if (path / METRICS).exists() else []
    return RunData(
        name=name,
        path=path,
        config=config,
        versions=versions if isinstance(versions, dict) else {},
        device=str(content.get("device", "")),
        backend=str(backend.get("name", "")) if isinstance(backend, dict) else "",
        steps=[row for row in rows if row.get("loss") is not None],
        evaluations=[row for row in rows if any(row.get(name) is not None for name in MEASURES)],
        baselines=numbers_of(read_json(path / BASELINES)),
        result=numbers_of(read_json(path / RESULT)),
    )


def _stored_config(path: Path, written: Row | None) -> Row:
    """The settings of a run whose config.json is damaged or of another version.

    Those in its checkpoint; where none is whole, what is written.

    Raises:
        RunFolderError: there is neither.
    """
    try:
        file, content = find_checkpoint(path)
        check_content(file, content, {"config": dict})
    except CheckpointError as error:
        if written is not None:
            return written
        reason = f"holds no run (no readable {CONFIG}, and no checkpoint: {error})"
        raise RunFolderError(f"{path}: {reason}") from error
    return content["config"]
