"""Linear probes: how well a linear classifier on frozen features does.

    sgd      ASCL's recipe (its released code): weights N(0, 0.01), bias 0; SGD with Nesterov
             momentum 0.9, no weight decay, batch 256, 100 epochs; rate 10, divided by 10 after
             epochs 60 and 80. Raw features. Papers report the best epoch's accuracy, so it is
             given beside the last one's.
    lbfgs    logistic regression with an L2 penalty, solved by L-BFGS over all rows at once, on
             features scaled to unit variance; the penalty is chosen on a tenth of the training rows
             that is held out, then all rows are used. No test label is looked at. In float64, until
             the gradient shows that the objective is within TOLERANCE of its minimum; a fit that
             ran out of iterations before says so.

Features are computed once, of whole images. The published probes compute them anew in every epoch,
which costs a hundred times as much and gives somewhat higher accuracies: ASCL's (rate 10) of random
resized crops and flips, SCE's (rate 30, the same drops) of crops padded by 4 pixels and flips.
solo-learn and lightly train a linear classifier beside the backbone, too; a run's own measure is
the k-NN. Probes are to be compared under one recipe alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcl.evaluation.checks import check_labels, check_positive, check_vectors, check_whole
from softcl.ops.call import check_rows

EPOCHS, BATCH, RATE, DROPS = 100, 256, 10.0, (60, 80)
TOLERANCE = 1e-5  # of the objective that L-BFGS minimises
_ROUGHLY = 1e-3  # to compare penalties by accuracy
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


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


def sgd_probe(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    rate: float = RATE,
) -> dict[str, float]:
    """ASCL's linear probe on cached features; its drops scale with `epochs`.

    Returns:
        top1 and train_top1 after the last epoch; best_top1 and best_epoch by test accuracy.

    Raises:
        TypeError, ValueError: an argument is unusable; the message names it and its value.
    """
    _check(train, test, num_classes)
    check_whole("epochs", epochs)
    check_positive("rate", rate)
    generator = torch.Generator().manual_seed(seed)
    device, dim = train.rows.device, train.rows.shape[1]
    classifier = nn.Linear(dim, num_classes, device=device, dtype=train.rows.dtype)
    with torch.no_grad():
        weight = 0.01 * torch.randn(num_classes, dim, generator=generator)
        classifier.weight.copy_(weight)
        classifier.bias.zero_()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, momentum=0.9, nesterov=True)
    drops = [round(drop * epochs / EPOCHS) for drop in DROPS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    best, best_epoch, last = -1.0, 0, 0.0
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train.rows), generator=generator).to(device)
        for part in order.split(BATCH):
            loss = F.cross_entropy(classifier(train.rows[part]), train.labels[part])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            last = accuracy(classifier(test.rows), test.labels)
        if last > best:
            best, best_epoch = last, epoch
    with torch.no_grad():
        fit = accuracy(classifier(train.rows), train.labels)
    return {"top1": last, "train_top1": fit, "best_top1": best, "best_epoch": best_epoch}


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
