"""NNCLR: nearest-neighbour contrastive learning; no momentum teacher.

Dwibedi et al., ICCV 2021, arXiv 2104.14548. The paper has no public code; "solo" below is the
implementation in github.com/vturrisi/solo-learn.

    z1, z2    normalise(projector(backbone(view)))                    of two strong views
    p1, p2    normalise(predictor(projector(backbone(view))))         gradient
    n1, n2    the queue's rows nearest to z1, z2                      constant
    loss_i    = - log exp(n1_i . p2_i / temperature) / sum_k exp(n1_i . p2_k / temperature)
    loss      = the mean over the batch of this and of its mirror image (n2, p1), halved

The candidates are the predictions of the batch and carry the gradient; the neighbours are the rows.
Label rule: all mass on the own prediction. Order: forward passes, loss, SGD, then z1 alone enters
the queue.

The MNN bench, whose numbers the CIFAR defaults are, averages this loss with its transpose (for each
candidate a softmax over the rows); solo has the rows' alone, and so has softcl.

num_neighbors > 1 (the MNN bench has a row for 5) takes the mean over that many neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softcl.methods.defaults import Defaults, mnn_bench_defaults, shapes_defaults
from softcl.methods.method import Batch, Method, Result
from softcl.ops import queue_statistics


@dataclass(frozen=True)
class NNCLR(Method):
    """The method's numbers; the defaults are the MNN bench's for CIFAR.

    Attributes:
        num_neighbors: neighbours that stand in for a view.
    """

    num_neighbors: int = 1
    temperature: float = 0.2
    teacher_view: str = "strong"
    projector_layers: int = 3
    projector_norm: str = "all"
    predictor_hidden: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("num_neighbors", self.num_neighbors >= 1, "at least 1: they stand in for a view")

    def student_sees(self) -> tuple[str, ...]:
        return ("query", "key")

    def teacher_sees(self) -> tuple[str, ...]:
        return ()

    def keys(self, batch: Batch) -> dict[str, Tensor]:
        return {"queue": batch.student["query"].detach()}

    def loss(self, batch: Batch) -> Result:
        one = self.direction(batch, "query", "key")
        return Result(0.5 * (one + self.direction(batch, "key", "query")))

    def direction(self, batch: Batch, view: str, other: str) -> Tensor:
        """Rows (N,): the neighbours of one view against the predictions of the other."""
        queue, k = batch.rows(), self.num_neighbors
        with torch.no_grad():
            z = normalize(batch.student[view], dim=1)
            found = queue_statistics(
                z, queue, 1.0, num_neighbors=k, sums=False, backend=batch.backend
            )
            rows = queue[found.neighbor_indices].to(z.dtype)  # (N, k, D)
        predictions = normalize(batch.predicted[other], dim=1)  # (N, D)
        keys = batch.all_gather(predictions)  # of the whole batch
        lse = queue_statistics(
            rows.flatten(0, 1), keys, self.temperature, backend=batch.backend
        ).lse  # (N k,)
        rows, predictions = rows.to(lse.dtype), predictions.to(lse.dtype)
        positive = torch.einsum("nkd,nd->nk", rows, predictions) / self.temperature
        return (lse.view(-1, k) - positive).mean(1)


_TINY = NNCLR(queue_size=16384)

DEFAULTS: dict[str, Defaults] = {
    # Temperature 0.2 is solo's and the MNN bench's for CIFAR; K is the bench's.
    "cifar10": mnn_bench_defaults(NNCLR(), 32),
    "cifar100": mnn_bench_defaults(NNCLR(), 32),
    "tiny-imagenet": mnn_bench_defaults(_TINY, 64),
    # solo: projector 2048-2048-256 with batch norm, predictor 4096-256, K 65536 (the paper: 98304,
    # unverified), temperature 0.1. Its optimiser settings were not found: those of MoCo v3's
    # ResNet-50 (LARS, 0.3 x 4096 / 256, weight decay 1e-6) stand here, unverified for NNCLR, and
    # 200 epochs. For ImageNet-100 solo has LARS with lr 0.4 at batch 2 x 128, eta 0.02 and clipped
    # rates, weight decay 1e-5 but for biases and norms, temperature 0.2, 400 epochs.
    "imagenet": Defaults(
        replace(
            NNCLR(), temperature=0.1, queue_size=65536, projection_dim=256, predictor_hidden=4096,
            num_splits=1, student_view="byol_first", teacher_view="byol_second",
        ),
        "resnet50", 224, 200, 4096, 4.8, 0.9, 1e-6, 10, "lars", False,
    ),
    "shapes": shapes_defaults(
        NNCLR(queue_size=1024, projector_hidden=512, predictor_hidden=512, num_splits=1)
    ),
}  # fmt: skip
