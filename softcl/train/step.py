"""One training step: the state it changes, its randomness, its schedules, its numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softcl.data.views import Images, Share, Transform, device_of, make_view
from softcl.distributed import ALONE, ShardedQueue, World
from softcl.errors import Diverged
from softcl.memory import copy_to_host
from softcl.methods.method import SCHEDULES, Batch, Method, Result
from softcl.nn import shuffled, update_teacher
from softcl.train.parallel import shuffled_among

# What train_step returns, in this order.
MEASURES = ("loss", "confidence", "entropy", "positive_top1", "query_spread")


class Trained(nn.Module):
    """All that is trained, as one module: views -> projections and predictions, by name."""

    def __init__(self, student: nn.Module, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.student, self.heads = student, heads

    def forward(self, views: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        student = {name: self.student(images) for name, images in views.items()}
        if "predictor" not in self.heads:
            return student, student
        return student, {name: self.heads["predictor"](rows) for name, rows in student.items()}


@dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        method: the method's numbers (a dataclass of softcl.methods), constant.
        student, teacher: encoders, images (N, 3, S, S) -> (N, D); the teacher is unused by a method
            whose teacher sees no view.
        queues: the method's queues of keys, by name (`MemoryQueue` or `ShardedQueue` each).
        optimizer: of the parameters of student and heads.
        heads: what is trained besides the student: its predictor, and what a method adds.
        step: steps done.
        world: the processes that train together.
        parallel: student and heads in DDP, which averages their gradients; None for one process.
    """

    method: Method
    student: nn.Module
    teacher: nn.Module
    queues: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    heads: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    step: int = 0
    world: World = ALONE
    parallel: nn.Module | None = None

    def state_dict(self) -> dict[str, Any]:
        """All of it; of a sharded queue the rows are in the first process's alone."""
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
        """Keys of this process's part of the batch; those of all enter, in the batch's order."""
        for name, rows in keys.items():
            queue = self.queues[name]
            if not self.world.alone and not isinstance(queue, ShardedQueue):
                rows = self.world.all_gather_rows(rows.detach())
            queue.enqueue(rows, normalize=True)

    _PARTS = ("student", "teacher", "queues", "optimizer", "heads")


def train_step(
    state: TrainState,
    images: Images,  # this process's
    views: Mapping[str, Transform],
    *,
    seed: int,
    backend: str,
    momentum: float | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> Tensor:
    """One step of any method, in the order that `softcl.methods.method` describes.

    Args:
        images: (N, 3, H, W) uint8, or for each view crops of them in its size, by its name.
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
    method, world = state.method, state.world
    device = device_of(images)
    random = StepRandom(seed, state.step, device, world)
    on_host = torch.device("cpu")
    momentum = method.momentum if momentum is None else momentum
    has_teacher = bool(method.teacher_sees())
    if has_teacher and method.teacher_follows == "before":
        update_teacher(state.teacher, state.student, momentum)

    made = {name: make_view(views, name, images, random.share(f"view {name}")) for name in views}
    # Where images travel between processes, the host has to know which.
    shuffling = device if world.alone else on_host
    generators = {name: random(f"shuffle {name}", shuffling) for name in method.teacher_sees()}
    generators["mix"] = random("mix", on_host)
    state.optimizer.zero_grad(set_to_none=True)
    keys, measures = [], []
    for part in zip(*(view.chunk(accumulate) for view in made.values()), strict=True):
        last = len(keys) == accumulate - 1
        with contextlib.nullcontext() if last else _no_exchange(state):
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


def _no_exchange(state: TrainState) -> contextlib.AbstractContextManager:
    """Gradients are summed in each process, and averaged with those of the last part."""
    return contextlib.nullcontext() if state.parallel is None else state.parallel.no_sync()


def encode(
    state: TrainState,
    views: dict[str, Tensor],  # (N, 3, S, S) each
    generators: Mapping[str, torch.Generator],
    backend: str,
) -> Batch:
    """The vectors that the method's loss compares."""
    method, heads, world = state.method, state.heads, state.world
    views, notes = method.prepare(views, generators["mix"], world)
    trained = Trained(state.student, heads) if state.parallel is None else state.parallel
    student, predicted = trained({name: views[name] for name in method.student_sees()})
    teacher = {}
    with torch.no_grad():
        for name in method.teacher_sees():
            if not method.shuffles:
                teacher[name] = state.teacher(views[name])
            elif world.alone:
                teacher[name] = shuffled(state.teacher, views[name], generators[name])
            else:
                among = (world, state.teacher, views[name], generators[name])
                teacher[name] = shuffled_among(*among)
    return Batch(student, predicted, teacher, state.queues, heads, notes, backend, world)


def _measures(result: Result, batch: Batch) -> Tensor:
    """The MEASURES of one part of a batch, of all processes."""
    loss, shown = result.rows.detach().mean(), result.shown
    absent = torch.full_like(loss, math.nan)
    confidence = entropy = top1 = absent
    if shown is not None:
        confidence = absent if shown.confidence is None else shown.confidence.mean()
        entropy = absent if shown.entropy is None else shown.entropy.mean()
        if shown.positive_rank is not None:
            top1 = (shown.positive_rank == 0).to(loss.dtype).mean()
    vectors = next(iter(batch.student.values()))
    if not batch.world.alone:
        return _measures_of_all(
            torch.stack([loss, confidence, entropy, top1]), vectors, batch.world
        )
    spread = query_spread(vectors)
    return torch.stack([loss, confidence, entropy, top1, spread.to(loss.dtype)]).float()


@torch.no_grad()
def _measures_of_all(means: Tensor, vectors: Tensor, world: World) -> Tensor:
    """The processes' measures from the means of their equal parts, by one exchange."""
    unit = nn.functional.normalize(vectors.double(), dim=1)
    mean = (
        world.all_reduce(torch.cat([means.double(), unit.mean(0), unit.square().mean(0)]))
        / world.size
    )
    first, second = mean[len(means) :].chunk(2)
    std = (second - first.square()).clamp(min=0.0).sqrt()  # over the whole batch
    spread = std.mean() * vectors.shape[1] ** 0.5
    return torch.cat([mean[: len(means)], spread[None]]).float()


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
    and stochastic depth read, is set in the same way, to another number in each process.
    """

    def __init__(self, seed: int, step: int, device: torch.device, world: World = ALONE) -> None:
        self.seed, self.step, self.device, self.world = seed, step, device, world
        own = (world.rank,) if world.rank else ()
        number = derived_seed(seed, step, "global", *own)
        if device.type == "cpu":
            # Seeding the GPUs' too takes half a millisecond where PyTorch knows of them: each time
            # it keeps a trace of the stack for the day when one is used.
            torch.default_generator.manual_seed(number)
        else:
            torch.manual_seed(number)

    def __call__(self, purpose: str, device: torch.device | None = None) -> torch.Generator:
        generator = torch.Generator(device or self.device)
        return generator.manual_seed(derived_seed(self.seed, self.step, purpose))

    def share(self, purpose: str) -> torch.Generator | Share:
        """The same numbers, for a batch of which this process has a part."""
        generator = self(purpose)
        world = self.world
        return generator if world.alone else Share(generator, world.rank, world.size)


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words; any change of a part gives an unrelated seed."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


# -------------------------------------------------------------------------------------- schedules

# Functions of the step alone, where torch's schedulers have a state that checkpoints would have to
# hold.


LR_DROPS = (0.6, 0.8)  # shares of the epochs


def learning_rate(
    step: int,
    *,
    peak: float,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float,
    schedule: str = "cosine",
) -> float:
    """Linear from 0 to `peak` over the warm-up, then by the schedule, per step (as ASCL's code).

        t = step / steps_per_epoch
        lr = peak t / warmup_epochs                                              t < warmup_epochs
        lr = peak (1 + cos(pi (t - warmup_epochs) / (epochs - warmup_epochs))) / 2        "cosine"
        lr = peak                                                                       "constant"
        lr = peak, peak / 10 from 0.6 epochs on, peak / 100 from 0.8 epochs on   "steps" (MoCo v1)

    `step` counts from 0: the first step of a warm-up has a rate of 0.
    """
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if schedule == "steps":
        return peak / 10 ** sum(epoch >= share * epochs for share in LR_DROPS)
    if schedule == "constant" or warmup_epochs >= epochs:
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
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def moved_temperatures(method: Method, final: Mapping[str, float], progress: float) -> Method:
    """The method with those temperatures on a half cosine from its own to their final values.

    Args:
        final: by the names of the method's numbers.
        progress: share of the run that is done, in [0, 1].
    """
    share = (1.0 - math.cos(math.pi * progress)) / 2
    values = {
        name: (1 - share) * getattr(method, name) + share * end for name, end in final.items()
    }
    return dataclasses.replace(method, **values)


# --------------------------------------------------------------------------------- failing numbers

FIRST_STEPS = 50  # each has a line of its own


def first_damaged(state: TrainState, *, gradients: bool = False) -> str | None:
    """What is not finite, in words: the first such gradient, parameter or buffer; None if none is.

    Args:
        gradients: look at those of the last backward pass first, which break the rest.
    """

    def tensors() -> Iterator[tuple[str, Tensor | None]]:
        if gradients:
            for name, parameter in state.student.named_parameters():
                yield f"the gradient of {name}", parameter.grad
        for who in ("student", "teacher", "heads"):
            module = getattr(state, who)
            for name, tensor in module.named_parameters():
                yield f"parameter {name} of the {who}", tensor
            for name, tensor in module.named_buffers():
                yield f"buffer {name} of the {who}", tensor

    for name, tensor in tensors():
        if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} is not finite"
    return None


class Meter:
    """Watches the loss of every step, and makes rows of the measures of some.

    On a GPU the host looks at each loss one step late, when the next step has been launched, so
    that it never waits for an idle device. A row has the measures of its own step, so that rows do
    not depend on where a run was interrupted; only the speed is that since the row before.

    Args:
        every: steps per row, after the first FIRST_STEPS.
        batch_size: N.
    """

    def __init__(self, every: int, batch_size: int) -> None:
        self.every, self.batch_size = every, batch_size
        self._last: tuple[int, Tensor] | None = None  # step, measures (5,)
        self._watched: tuple[int, Tensor, Any] | None = None  # step, its loss's copy, its arrival
        self._since, self._waited, self._timed_steps = time.perf_counter(), 0.0, 0
        self.loss = math.nan

    def add(self, step: int, measures: Tensor) -> None:
        """Take in a step and check its loss; on a GPU that of the step before.

        Raises:
            Diverged: naming the step.
        """
        self._last = step, measures
        self._timed_steps += 1
        if measures.device.type == "cpu":
            _check_loss(step, float(measures[0]))
        else:
            self._watch(step, *copy_to_host(measures[0]))

    def _watch(self, step: int, loss: Tensor, arrival: Any) -> None:
        """Check the loss that was on its way to the host during the last step."""
        watched, self._watched = self._watched, (step, loss, arrival)
        if watched is not None:
            before, loss, arrival = watched
            arrival.synchronize()
            _check_loss(before, float(loss))

    @property
    def measures(self) -> Tensor:
        """Of the last step, (5,), on the device."""
        return self._last[1]

    def due(self, step: int, last_step: int) -> bool:
        """Whether a row is due after this many steps; the early ones would keep a GPU waiting."""
        early = step <= FIRST_STEPS and self._last[1].device.type == "cpu"
        return early or step % self.every == 0 or step == last_step

    def row(self, waited: float) -> dict[str, Any]:
        """The row of the last step.

        Args:
            waited: seconds spent waiting for data since the run started.

        Raises:
            Diverged: its loss is not finite.
        """
        step, measures = self._last
        values = dict(zip(MEASURES, measures.tolist(), strict=True))
        _check_loss(step, values["loss"])
        self.loss = values["loss"]
        seconds = max(time.perf_counter() - self._since, 1e-9)
        speed = {
            "images_per_s": self._timed_steps * self.batch_size / seconds,
            "data_wait": min((waited - self._waited) / seconds, 1.0),
        }
        self.restart(waited)
        return {"step": step, **values, **speed}

    def check(self) -> None:
        """Look at the last loss (before a checkpoint is written).

        Raises:
            Diverged: it is not finite.
        """
        if self._last is not None:
            _check_loss(self._last[0], float(self._last[1][0]))

    def restart(self, waited: float) -> None:
        """Measure the speed from now on."""
        self._since, self._waited, self._timed_steps = time.perf_counter(), waited, 0

    def skip(self, seconds: float) -> None:
        """Leave the last `seconds`, spent on something else than training, out of the speed."""
        self._since += seconds


def _check_loss(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the loss of step {step} is {loss}")
