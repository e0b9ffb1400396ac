"""SNCLR: soft neighbours are positive supporters, as in the paper and as in the released code.

Ge et al., ICLR 2023, arXiv 2303.17142. "Code" below is github.com/ChongjianGE/SNCLR.

For each of two views v, and both ways round:

    student   y_v = projector(backbone(view v)), z_v = predictor(y_v)     gradient
    teacher   k_v = projector of the EMA copy (view v)                    no gradient
    C         queue of the teacher's vectors of view 2 (the candidate neighbours)
    NN_1..NN_n  the rows of C nearest to k_2;  NN_0 = k_2;  n = num_neighbors
    M         the NN_0..NN_n of every image of the batch, N (n + 1) vectors; C itself is not in it
    p_r       = exp(z_1 . NN_r / temperature) / sum over v in M of exp(z_1 . v / temperature)
    w_r       = positiveness of NN_r for y_1, r = 1..n

    form = "code":    w = softmax_r(y_1 . NN_r)                           (cosines, no projection)
                      loss = 2 temperature [- log p_0 - sum_r w_r log p_r]
    form = "paper":   w = softmax_r(f1(y_1) . f2(NN_r)) / positiveness_scale,   w_0 = 1
                      loss = - log sum_{r=0..n} w_r p_r

    loss = mean over the batch of the two directions' sum

In the code the labels sum to 2 and the gradient flows through w into y: both are kept. f1 and f2
are trained linear maps; the paper names them, the softmax and the scale (gamma), and gives the
scale no value: 1 here. `threshold` is the code's switch that drops the w_r up to 1/n.

Label rule: the positiveness w. M, of the whole batch, is visited by the streaming
operator and its logits are never stored. Order: EMA, forward passes, both searches and losses
against C as it is, optimiser, then the keys of view 2 enter C. Two quirks of the code are left out:
a term that it multiplies by 0, and a ring that drops the rest of a batch at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from softcl.methods.defaults import Defaults, mnn_bench_defaults, shapes_defaults
from softcl.methods.method import Batch, Method, Result, View
from softcl.ops import queue_statistics


@dataclass(frozen=True)
class SNCLR(Method):
    """The method's numbers; the defaults are the MNN bench's for CIFAR, with the paper's loss.

    Attributes:
        form: "paper" or "code": the paper's loss or the released code's.
        num_neighbors: n, soft neighbours of each key.
        positiveness_scale: the paper's gamma, which divides the positiveness; unused in the code.
        threshold: drop positiveness up to 1/n without rescaling the rest (code).
    """

    form: str = "paper"
    num_neighbors: int = 5
    temperature: float = 0.2
    positiveness_scale: float = 1.0
    threshold: bool = False
    teacher_view: str = "strong"
    projector_layers: int = 3
    projector_norm: str = "plain"
    predictor_hidden: int = 2048
    predictor_norm: str = "plain"

    CHOICES = {"form": ("paper", "code")}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("positiveness_scale", self.positiveness_scale > 0.0, "above 0")
        if self.threshold and self.form == "paper":
            raise ValueError("threshold belongs to the code form, got form='paper'")

    def views(self) -> dict[str, View]:
        return {"first": View(self.student_view), "second": View(self.teacher_view)}

    def student_sees(self) -> tuple[str, ...]:
        return ("first", "second")

    def teacher_sees(self) -> tuple[str, ...]:
        return ("first", "second")

    def keys(self, batch: Batch) -> dict[str, Tensor]:
        return {"queue": batch.teacher["second"]}

    def heads(self) -> dict[str, nn.Module]:
        if self.form == "code":
            return {}
        d = self.projection_dim
        return {name: nn.Linear(d, d, bias=False) for name in ("f1", "f2")}

    def loss(self, batch: Batch) -> Result:
        one = self.direction(batch, "first", "second")
        return Result(one + self.direction(batch, "second", "first"))

    def direction(self, batch: Batch, view: str, other: str) -> Tensor:
        """Rows (N,): the student's vectors of one view against the teacher's of the other."""
        z = normalize(batch.predicted[view], dim=1)
        y = normalize(batch.student[view], dim=1)
        candidates = self.candidates(batch, batch.teacher[other]).to(z.dtype)  # (N, n + 1, D)
        keys = batch.all_gather(candidates.flatten(0, 1))  # M, of the whole batch
        lse = queue_statistics(z, keys, self.temperature, backend=batch.backend).lse
        # In the precision of the sums, whatever the vectors' is.
        z, y, candidates = (x.to(lse.dtype) for x in (z, y, candidates))
        own = torch.einsum("nd,nrd->nr", z, candidates) / self.temperature
        below = lse[:, None] - own  # - log p_r, (N, n + 1)
        check_attention(batch.heads, batch.student[view], y)
        log_w = self.log_positiveness(y, candidates[:, 1:], batch.heads)  # (N, n)
        if self.form == "paper":
            log_w = torch.cat([torch.zeros_like(below[:, :1]), log_w], 1)  # w_0 = 1
            return -torch.logsumexp(log_w - below, 1)
        w = log_w.exp()
        if self.threshold:
            w = torch.where(w > 1.0 / max(self.num_neighbors, 1), w, torch.zeros_like(w))
        return 2.0 * self.temperature * (below[:, 0] + (w * below[:, 1:]).sum(1))

    @torch.no_grad()
    def candidates(self, batch: Batch, key: Tensor) -> Tensor:
        """Each key and its nearest rows of the queue, (N, n + 1, D) unit rows."""
        key = normalize(key, dim=1)
        if self.num_neighbors == 0:
            return key[:, None]
        queue = batch.rows()
        found = queue_statistics(
            key, queue, 1.0, num_neighbors=self.num_neighbors, sums=False, backend=batch.backend
        )
        return torch.cat([key[:, None], queue[found.neighbor_indices].to(key.dtype)], 1)

    def log_positiveness(self, y: Tensor, neighbors: Tensor, heads: Mapping) -> Tensor:
        """log w (N, n) of unit rows y (N, D) and neighbors (N, n, D), differentiable."""
        if self.form == "code":
            return torch.einsum("nd,nrd->nr", y, neighbors).log_softmax(1)
        dtype = heads["f1"].weight.dtype
        f1, f2 = heads["f1"](y.to(dtype)), heads["f2"](neighbors.to(dtype))
        attention = torch.einsum("nd,nrd->nr", f1, f2).to(y.dtype)
        return attention.log_softmax(1) - math.log(self.positiveness_scale)


def check_attention(heads: Mapping[str, nn.Module], projections: Tensor, sums: Tensor) -> None:
    """Refuse maps that the projections (N, D) cannot go through; sums: what they are computed in.

    Raises:
        ValueError: of another dimension.
        TypeError: in neither of the two precisions.
    """
    if not heads or "f1" not in heads:
        return
    weight = heads["f1"].weight
    if projections.shape[1] != weight.shape[1]:
        raise ValueError(
            f"projections must have the attention's projection_dim={weight.shape[1]}, "
            f"got shape {tuple(projections.shape)}"
        )
    if weight.dtype not in (projections.dtype, sums.dtype):
        raise TypeError(
            f"projections must have the attention's dtype {weight.dtype}, got {projections.dtype}"
        )


_VIT = SNCLR(
    form="code", num_neighbors=30, momentum_schedule="cosine", queue_size=128_000,
    projection_dim=256, projector_hidden=4096, predictor_hidden=4096, num_splits=1,
    student_view="byol_first", teacher_view="byol_second",
)  # fmt: skip

DEFAULTS: dict[str, Defaults] = {
    # MNN bench: n 5, temperature 0.2, K 4096, m 0.99, projector 512-2048-2048-128, predictor
    # 128-2048-128, both views strong. It averages the directions and leaves the factor 2T out.
    "cifar10": mnn_bench_defaults(SNCLR(), 32),
    "cifar100": mnn_bench_defaults(SNCLR(), 32),
    "tiny-imagenet": mnn_bench_defaults(SNCLR(queue_size=16384, momentum=0.996), 64),
    # Not released. The code's argument defaults look like MoCo v3's ResNet-50 recipe (LARS 0.6 x
    # batch / 256, weight decay 1e-6, 10 epochs of warm-up, temperature 1): unverified.
    "imagenet": Defaults(
        SNCLR(
            form="code", num_neighbors=30, temperature=1.0, momentum_schedule="cosine",
            queue_size=128_000, projection_dim=256, projector_layers=2, projector_hidden=4096,
            predictor_hidden=4096, num_splits=1, student_view="byol_first",
            teacher_view="byol_second",
        ),
        "resnet50", 224, 300, 4096, 9.6, 0.9, 1e-6, 10, "lars", False,
    ),
    # Code, ViT-S: AdamW, weight decay 0.1, batch 4096, 40 of 300 epochs warm-up, T 0.2, m 0.99 ->
    # 1, n 30, K 128000. lr 1.5e-4 x 4096 / 256 is one of its two launch scripts' (and MoCo v3's);
    # the other has 1.5e-5.
    "imagenet:vit": Defaults(
        _VIT, "moco3_vit_small", 224, 300, 4096, 2.4e-3, 0.9, 0.1, 40, "adamw"
    ),
    "shapes": shapes_defaults(
        SNCLR(queue_size=1024, projector_hidden=512, predictor_hidden=512, num_splits=1)
    ),
}  # fmt: skip
