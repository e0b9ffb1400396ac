"""One training step, the state it changes, and the randomness of each step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softcl.nn import MemoryQueue, shuffled, update_teacher
from softcl.ops import Diagnostics, soft_contrastive_loss

# What train_step returns, in this order.
MEASURES = ("loss", "confidence", "entropy", "positive_top1", "query_spread")

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
    momentum: float | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> Tensor:
    """One step of a method with a teacher and a queue (the order is that of ASCL and MoCo).

    Args:
        momentum: of the teacher in this step; None for the method's own.
        accumulate: parts of the batch that go through the networks one after the other, to save
            memory. They share the old queue and one optimiser step; batch norm sees each by itself.
        clip_norm: the gradient is scaled down to this norm where it is larger.

    Returns:
        The MEASURES of the step, (5,) float32 on the device; NaN where a rule has no confidence.

    Raises:
        ValueError: on the CPU, when the query, the key or the queue is no longer finite.
    """
    method, student, teacher, queue = state.method, state.student, state.teacher, state.queue
    random = StepRandom(seed, state.step, images.device)

    update_teacher(teacher, student, method.momentum if momentum is None else momentum)
    state.optimizer.zero_grad(set_to_none=True)
    student_views = student_view(images, random("student view")).chunk(accumulate)
    teacher_views = teacher_view(images, random("teacher view")).chunk(accumulate)
    shuffle = random("shuffle")
    keys, measures = [], []
    for student_images, teacher_images in zip(student_views, teacher_views, strict=True):
        query = student(student_images)  # (N / accumulate, D)
        with torch.no_grad():
            key = shuffled(teacher, teacher_images, shuffle)
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
        (loss / accumulate).backward()
        keys.append(key)
        measures.append(_measures(loss, diagnostics, query))
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(student.parameters(), clip_norm, foreach=True)
    state.optimizer.step()
    queue.enqueue(torch.cat(keys), normalize=True)
    state.step += 1
    return torch.stack(measures).mean(0)


def _measures(loss: Tensor, diagnostics: Diagnostics, query: Tensor) -> Tensor:
    """The MEASURES of one part of a batch."""
    top1 = (diagnostics.positive_rank == 0).float().mean()
    absent = torch.full_like(top1, math.nan)  # rules without a teacher softmax
    confidence = absent if diagnostics.confidence is None else diagnostics.confidence.mean()
    entropy = absent if diagnostics.entropy is None else diagnostics.entropy.mean()
    return torch.stack([loss.detach(), confidence, entropy, top1, query_spread(query)]).float()


@torch.no_grad()
def query_spread(query: Tensor) -> Tensor:
    """How far the directions of query (N, D) differ: 1 if they fill the sphere, 0 if collapsed.

    sqrt(D) mean_d std_n(query_nd / |query_n|), as SimSiam (arXiv 2011.10566) watches it.
    """
    unit = nn.functional.normalize(query.float(), dim=1)
    return unit.std(dim=0, correction=0).mean() * query.shape[1] ** 0.5


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
