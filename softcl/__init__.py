"""softcl: contrastive learning with soft labels over a memory queue, in one pass over the queue.

    loss = softcl.soft_contrastive_loss(query, key, queue, softcl.AdaptiveSoftLabels(5),
                                        temperature=0.1, teacher_temperature=0.05)

Importing it needs torch and numpy alone. The training commands live in ``softcl.train`` and need
the extra ``softcl[train]``.
"""

from typing import Any

from softcl.labels import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    DistillationLabels,
    HardLabels,
    LabelRule,
    MixedLabels,
    NeighborLabels,
    RelationalLabels,
)
from softcl.ops import (
    BackendChoice,
    Diagnostics,
    LabelMean,
    QueueStatistics,
    UnsupportedBackendError,
    choose_backend,
    label_mean,
    merge_statistics,
    queue_statistics,
    soft_contrastive_loss,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveNeighborLabels",
    "AdaptiveSoftLabels",
    "BackendChoice",
    "Diagnostics",
    "DistillationLabels",
    "HardLabels",
    "LabelMean",
    "LabelRule",
    "MixedLabels",
    "NeighborLabels",
    "QueueStatistics",
    "RelationalLabels",
    "UnsupportedBackendError",
    "choose_backend",
    "knn_predict",
    "label_mean",
    "merge_statistics",
    "queue_statistics",
    "soft_contrastive_loss",
]


def __getattr__(name: str) -> Any:
    if name == "knn_predict":  # with what reads images, which the losses do without
        from softcl.evaluation import knn_predict

        return knn_predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
