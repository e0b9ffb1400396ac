"""What changes from step to step by plan: the learning rate and the teacher's momentum."""

from __future__ import annotations

import math

MOMENTUM_SCHEDULES = ("constant", "cosine")


def learning_rate(
    step: int, *, peak: float, steps_per_epoch: int, epochs: int, warmup_epochs: float
) -> float:
    """Linear from 0 to `peak` over the warm-up, then a half cosine to 0, per step (as ASCL's code).

        t = step / steps_per_epoch
        lr = peak t / warmup_epochs                                              t < warmup_epochs
        lr = peak (1 + cos(pi (t - warmup_epochs) / (epochs - warmup_epochs))) / 2         else

    `step` counts from 0: the first step of a warm-up has a rate of 0.
    """
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if warmup_epochs >= epochs:
        return peak
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return 0.5 * peak * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def teacher_momentum(step: int, *, start: float, schedule: str, total_steps: int) -> float:
    """The momentum of a step, from 0: `start`, or from there to 1 along a half cosine (BYOL).

    m = 1 - (1 - start) (1 + cos(pi step / total_steps)) / 2                    "cosine"
    """
    if schedule == "constant":
        return start
    if schedule == "cosine":
        return 1.0 - (1.0 - start) * (1.0 + math.cos(math.pi * step / total_steps)) / 2
    known = ", ".join(MOMENTUM_SCHEDULES)
    raise ValueError(f"schedule must be one of {known}, got {schedule!r}")
