"""One training step, the state it changes, and the randomness and learning rate of each step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softcl.nn import MemoryQueue, shuffled, update_teacher
from softcl.ops import soft_contrastive_loss

# What train_step returns, in this order.
MEASURES = ("loss", "confidence", "entropy", "positive_top1")

View = Callable[[Tensor, torch.Generator], Tensor]  # uint8 (N, 3, H, W) -> float (N, 3, S, S)


@dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        method: the method's numbers (a dataclass of softcl.methods), constant.
        student, teacher: encoders, images (N, 3, S, S) -> (N, D).
        queue: the last K keys of the teacher.
        optimizer: of the student's parameters.
        step: steps done.
    """

    method: Any
    student: nn.Module
    teacher: nn.Module
    queue: MemoryQueue
    optimizer: torch.optim.Optimizer
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in self._PARTS}
        return {"step": self.step, **parts}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Take over a stored state.

        Raises:
            RuntimeError, ValueError, KeyError: it belongs to another model, queue or optimizer.
        """
        for name in self._PARTS:
            getattr(self, name).load_state_dict(stored[name])
        self.step = int(stored["step"])

    _PARTS = ("student", "teacher", "queue", "optimizer")


def train_step(
    state: TrainState,
    images: Tensor,  # (N, 3, H, W) uint8
    student_view: View,
    teacher_view: View,
    *,
    seed: int,
    backend: str,
) -> Tensor:
    """One step of a method with a teacher and a queue (the order is that of ASCL and MoCo).

    Returns:
        The MEASURES of the step, (4,) float32 on the device; NaN where a rule has no confidence.

    Raises:
        ValueError: on the CPU, when the query, the key or the queue is no longer finite.
    """
    method, student, teacher, queue = state.method, state.student, state.teacher, state.queue
    random = StepRandom(seed, state.step, images.device)

    update_teacher(teacher, student, method.momentum)
    query = student(student_view(images, random("student view")))  # (N, D)
    with torch.no_grad():
        key = shuffled(teacher, teacher_view(images, random("teacher view")), random("shuffle"))
    loss, diagnostics = soft_contrastive_loss(
        query,
        key,
        queue.rows,
        method.rule(),
        temperature=method.temperature,
        teacher_temperature=method.teacher_temperature,
        positive=method.positive,
        normalize=True,
        filled=queue.filled,
        diagnostics=True,
        backend=backend,
    )
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    queue.enqueue(key, normalize=True)
    state.step += 1

    top1 = (diagnostics.positive_rank == 0).float().mean()
    absent = torch.full_like(top1, math.nan)  # rules without a teacher softmax
    confidence = absent if diagnostics.confidence is None else diagnostics.confidence.mean()
    entropy = absent if diagnostics.entropy is None else diagnostics.entropy.mean()
    return torch.stack([loss.detach(), confidence, entropy, top1]).float()


class StepRandom:
    """The random numbers of one step: a function of (seed, step, purpose) and of nothing before it.

    A resumed run therefore needs no stored generator. PyTorch's global generator, which drop-out
    and stochastic depth read, is set in the same way.
    """

    def __init__(self, seed: int, step: int, device: torch.device) -> None:
        self.seed, self.step, self.device = seed, step, device
        torch.manual_seed(derived_seed(seed, step, "global"))

    def __call__(self, purpose: str) -> torch.Generator:
        generator = torch.Generator(self.device)
        return generator.manual_seed(derived_seed(self.seed, self.step, purpose))


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words; any change of a part gives an unrelated seed."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


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
