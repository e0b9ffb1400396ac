"""Scores that `softcl evaluate` wrote, told apart by the run whose checkpoint they are of."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcl.errors import ConfigError
from softcl.files import read_file
from softcl.reporting.runs import RunData

_LARGEST = 1 << 20  # bytes of a file in a run folder that may be one
_SHARES = re.compile(r"(\w+_)?top\d+|precision_at_\d+")
_MEASURES = {
    "knn": "k-NN",
    "lbfgs": "linear probe, L-BFGS",
    "sgd": "linear probe, SGD",
    "retrieval": "retrieval",
}


@dataclass(frozen=True)
class Scores:
    """One file.

    Attributes:
        checkpoint: that was measured, as it was named.
        about: network, images and their size, in words.
        values: shares in [0, 1] by what they are.
    """

    path: Path
    checkpoint: str
    about: str
    values: dict[str, float]


def read_scores(path: Path) -> Scores:
    """Scores out of a JSON file.

    Raises:
        ConfigError: it holds none.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(read_file(path))
    except ValueError as error:
        raise ConfigError("scores", path, "is no JSON") from error
    scores = _scores_of(path, content)
    if scores is None:
        raise ConfigError("scores", path, "holds nothing that softcl evaluate writes")
    return scores


def _scores_of(path: Path, content: Any) -> Scores | None:
    if not isinstance(content, dict) or not isinstance(content.get("checkpoint"), str):
        return None
    values = {}
    for measure, found in content.items():
        if not isinstance(found, dict):
            continue
        for name, value in found.items():
            if _SHARES.fullmatch(name) and isinstance(value, (int, float)) and 0 <= value <= 1:
                words = name.replace("_", " ").replace("top", "top-")
                values[f"{_MEASURES.get(measure, measure)}: {words}"] = float(value)
    if not values:
        return None
    size = content.get("image_size")
    about = [content.get("network"), _set_of(content.get("test"))]
    about.append(None if size is None else f"{size} px")
    words = ", ".join(str(part) for part in about if part)
    return Scores(path, content["checkpoint"], words, values)


def _set_of(part: Any) -> str | None:
    if not isinstance(part, dict) or "name" not in part:
        return None
    return f"{part.get('images', '')} images of {part['name']}".strip()


def find_scores(runs: list[RunData]) -> list[Scores]:
    """Those that lie in the run folders; what is no such file is passed over."""
    found = []
    for run in runs:
        for path in sorted(run.path.glob("*.json")):
            try:
                if path.stat().st_size > _LARGEST:
                    continue
                scores = _scores_of(path, json.loads(read_file(path)))
            except (OSError, ValueError, RecursionError):
                continue
            if scores is not None:
                found.append(scores)
    return found


def owner_of(scores: Scores, runs: list[RunData]) -> RunData | None:
    """The run that scores are of: in whose folder they lie or their checkpoint does."""
    checkpoint = Path(scores.checkpoint)
    for folder in (scores.path.parent, checkpoint, checkpoint.parent):
        for run in runs:
            if folder.resolve() == run.path.resolve():
                return run
    return None
