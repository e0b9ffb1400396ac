"""A whole training step: fused, unfused, and the networks alone.

    pytest bench/bench_train_step.py --benchmark-only [--shapes main] [--full] [--backend cpu] ...

A step is `softcl.train.step.train_step`: views, the teacher's average, networks, loss, optimiser
and queue, with ASCL and the recipe of the data. Contenders are the backends of the loss
("reference" is the unfused step) and "bare": forward and backward of the student and forward of the
teacher, on views made before. Each fused step is first held to the reference's, from the same
state; then one bare step is timed before each of its rounds, so that both meet the same machine.
over_bare in the extra information is the ratio of their medians, images_per_s the whole step's.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.machine import conditions
from bench.table import Row
from softcl.data import STATISTICS, ImageSet, make_shapes
from softcl.testing import available_backends, make_problem
from softcl.train.config import TrainConfig
from softcl.train.defaults import fill
from softcl.train.images import build_views
from softcl.train.parts import build_state, keep_freed_pages
from softcl.train.step import TrainState, train_step

BARE = "bare"
SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 12.0, 30, 3
LOSS_TOLERANCE, UPDATE_TOLERANCE = 1e-5, 1e-3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Work:
    """ASCL's recipe for `statistics` with another backbone and batch."""

    arch: str
    statistics: str
    side: int
    batch: int

    def __str__(self) -> str:
        return f"step {self.arch} {self.side}px batch {self.batch}"


# A ResNet-18 with the CIFAR stem takes seconds for a step of 256 on two CPU cores.
QUICK = (Work("resnet_tiny", "shapes", 32, 64), Work("resnet18", "cifar10", 32, 64))
MAIN = (Work("resnet_tiny", "shapes", 32, 256), Work("resnet18", "cifar10", 32, 256))
FULL = (*QUICK, *MAIN, Work("vit_small", "imagenet", 224, 32))


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    works = MAIN if option("--shapes") in ("main", "grid") else QUICK
    backends = option("--backend") or available_backends(make_problem(2, 8, 4, device=DEVICE.type))
    contenders = [*backends, *[BARE] * (BARE in (option("--peer") or [BARE]))]
    metafunc.parametrize("work", FULL if option("--full") else works, ids=str)
    metafunc.parametrize("contender", [x for x in contenders if x != "none"])


class Step:
    """Whole steps of one backend, from a state that is a function of the work alone."""

    def __init__(self, work: Work, backend: str) -> None:
        self.backend = backend
        images = make_images(work)
        config = TrainConfig(arch=work.arch, batch_size=work.batch, epochs=200)
        self.config, method, _ = fill(config, images, work.side)
        self.state: TrainState = build_state(self.config, method, DEVICE)
        self.views = build_views(method, images, work.side)
        self.batch = images.batch(torch.arange(work.batch)).to(DEVICE)
        made = [make(self.batch, torch.Generator(DEVICE)) for make in self.views.values()]
        self.given = dict(zip(self.views, made, strict=True))  # for the bare step

    def __call__(self) -> Tensor:
        seed = self.config.seed
        measures = train_step(self.state, self.batch, self.views, seed=seed, backend=self.backend)
        settle()
        return measures

    def bare(self) -> float:
        """Seconds of the networks alone; nothing changes but running statistics."""
        state, start = self.state, time.perf_counter()
        state.optimizer.zero_grad(set_to_none=True)
        for name in state.method.student_sees():
            state.student(self.given[name]).sum().backward()
        with torch.no_grad():
            for name in state.method.teacher_sees():
                state.teacher(self.given[name])
        settle()
        return time.perf_counter() - start


def settle() -> None:
    """Wait for the GPU, where one works."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def make_images(work: Work) -> ImageSet:
    """A batch of pixels with the name of the data whose recipe is meant."""
    pixels = make_shapes(max(work.batch, 64)).images
    if work.side != pixels.shape[-1]:
        size = (work.side, work.side)
        pixels = torch.nn.functional.interpolate(pixels.float(), size).to(torch.uint8)
    mean, std = STATISTICS[work.statistics]
    return ImageSet(pixels, None, [], mean, std, str(work), work.statistics)


def check(work: Work, contender: str) -> None:
    """The first step's loss and what it does to the student, against the reference's."""
    results = []
    for backend in (contender, "reference"):
        step = Step(work, backend)
        before = flat(step.state)
        results.append((float(step()[0]), flat(step.state) - before))
    (loss, update), (expected, expected_update) = results
    assert abs(loss - expected) <= LOSS_TOLERANCE * abs(expected), f"loss {loss}, not {expected}"
    error = float((update - expected_update).abs().max() / expected_update.abs().max())
    assert error <= UPDATE_TOLERANCE, f"the student's update is off by {error:.1e}"


def flat(state: TrainState) -> Tensor:
    return torch.cat([x.detach().flatten() for x in state.student.parameters()]).double()


def bench_train_step(benchmark, report, work, contender):
    keep_freed_pages()
    if contender not in (BARE, "reference"):
        check(work, contender)
    step = Step(work, "reference" if contender == BARE else contender)
    timed = step.bare if contender == BARE else step
    bare: list[float] = []

    def before() -> None:
        bare.append(step.bare())

    timed()
    before()
    start = time.perf_counter()
    timed()
    once = time.perf_counter() - start + bare.pop()
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / once)))
    benchmark.group = str(work)
    benchmark.pedantic(timed, setup=None if contender == BARE else before, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable: the check alone
        return
    seconds = benchmark.stats.stats.median
    report(Row(str(work), contender, seconds, images_per_s=work.batch / seconds))
    benchmark.extra_info.update(
        conditions(DEVICE.type),
        contender=contender,
        images_per_s=work.batch / seconds,
        over_bare=seconds / statistics.median(bare) if bare else 1.0,
        queue_size=step.config.queue_size,
    )
