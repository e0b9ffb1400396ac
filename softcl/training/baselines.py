"""What a run's k-NN is held against: raw pixels, and the backbone before the first step."""

from __future__ import annotations

from typing import Any

from torch import nn

from softcl.evaluation import KNN
from softcl.evaluation.calibration import calibrated
from softcl.training.picture import choose_queries, nearest
from softcl.training.run_folder import BASELINES, RunFolder


def baselines_of(folder: RunFolder, student: nn.Module, knn: KNN, step: int) -> dict[str, Any]:
    """The baselines that the folder keeps, or those of the untrained student, then kept there.

    Returns:
        num_neighbors; untrained_neighbors, the rows for the picture; with labels also the
        accuracies untrained and pixels. The backbone's batch norms have the statistics of the
        images (`evaluation.calibration`).

    Raises:
        RuntimeError: the folder has none, and the student has been trained.
    """
    stored = folder.read_json(BASELINES)
    if stored is not None and stored.get("num_neighbors") == knn.num_neighbors:
        return stored
    if step:
        raise RuntimeError("baselines are measured before training")
    with calibrated(student, knn.bank, knn.size, knn.device):
        queries, bank = knn.encoder_features(student)
    found = nearest(queries[choose_queries(knn).to(knn.device)], bank)
    result = {"num_neighbors": knn.num_neighbors, "untrained_neighbors": found.tolist()}
    if knn.labelled:
        result["untrained"] = knn.accuracy(queries, bank)
        result["pixels"] = knn.pixel_accuracy()
    folder.write_json(BASELINES, result)
    return result


def in_words(baselines: dict[str, Any], trained: float | None = None) -> str:
    """The line that shows them, before training or beside what it has reached."""
    if "pixels" not in baselines:
        return "k-NN       not measured: the images have no labels"
    shares = (
        f"raw pixels {baselines['pixels']:.1%}, untrained backbone {baselines['untrained']:.1%}"
    )
    if trained is None:
        return f"k-NN       before training: {shares}"
    return f"k-NN       {shares}, trained {trained:.1%}"
