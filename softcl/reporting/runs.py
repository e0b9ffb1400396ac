"""What run folders hold, read for a report; everything but config.json may be missing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcl.train.folder import (
    BASELINES,
    CONFIG,
    METRICS,
    PICTURE,
    RESULT,
    RunFolderError,
    read_json,
    read_metrics,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        name: told apart from the others of the report.
        config, versions, device, backend: of config.json.
        steps: rows of metrics.jsonl with the numbers of training steps.
        evaluations: rows with a k-NN accuracy.
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
        """The evaluation with the highest accuracy."""
        return max(self.evaluations, key=lambda row: row["knn_top1"], default=None)

    def median(self, column: str) -> float | None:
        """Of a column of the training rows, after the first tenth (warming up)."""
        values = sorted(value for _, value in self.series(column)[len(self.steps) // 10 :])
        return values[len(values) // 2] if values else None

    def series(self, column: str, x: str = "epoch") -> list[tuple[float, float]]:
        """(x, value) of the rows that have both."""
        rows = self.evaluations if column in ("knn_purity", "feature_spread") else self.steps
        rows = self.evaluations if column == "knn_top1" else rows
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
    folders = [path.resolve() for path in paths]
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
    content = read_json(path / CONFIG)
    if content is None or not isinstance(content.get("config"), dict):
        raise RunFolderError(f"{path}: holds no run (no readable {CONFIG})")
    rows = read_metrics(path / METRICS) if (path / METRICS).exists() else []
    return RunData(
        name=name,
        path=path,
        config=content["config"],
        versions=content.get("versions", {}),
        device=str(content.get("device", "")),
        backend=str((content.get("backend") or {}).get("name", "")),
        steps=[row for row in rows if row.get("loss") is not None],
        evaluations=[row for row in rows if row.get("knn_top1") is not None],
        baselines=read_json(path / BASELINES) or {},
        result=read_json(path / RESULT) or {},
    )
