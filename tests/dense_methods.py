"""Every method's loss as its paper or code writes it, with all N x K matrices, in float64.

Used by test_methods.py and test_methods_step.py. Nothing here calls softcl's operator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from softcl import LabelRule
from softcl.methods import ASCL, MSF, NNCLR, SCE, SEED, SNCLR, Batch, Method, MoCo, ReCo, ReSSL
from softcl.testing import dense_labels


def unit(x: Tensor) -> Tensor:
    return normalize(x.double(), dim=1)


def nearest(t: Tensor, queue: Tensor, k: int) -> Tensor:
    """The k rows of the queue with the largest cosines, (N, k, D)."""
    return queue[(t @ queue.T).topk(k, dim=1).indices]


def label_rule(method: Method) -> LabelRule:
    """The labels of the methods with one queue, as their papers and codes have them."""
    if isinstance(method, MoCo):
        return LabelRule()
    if isinstance(method, ReSSL):
        return LabelRule(positive=0.0, mean=1.0)
    if isinstance(method, SCE):
        w = method.positive_weight
        leaks = method.form == "code" and not method.use_keys
        return LabelRule(positive=w, mean=1.0 - w, teacher_positive="zero" if leaks else None)
    n = method.num_neighbors
    return {
        "normal": LabelRule(),
        "soft": LabelRule(confident_mean=n, clip=True, num_neighbors=n),
        "ahcl": LabelRule(confident_neighbor=1.0, num_neighbors=n),
        "hard": LabelRule(neighbor=1.0, num_neighbors=n),
    }[method.labels]


def labels_of(rule: LabelRule, t: Tensor, queue: Tensor, tau: float) -> Tensor:
    """(N, 1 + K), positive first."""
    own = (t * t).sum(1, keepdim=True) / tau
    return dense_labels(rule, t @ queue.T / tau, own).labels


def cross_entropies(method: Method, z: Tensor, t: Tensor, queue: Tensor) -> Tensor:
    """Of all N x (1 + K) labels, for one direction or crop."""
    logits = torch.cat([(z * t).sum(1, keepdim=True), z @ queue.T], 1) / method.temperature
    if isinstance(method, ReSSL):  # no positive in the student's softmax
        logits = torch.cat([torch.full_like(logits[:, :1], -1e30), logits[:, 1:]], 1)
    labels = labels_of(label_rule(method), t, queue, method.teacher_temperature)
    return cross_entropy(logits, labels, reduction="none")


def queue_loss(method: Method, batch: Batch) -> Tensor:
    """For each direction or crop in turn; with use_keys each row has a queue of its own."""
    queue = unit(batch.rows())
    views, teachers = method.student_sees(), method.teacher_sees()
    rows = []
    for number, view in enumerate(views):
        z = unit(batch.predicted[view])
        t = unit(batch.teacher[teachers[number % len(teachers)]])
        if not getattr(method, "use_keys", False):
            rows.append(cross_entropies(method, z, t, queue))
            continue
        for i in range(len(z)):
            seen = torch.cat([t[:i], t[i + 1 :], queue])
            rows.append(cross_entropies(method, z[i : i + 1], t[i : i + 1], seen))
    return torch.cat(rows)


def ascl_byol_loss(method: ASCL, batch: Batch) -> Tensor:
    rows = []
    for view, other in zip(method.student_sees(), method.teacher_sees(), strict=True):
        h, t = unit(batch.predicted[view]), unit(batch.teacher[other])
        N = len(t)
        labels = torch.eye(N, dtype=torch.float64)
        if method.labels == "soft":
            for i in range(N):
                others = [j for j in range(N) if j != i]
                made = labels_of(label_rule(method), t[i : i + 1], t[others], 0.05)[0]
                labels[i, i], labels[i, others] = made[0], made[1:]
        rows.append((labels * (2 - 2 * h @ t.T)).sum(1))
    return torch.cat(rows)


def msf_loss(method: MSF, batch: Batch) -> Tensor:
    queue, losses = unit(batch.rows()), []
    for view, other in zip(method.student_sees(), method.teacher_sees(), strict=True):
        z = unit(batch.predicted[view])
        rows = nearest(unit(batch.teacher[other]), queue, method.num_neighbors)
        losses.append(((z[:, None] - rows) ** 2).sum(2).mean(1))  # |z - v|^2 = 2 - 2 z.v
    return torch.cat(losses)


def nnclr_loss(method: NNCLR, batch: Batch) -> Tensor:
    queue, total = unit(batch.rows()), 0.0
    for view, other in (("query", "key"), ("key", "query")):
        rows = nearest(unit(batch.student[view]).detach(), queue, method.num_neighbors)
        p = unit(batch.predicted[other])
        for r in range(method.num_neighbors):
            logits = rows[:, r] @ p.T / method.temperature
            own = torch.arange(len(p))
            total = total + cross_entropy(logits, own, reduction="none") / method.num_neighbors
    return total / 2


def snclr_loss(method: SNCLR, batch: Batch) -> Tensor:
    queue, n = unit(batch.rows()), method.num_neighbors
    total = 0.0
    for view, other in (("first", "second"), ("second", "first")):
        z, y, t = unit(batch.predicted[view]), unit(batch.student[view]), unit(batch.teacher[other])
        sets = torch.cat([t[:, None], nearest(t, queue, n)], 1)  # (N, n + 1, D)
        exponentials = torch.exp(z @ sets.flatten(0, 1).T / method.temperature)  # (N, N (n + 1))
        p = torch.exp(torch.einsum("nd,nrd->nr", z, sets) / method.temperature)
        p = p / exponentials.sum(1, keepdim=True)
        a, b = y, sets[:, 1:]
        if method.form == "paper":
            a, b = a @ batch.heads["f1"].weight.double().T, b @ batch.heads["f2"].weight.double().T
        w = torch.einsum("nd,nrd->nr", a, b).softmax(1)
        if method.threshold:
            w = w * (w > 1 / max(n, 1))
        if method.form == "paper":
            w = torch.cat([torch.ones_like(p[:, :1]), w / method.positiveness_scale], 1)
            total = total - (w * p).sum(1).log()
        else:
            loss = -p[:, 0].log() - (w * p[:, 1:].log()).sum(1)
            total = total + 2 * method.temperature * loss
    return total


def reco_loss(method: ReCo, batch: Batch) -> Tensor:
    queue, first = unit(batch.rows()), torch.zeros(len(batch.teacher["key"]), dtype=torch.int64)
    q, k = unit(batch.predicted["query"]), unit(batch.teacher["key"])

    def contrast(z, t):
        logits = torch.cat([(z * t).sum(1, keepdim=True), z @ queue.T], 1) / method.temperature
        return cross_entropy(logits, first, reduction="none")

    total = contrast(q, k)
    if method.global_weight:
        weak, weak_queue = unit(batch.teacher["weak"]), unit(batch.rows("weak queue"))
        target = (weak @ weak_queue.T / method.teacher_temperature).softmax(1)
        logits = q @ weak_queue.T / method.global_temperature
        total = total + method.global_weight * cross_entropy(logits, target, reduction="none")
    if method.local_weight:
        share, order = batch.notes["share"], batch.notes["order"]
        target = normalize(share * q.detach() + (1 - share) * k[order], dim=1)
        total = total + method.local_weight * contrast(unit(batch.predicted["mixed"]), target)
    return total


def seed_loss(method: SEED, batch: Batch) -> Tensor:
    """The teacher's embedding stands in front of the queue in both softmaxes."""
    queue, z, t = unit(batch.rows()), unit(batch.predicted["query"]), unit(batch.teacher["query"])
    own, similar = (t * t).sum(1, keepdim=True), (z * t).sum(1, keepdim=True)
    labels = (torch.cat([own, t @ queue.T], 1) / method.teacher_temperature).softmax(1)
    return cross_entropy(
        torch.cat([similar, z @ queue.T], 1) / method.temperature, labels, reduction="none"
    )


LOSSES = {SEED: seed_loss, MSF: msf_loss, NNCLR: nnclr_loss, SNCLR: snclr_loss, ReCo: reco_loss}


def dense_loss(method: Method, batch: Batch) -> Tensor:
    """The loss of every row, float64."""
    if isinstance(method, ASCL) and method.form == "byol":
        return ascl_byol_loss(method, batch)
    return LOSSES.get(type(method), queue_loss)(method, batch)


N, K, D = 8, 24, 6
SMALL = dict(queue_size=K, projection_dim=D, projector_hidden=12, num_splits=1)
CASES: dict[str, Method] = {
    "moco": MoCo(**SMALL),
    "moco symmetric": MoCo(symmetric=True, **SMALL),
    "ressl": ReSSL(**SMALL),
    "ressl 3 crops": ReSSL(crops=3, **SMALL),
    "ressl symmetric": ReSSL(symmetric=True, **SMALL),
    "ressl keys": ReSSL(use_keys=True, crops=2, **SMALL),
    "sce paper": SCE(positive_weight=0.3, **SMALL),
    "sce code": SCE(form="code", positive_weight=0.3, **SMALL),
    "sce relational": SCE(positive_weight=0.0, **SMALL),
    "sce symmetric": SCE(symmetric=True, predictor_hidden=8, **SMALL),
    "sce keys": SCE(use_keys=True, form="code", positive_weight=0.3, **SMALL),
    "sce keys symmetric": SCE(use_keys=True, symmetric=True, **SMALL),
    "ascl 1": ASCL(num_neighbors=1, **SMALL),
    "ascl 5": ASCL(num_neighbors=5, **SMALL),
    "ascl ahcl": ASCL(labels="ahcl", num_neighbors=3, **SMALL),
    "ascl hard": ASCL(labels="hard", num_neighbors=3, **SMALL),
    "ascl normal": ASCL(labels="normal", **SMALL),
    "ascl symmetric": ASCL(num_neighbors=2, symmetric=True, **SMALL),
    "ascl byol": ASCL(form="byol", num_neighbors=3, predictor_hidden=8, **SMALL),
    "ascl byol symmetric": ASCL(form="byol", symmetric=True, predictor_hidden=8, **SMALL),
    "byol": ASCL(form="byol", labels="normal", predictor_hidden=8, **SMALL),
    "msf": MSF(**{**SMALL, "predictor_hidden": 8}),
    "msf symmetric": MSF(symmetric=True, **{**SMALL, "predictor_hidden": 8}),
    "nnclr": NNCLR(**{**SMALL, "predictor_hidden": 8}),
    "nnclr 3": NNCLR(num_neighbors=3, **{**SMALL, "predictor_hidden": 8}),
    "snclr paper": SNCLR(**{**SMALL, "predictor_hidden": 8}),
    "snclr code": SNCLR(form="code", **{**SMALL, "predictor_hidden": 8}),
    "snclr threshold": SNCLR(form="code", threshold=True, **{**SMALL, "predictor_hidden": 8}),
    "reco": ReCo(global_weight=0.7, local_weight=1.3, **SMALL),
    "reco mixup": ReCo(mix="mixup", **SMALL),
    "seed": SEED(teacher_temperature=0.04, **SMALL),
}
