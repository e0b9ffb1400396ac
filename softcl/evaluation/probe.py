"""Linear probes: how well a linear classifier on frozen features does.

    sgd      weights N(0, 0.01), bias 0; SGD with momentum 0.9, no weight decay, batch 256, 100
             epochs, the rate divided by 10 after epochs 60 and 80, by the numbers of a PROTOCOL.
             Raw features. Papers report the best epoch's accuracy, so it is given beside the last
             one's.
    lbfgs    logistic regression with an L2 penalty, solved by L-BFGS over all rows at once, on
             features scaled to unit variance; the penalty is chosen on a tenth of the training rows
             that is held out, then all rows are used. No test label is looked at. In float64, until
             the gradient shows that the objective is within TOLERANCE of its minimum; a fit that
             ran out of iterations before says so.

Protocols, from the released codes:

    ascl     rate 10, Nesterov momentum; random resized crops (8 % of the area or more) and flips
             (arXiv 2207.11163)
    moco     rate 30, plain momentum; the same views (arXiv 1911.05722)
    sce      rate 30, Nesterov momentum; crops of images padded by 4 pixels, and flips (small sets,
             arXiv 2111.14585)

The published probes compute features anew in every epoch, of such views; of whole images they are
computed once, which costs a hundredth and gives somewhat lower accuracies. Both are there. Probes
are to be compared under one recipe alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcl.evaluation.checks import check_labels, check_positive, check_vectors, check_whole
from softcl.ops.call import check_rows

EPOCHS, BATCH, DROPS = 100, 256, (60, 80)
TOLERANCE = 1e-5  # of the objective that L-BFGS minimises
_ROUGHLY = 1e-3  # to compare penalties by accuracy
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Protocol(NamedTuple):
    """What the sources of the SGD probe differ in.

    Attributes:
        rate: the learning rate.
        nesterov: whether the momentum is Nesterov's.
        view: "resized" for random resized crops, "padded" for crops of padded images; flips follow.
    """

    rate: float
    nesterov: bool
    view: str


PROTOCOLS = {
    "ascl": Protocol(10.0, True, "resized"),
    "moco": Protocol(30.0, False, "resized"),
    "sce": Protocol(30.0, True, "padded"),
}
ASCL = PROTOCOLS["ascl"]


@dataclass(frozen=True)
class Labelled:
    """Feature rows (N, F) and their classes (N,), integers, on one device.

    Raises:
        TypeError, ValueError: the one or the other is not; the message names it.
    """

    rows: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        check_rows("rows", self.rows)
        check_labels("labels", self.labels, self.rows.shape[:1])
        if self.labels.device != self.rows.device:
            raise ValueError(f"labels are on {self.labels.device}, rows on {self.rows.device}")
        object.__setattr__(self, "labels", self.labels.to(torch.int64))


def _check(train: Labelled, test: Labelled, num_classes: int) -> None:
    """Refuse sets that one classifier does not fit."""
    check_whole("num_classes", num_classes)
    check_vectors("train.rows", train.rows, "test.rows", test.rows)
    for what in ("dtype", "device"):
        wanted, found = getattr(train.rows, what), getattr(test.rows, what)
        if found != wanted:
            raise ValueError(f"test.rows must have train.rows' {what} {wanted}, got {found}")
    for name, part in (("train", train), ("test", test)):
        check_labels(f"{name}.labels", part.labels, part.rows.shape[:1], num_classes)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).float().mean())


def top_accuracies(ranked: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """top1, and top5 where there are more than five classes, of ranked (N, 5 or less) classes."""
    hits = ranked == labels[:, None]
    found = {"top1": float(hits[:, 0].float().mean())}
    if num_classes > 5:
        found["top5"] = float(hits.any(1).float().mean())
    return found


def describe_tops(found: Mapping[str, Any]) -> str:
    """The accuracies in words."""
    words = [f"top-1 {found['top1']:.2%}"]
    if "top5" in found:
        words.append(f"top-5 {found['top5']:.2%}")
    return ", ".join(words)


# The rows and labels of an epoch (from 0), batch by batch.
Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


def sgd_probe(
    train: Labelled | Batches,
    test: Labelled,
    num_classes: int,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    rate: float | None = None,
    protocol: Protocol = ASCL,
) -> dict[str, float]:
    """A linear classifier by SGD; the drops scale with `epochs`.

    Args:
        train: cached features; or a function that makes the batches of each epoch anew, of rows as
            test's.
        rate: None for the protocol's.

    Returns:
        top1 (and top5 with more than five classes) after the last epoch; train_top1, of batches in
        the last epoch as they were met; best_top1 and best_epoch by test accuracy.

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value.
    """
    if isinstance(train, Labelled):
        _check(train, test, num_classes)
        train = functools.partial(_shuffled, train, seed)
    check_whole("epochs", epochs)
    rate = protocol.rate if rate is None else rate
    check_positive("rate", rate)
    classifier = nn.Linear(test.rows.shape[1], num_classes).to(test.rows)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(classifier.weight.shape, generator=generator)
        classifier.weight.copy_(weight)
        classifier.bias.zero_()
    momentum = {"momentum": 0.9, "nesterov": protocol.nesterov}
    optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, **momentum)
    drops = [round(drop * epochs / EPOCHS) for drop in DROPS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    found, best, best_epoch = {}, -1.0, 0
    for epoch in range(epochs):
        hits, seen = torch.zeros((), device=test.rows.device), 0
        for rows, labels in train(epoch):
            scores = classifier(rows)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(scores, labels).backward()
            optimizer.step()
            hits += (scores.argmax(1) == labels).sum()
            seen += len(labels)
        schedule.step()
        with torch.no_grad():
            ranked = classifier(test.rows).topk(min(5, num_classes), dim=1).indices
        found = top_accuracies(ranked, test.labels, num_classes)
        found["train_top1"] = float(hits) / seen
        if found["top1"] > best:
            best, best_epoch = found["top1"], epoch + 1
    return found | {"best_top1": best, "best_epoch": best_epoch}


def _shuffled(train: Labelled, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(train.rows), generator=generator).to(train.rows.device)
    for part in order.split(BATCH):
        yield train.rows[part], train.labels[part]


def lbfgs_probe(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    *,
    iterations: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Logistic regression; the penalty is chosen on held-out training rows.

    Args:
        iterations: at most, of each fit.

    Returns:
        top1, train_top1, the penalty taken, and excess, see `Fit`: above TOLERANCE the last fit ran
        out of iterations.

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value.
    """
    _check(train, test, num_classes)
    check_whole("iterations", iterations)
    if len(train.rows) < 2:
        raise ValueError("train.rows must be 2 or more: a tenth is held out, got 1")
    mean, std = train.rows.mean(0), train.rows.std(0).clamp(min=1e-6)
    # Float32 rounds the gradient before it is small enough to tell that it is a minimum's.
    rows, test_rows = (((part.rows - mean) / std).double() for part in (train, test))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held, rest = order.to(rows.device).tensor_split([max(1, len(rows) // 10)])
    scores = {}
    weights = None  # each penalty starts from the solution of the one before it
    for penalty in sorted(PENALTIES, reverse=True):
        weights, _ = fit_logistic(
            rows[rest], train.labels[rest], num_classes, penalty, iterations, weights, _ROUGHLY
        )
        scores[penalty] = accuracy(_scores(rows[held], weights), train.labels[held])
    penalty = max(scores, key=scores.get)  # of equals the largest
    weights, excess = fit_logistic(rows, train.labels, num_classes, penalty, iterations, None)
    return {
        "top1": accuracy(_scores(test_rows, weights), test.labels),
        "train_top1": accuracy(_scores(rows, weights), train.labels),
        "penalty": penalty,
        "excess": excess,
    }


def _scores(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[-1], rows, weights[:-1])


class Fit(NamedTuple):
    """A logistic regression.

    Attributes:
        weights: (F + 1, C), the bias last.
        excess: |gradient|^2 / (2 penalty), which the objective is above its minimum by at most, for
            it curves by the penalty or more in every direction of W.
    """

    weights: Tensor
    excess: float


def fit_logistic(
    rows: Tensor,  # (N, F)
    labels: Tensor,  # (N,) int64
    num_classes: int,
    penalty: float,
    iterations: int,
    start: Tensor | None,
    tolerance: float = TOLERANCE,
) -> Fit:
    """The least mean cross-entropy + penalty |W|^2 / 2, or less than `tolerance` above it."""
    if start is None:
        start = rows.new_zeros(rows.shape[1] + 1, num_classes)
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        max_eval=2 * iterations,
        # Of the largest element; excess is then half of the tolerance at most.
        tolerance_grad=(penalty * tolerance / weights.numel()) ** 0.5,
        tolerance_change=0.0,  # small steps are no sign of a minimum
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = F.cross_entropy(_scores(rows, weights), labels)
        value = value + 0.5 * penalty * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    loss()
    return Fit(weights.detach(), float(weights.grad.square().sum()) / (2.0 * penalty))
