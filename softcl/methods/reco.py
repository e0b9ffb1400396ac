"""ReCo: relation-aware contrastive learning: InfoNCE, a global relation and a local one.

Zhang et al., arXiv 2211.01796. "Code" below is github.com/zhangyifei01/ReCo.

    views     x_q, x_k strong; x_w weak; x_mix = CutMix(x_q, x_k[order]), a share r of it from x_q
    student   q = normalise(f(x_q)), q_mix = normalise(f(x_mix))      gradient
    teacher   k = normalise(EMA copy(x_k)), k_w = normalise(EMA copy(x_w))
    queues    Q of keys k, Q_w of keys k_w, filled side by side

    L_moco    = - log softmax([q . k, q . Q] / temperature)_0
    L_global  = - sum_j softmax_j(k_w . Q_w / teacher_temperature)
                        log softmax_j(q . Q_w / global_temperature)   no positive: ReSSL on Q_w
    k_mix     = normalise(r q + (1 - r) k[order])                     constant
    L_local   = - log softmax([q_mix . k_mix, q_mix . Q] / temperature)_0
    loss      = mean over the batch of L_moco + global_weight L_global + local_weight L_local

The paper writes the global term as a divergence; the code's cross-entropy has the same gradient.
Label rules: all mass on the positive, twice, and the teacher's softmax. mix = "mixup" is a branch
of the code that is switched off. Order: EMA (the student's passes do not change what it copies),
forward passes, losses against both queues as they are, SGD, keys in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softcl.distributed import ALONE, World
from softcl.labels import HardLabels, LabelRule, RelationalLabels
from softcl.memory import moved
from softcl.methods.defaults import Defaults, mnn_bench_defaults, shapes_defaults
from softcl.methods.method import Batch, Method, Result, View
from softcl.methods.mixing import MIXES
from softcl.ops import soft_contrastive_loss


@dataclass(frozen=True)
class ReCo(Method):
    """The method's numbers; the defaults are the code's losses with a small-data network.

    Attributes:
        global_weight: of the global relation; 0 leaves it out.
        local_weight: of the local relation; 0 leaves it out.
        teacher_temperature: of the teacher in the global relation.
        global_temperature: of the student in the global relation.
        mix: "cutmix" or "mixup".
    """

    temperature: float = 0.2
    teacher_temperature: float = 0.04
    global_temperature: float = 0.1
    global_weight: float = 1.0
    local_weight: float = 1.0
    mix: str = "cutmix"
    projection_dim: int = 256
    teacher_view: str = "strong"

    CHOICES = {"mix": tuple(MIXES)}

    def rule(self) -> LabelRule:
        return RelationalLabels() if self.global_weight else HardLabels()

    def views(self) -> dict[str, View]:
        weak = {"weak": View("weak")} if self.global_weight else {}
        return {**super().views(), **weak}

    def prepare(
        self, views: dict[str, Tensor], generator: torch.Generator, world: World = ALONE
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self.local_weight:
            return views, {}
        images, others = views["query"], views["key"]
        order = torch.randperm(len(images) * world.size, generator=generator)  # of all processes
        mixed, share = MIXES[self.mix](images, world.permute(others, order), generator)
        order = moved(order[world.rank :: world.size], images.device)
        return {**views, "mixed": mixed}, {"order": order, "share": share}

    def student_sees(self) -> tuple[str, ...]:
        return ("query", "mixed") if self.local_weight else ("query",)

    def teacher_sees(self) -> tuple[str, ...]:
        return ("key", "weak") if self.global_weight else ("key",)

    def queues(self) -> dict[str, int]:
        weak = {"weak queue": self.queue_size} if self.global_weight else {}
        return {"queue": self.queue_size, **weak}

    def keys(self, batch: Batch) -> dict[str, Tensor]:
        names = {"queue": "key", "weak queue": "weak"}
        return {name: batch.teacher[names[name]] for name in self.queues()}

    def loss(self, batch: Batch) -> Result:
        options = dict(reduction="none", diagnostics=True, backend=batch.backend)
        q = normalize(batch.predicted["query"], dim=1)
        k = normalize(batch.teacher["key"], dim=1)
        queries, keys = [q], [k]
        if self.local_weight:
            order, share = batch.notes["order"], batch.notes["share"]
            queries.append(normalize(batch.predicted["mixed"], dim=1))
            others = batch.world.all_gather_rows(k)[order]
            keys.append(normalize(torch.lerp(others, q.detach(), share), dim=1))
        # The two contrastive terms share one visit of the queue.
        rows, shown = soft_contrastive_loss(
            torch.cat(queries), torch.cat(keys), batch.rows(), HardLabels(),
            temperature=self.temperature, teacher_temperature=1.0, **options,
        )  # fmt: skip
        rows, *local = rows.split(len(q))
        shown = shown._replace(positive_rank=shown.positive_rank[: len(q)])
        if self.local_weight:
            rows = rows + self.local_weight * local[0]
        if self.global_weight:
            relation, related = soft_contrastive_loss(
                q, normalize(batch.teacher["weak"], dim=1), batch.rows("weak queue"),
                RelationalLabels(), temperature=self.global_temperature,
                teacher_temperature=self.teacher_temperature, positive=False, **options,
            )  # fmt: skip
            rows = rows + self.global_weight * relation
            shown = related._replace(positive_rank=shown.positive_rank)
        return Result(rows, shown)


DEFAULTS: dict[str, Defaults] = {
    # The code is for ImageNet alone. Its losses on small data, with the MNN bench's network and
    # schedule, are ours: no source.
    "cifar10": mnn_bench_defaults(ReCo(), 32),
    "tiny-imagenet": mnn_bench_defaults(ReCo(queue_size=16384, momentum=0.996), 64),
    # Code, main_reco.py with the README's --moco-t 0.2: head 2048-2048-256, K 65536, m 0.999,
    # lr 0.03 at 256 images, weight decay 1e-4, 5 epochs of warm-up, cosine per step.
    "imagenet": Defaults(
        ReCo(momentum=0.999, queue_size=65536), "resnet50", 224, 200, 256, 0.03, 0.9, 1e-4, 5
    ),
    # Chosen on shapes: without batch norm at the projector's end, or with its rate of 0.06, the
    # outputs collapse within an epoch, the queue told apart from the positive by its age.
    "shapes": shapes_defaults(
        ReCo(
            queue_size=512, projection_dim=128, projector_hidden=512, projector_norm="all",
            num_splits=1,
        ),
        lr=0.03,
    ),
}  # fmt: skip
