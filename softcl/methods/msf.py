"""MSF: mean shift, which pulls a view to the mean of its neighbours, without negatives.

Koohpayegani, Tejankar and Pirsiavash, ICCV 2021, arXiv 2105.07269. "Code" below is
github.com/UMBCvision/MSF.

    student   z = normalise(predictor(projector(backbone(strong view))))   gradient
    teacher   t = normalise(projector(EMA backbone(weak view)))            no gradient
    t enters the queue first; N = the num_neighbors rows nearest to t, of which t itself is one
    loss      = mean over the batch of the mean over j in N of 2 - 2 z . Q_j = 2 - 2 z . m

Label rule: the mean m of the neighbours; no softmax, so no temperature. Order: EMA, forward passes,
keys into the queue, loss, SGD.

On small images the MNN bench's k = 5 is the own key and five rows of the queue as it was: six
vectors, hence num_neighbors 6 in the defaults named after it. Here the other keys of the batch may
be among them, as in the code, where they are in the queue by then.

On ImageNet the code evaluates Resize 256 and CenterCrop 224: softcl.evaluate's --crop-share, whose
default at 224 px that is.

symmetric: the MNN bench adds the mirrored direction. Here the keys of both views enter the queue
before either loss, so that both see one snapshot of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from softcl.methods.defaults import Defaults, mnn_bench_defaults, shapes_defaults
from softcl.methods.method import Batch, Result, SymmetricMethod
from softcl.ops import queue_statistics


@dataclass(frozen=True)
class MSF(SymmetricMethod):
    """The method's numbers; the fields' values are the MNN bench's for CIFAR, but k is the code's.

    Attributes:
        num_neighbors: rows in the mean, the own key included.
    """

    num_neighbors: int = 5
    projector_norm: str = "hidden"
    predictor_hidden: int = 2048

    enqueue = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("num_neighbors", self.num_neighbors >= 1, "at least 1: it is a mean over them")

    def loss(self, batch: Batch) -> Result:
        queue = batch.rows()
        with torch.no_grad():
            key = torch.cat([batch.teacher[name] for name in self.teacher_sees()])
            key = normalize(key, dim=1)
            found = queue_statistics(
                key, queue, 1.0, num_neighbors=self.num_neighbors, sums=False, backend=batch.backend
            )
            mean = queue[found.neighbor_indices].to(found.neighbor_logits.dtype).mean(1)  # (N, D)
        query = torch.cat([batch.predicted[name] for name in self.student_sees()])
        z = normalize(query, dim=1)
        return Result(2.0 - 2.0 * (z.to(mean.dtype) * mean).sum(1))


DEFAULTS: dict[str, Defaults] = {
    # Own key and k 5, weak teacher. The bench trains both directions (symmetric=True), which costs
    # twice.
    "cifar10": mnn_bench_defaults(MSF(num_neighbors=6), 32),
    "cifar100": mnn_bench_defaults(MSF(num_neighbors=6), 32),
    "tiny-imagenet": mnn_bench_defaults(
        MSF(num_neighbors=6, queue_size=16384, momentum=0.996), 64
    ),
    # Code, R50: projector 2048-4096-512, predictor 512-4096-512, K 128000, m 0.99, lr 0.05; k 10 is
    # the README's run, 5 the code's default; 4 GPUs, so 4 splits. Its cosine schedule steps per
    # epoch.
    "imagenet": Defaults(
        MSF(
            num_neighbors=10, queue_size=128000, projection_dim=512, projector_hidden=4096,
            predictor_hidden=4096, num_splits=4,
        ),
        "resnet50", 224, 200, 256, 0.05, 0.9, 1e-4, 0,
    ),
    "shapes": shapes_defaults(
        MSF(queue_size=512, projector_hidden=512, predictor_hidden=512, num_splits=1)
    ),
}  # fmt: skip
