"""One training step, the state it changes, and the randomness of each step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softcl.methods.method import Batch, Method, Result
from softcl.nn import shuffled, update_teacher

# What train_step returns, in this order.
MEASURES = ("loss", "confidence", "entropy", "positive_top1", "query_spread")

View = Callable[[Tensor, torch.Generator], Tensor]  # uint8 (N, 3, H, W) -> float (N, 3, S, S)


@dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        method: the method's numbers (a dataclass of softcl.methods), constant.
        student, teacher: encoders, images (N, 3, S, S) -> (N, D); the teacher is unused by a method
            whose teacher sees no view.
        queues: the method's queues of keys, by name (`MemoryQueue` each).
        optimizer: of the parameters of student and heads.
        heads: what is trained besides the student: its predictor, and what a method adds.
        step: steps done.
    """

    method: Method
    student: nn.Module
    teacher: nn.Module
    queues: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    heads: nn.ModuleDict = field(default_factory=nn.ModuleDict)
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

    def enqueue(self, keys: Mapping[str, Tensor]) -> None:
        for name, rows in keys.items():
            self.queues[name].enqueue(rows, normalize=True)

    _PARTS = ("student", "teacher", "queues", "optimizer", "heads")


def train_step(
    state: TrainState,
    images: Tensor,  # (N, 3, H, W) uint8
    views: Mapping[str, View],
    *,
    seed: int,
    backend: str,
    momentum: float | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> Tensor:
    """One step of any method, in the order that `softcl.methods.method` describes.

    Args:
        views: how each of the method's views is made.
        momentum: of the teacher in this step; None for the method's own.
        accumulate: parts of the batch that go through the networks one after the other, to save
            memory. They share the old queue and one optimiser step; batch norm sees each by itself.
        clip_norm: the gradient is scaled down to this norm where it is larger.

    Returns:
        The MEASURES of the step, (5,) float32 on the device; NaN where a method has none.

    Raises:
        ValueError: on the CPU, when the query, the key or the queue is no longer finite.
    """
    method, random = state.method, StepRandom(seed, state.step, images.device)
    momentum = method.momentum if momentum is None else momentum
    has_teacher = bool(method.teacher_sees())
    if has_teacher and method.teacher_follows == "before":
        update_teacher(state.teacher, state.student, momentum)

    made = {name: make(images, random(f"view {name}")) for name, make in views.items()}
    generators = {name: random(f"shuffle {name}") for name in method.teacher_sees()}
    generators["mix"] = random("mix", torch.device("cpu"))
    state.optimizer.zero_grad(set_to_none=True)
    keys, measures = [], []
    for part in zip(*(view.chunk(accumulate) for view in made.values()), strict=True):
        batch = encode(state, dict(zip(made, part, strict=True)), generators, backend)
        keys.append(method.keys(batch))
        if method.enqueue == "before":
            state.enqueue(keys[-1])
        result = method.loss(batch)
        (result.rows.mean() / accumulate).backward()
        measures.append(_measures(result, batch))
    if clip_norm is not None:
        trained = [*state.student.parameters(), *state.heads.parameters()]
        nn.utils.clip_grad_norm_(trained, clip_norm, foreach=True)
    state.optimizer.step()

    if has_teacher and method.teacher_follows == "after":
        update_teacher(state.teacher, state.student, momentum)
    if method.enqueue == "after":
        for part in keys:
            state.enqueue(part)
    state.step += 1
    return torch.stack(measures).mean(0)


def encode(
    state: TrainState,
    views: dict[str, Tensor],  # (N, 3, S, S) each
    generators: Mapping[str, torch.Generator],
    backend: str,
) -> Batch:
    """The vectors that the method's loss compares."""
    method, heads = state.method, state.heads
    views, notes = method.prepare(views, generators["mix"])
    student = {name: state.student(views[name]) for name in method.student_sees()}
    predicted = student
    if "predictor" in heads:
        predicted = {name: heads["predictor"](rows) for name, rows in student.items()}
    teacher = {}
    with torch.no_grad():
        for name in method.teacher_sees():
            if method.shuffles:
                teacher[name] = shuffled(state.teacher, views[name], generators[name])
            else:
                teacher[name] = state.teacher(views[name])
    return Batch(student, predicted, teacher, state.queues, heads, notes, backend)


def _measures(result: Result, batch: Batch) -> Tensor:
    """The MEASURES of one part of a batch."""
    loss, shown = result.rows.detach().mean(), result.shown
    absent = torch.full_like(loss, math.nan)
    confidence = entropy = top1 = absent
    if shown is not None:
        confidence = absent if shown.confidence is None else shown.confidence.mean()
        entropy = absent if shown.entropy is None else shown.entropy.mean()
        if shown.positive_rank is not None:
            top1 = (shown.positive_rank == 0).to(loss.dtype).mean()
    spread = query_spread(next(iter(batch.student.values())))
    return torch.stack([loss, confidence, entropy, top1, spread.to(loss.dtype)]).float()


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

    def __call__(self, purpose: str, device: torch.device | None = None) -> torch.Generator:
        generator = torch.Generator(device or self.device)
        return generator.manual_seed(derived_seed(self.seed, self.step, purpose))


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words; any change of a part gives an unrelated seed."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
