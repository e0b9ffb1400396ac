"""Every method among several processes: its loss and gradients, and whole steps with DDP.

As in distributed_cases.py, each process also computes alone what one process would.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from dense_methods import CASES as METHODS
from dense_methods import SMALL
from distributed_cases import FUSED, checksum, has_native, own, same, shard, some
from test_methods import make_batch
from test_methods_step import small_student
from torch import Tensor, nn

from softcl.data.views import Share
from softcl.distributed import ALONE, World
from softcl.methods import ASCL, Method, MoCo
from softcl.nn import convert_split_batch_norm, make_teacher
from softcl.testing import LSE_TOLERANCE, gradient_error, relative_error
from softcl.train.config import TrainConfig
from softcl.train.parallel import average_buffers, average_gradients, divide_splits
from softcl.train.parts import build_heads, build_queues
from softcl.train.step import Trained, TrainState, train_step

SPLITS, IMAGES = 4, 16


def method_losses(world: World, folder: Path) -> None:
    """Rows and gradients of each method, with the queue replicated and sharded."""
    for name, method in some(world, METHODS.items()):
        for backend in ("reference", FUSED):
            if backend == FUSED and not has_native():
                continue
            dtype = torch.float64 if backend == "reference" else torch.float32
            # The fused operator over a whole queue is what one process calls as well.
            for sharded in (False, True) if backend == "reference" else (True,):
                check_method(world, method, backend, dtype, sharded, f"{name} {backend} {sharded}")


def check_method(
    world: World, method: Method, backend: str, dtype: torch.dtype, sharded: bool, name: str
) -> None:
    whole, leaves = make_batch(method, "random", dtype, backend)
    expected = method.loss(whole).rows
    weights = torch.linspace(0.5, 2.0, len(expected)).to(expected.dtype)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)

    def taken(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {x: own(world, rows.detach()).requires_grad_(rows.requires_grad)
                for x, rows in vectors.items()}  # fmt: skip

    student = taken(whole.student)
    predicted = taken(whole.predicted) if whole.predicted is not whole.student else student
    mine = dataclasses.replace(
        whole,
        student=student,
        predicted=predicted,
        teacher=taken(whole.teacher),
        queues={x: shard(world, q) if sharded else q for x, q in whole.queues.items()},
        notes={**whole.notes, "order": own(world, whole.notes["order"])},
        world=world,
    )
    own_leaves = [*student.values(), *(predicted.values() if predicted is not student else ())]
    rows = method.loss(mine).rows
    exact = dtype == torch.float64
    # Of the mean, which is what a step minimises; a row's own loss may be near 0.
    mean = world.all_reduce(rows.detach().double().sum()) / len(expected)
    for found, want, most in (
        (rows, own(world, expected), LSE_TOLERANCE),
        (mean, expected.double().mean(), 1e-6),
    ):
        error = relative_error(found, want)
        assert error <= (1e-11 if exact else most), f"{name}: loss is off by {error:.2e}"
    heads = list(mine.heads.parameters())
    found = torch.autograd.grad(
        (rows * own(world, weights)).sum(), [*own_leaves, *heads], allow_unused=True
    )
    for place, (gradient, want) in enumerate(zip(found, wanted, strict=True)):
        assert (gradient is None) == (want is None), name
        if want is None:
            continue
        of_heads = place >= len(own_leaves)
        gradient = world.all_reduce(gradient.clone()) if of_heads else gradient
        want = want if of_heads else own(world, want)
        # As a fraction of the largest gradient of the case, as test_methods does.
        scale = max(float(w.abs().max()) for w in wanted if w is not None)
        error = float((gradient - want).abs().max()) / scale
        assert error <= (1e-10 if exact else 1e-6), f"{name}: gradient is off by {error:.2e}"


def noisy(images: Tensor, generator: torch.Generator | Share) -> Tensor:
    """A view: something random of each image that depends on the generator."""
    if not isinstance(generator, Share):
        generator = Share(generator, 0, 1)
    generator, rank, size = generator
    shape = (len(images) * size, *images.shape[1:])
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)[rank::size]
    return images.double() / 255 + 0.3 * noise


def make_state(
    method: Method, world: World, sharded: bool = False, accumulate: int = 1
) -> TrainState:
    """Split batch norm in the encoder, divided among the processes; in eval mode in the heads."""
    torch.manual_seed(0)
    student, heads = small_student().double(), build_heads(method).double().eval()
    if world.size == 1:
        student = convert_split_batch_norm(student, method.num_splits)
    student = divide_splits(student, method.num_splits, world) if world.size > 1 else student
    config = TrainConfig(queue_sharding=sharded)
    queues = build_queues(config, method, world).double()
    optimizer = torch.optim.SGD([*student.parameters(), *heads.parameters()], lr=0.1, momentum=0.9)
    teacher = make_teacher(student) if method.teacher_sees() else nn.Identity()
    state = TrainState(method, student, teacher, queues, optimizer, heads, world=world)
    if world.size > 1:
        trained = Trained(student, heads)
        state.parallel = average_gradients(trained, world, accumulate=accumulate)
    return state


def images_of(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (IMAGES, 3, 6, 6), generator=generator, dtype=torch.uint8)


def steps(world: World, folder: Path) -> None:
    """Two steps of every method: measures, gradients, weights, teacher and queue."""
    split = {**SMALL, "num_splits": SPLITS}
    extra = {"moco accumulated": MoCo(**split), "ascl accumulated": ASCL(num_neighbors=3, **split)}
    for name, method in some(world, {**METHODS, **extra}.items()):
        method = dataclasses.replace(method, num_splits=SPLITS)
        for sharded in (False, True) if method.queues() else (False,):
            check_steps(world, method, sharded, 2 if "accumulated" in name else 1, name)


def check_steps(world: World, method: Method, sharded: bool, accumulate: int, name: str) -> None:
    one, state = make_state(method, ALONE), make_state(method, world, sharded, accumulate)
    views = {x: noisy for x in method.views()}
    options = dict(seed=3, backend="reference", accumulate=accumulate)
    for number in range(2):
        expected = train_step(one, images_of(number), views, **options)
        found = train_step(state, own(world, images_of(number)), views, **options)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6, equal_nan=True)
        for (key, p), q in zip(
            [*state.student.named_parameters(), *state.heads.named_parameters()],
            [*one.student.parameters(), *one.heads.parameters()],
            strict=True,
        ):
            assert (p.grad is None) == (q.grad is None), f"{name}: {key}"
            if q.grad is not None:
                error = gradient_error(p.grad.flatten()[None], q.grad.flatten()[None])
                assert error <= 1e-6, f"{name}, step {number}: {key} is off by {error:.2e}"
    average_buffers((state.student, state.teacher), world)
    for who in ("student", "teacher"):
        for a, b in zip(getattr(state, who).state_dict().values(),
                        getattr(one, who).state_dict().values(), strict=True):  # fmt: skip
            same(a, b, 1e-8)
    for key, queue in state.queues.items():
        rows, whole = queue.rows, one.queues[key].rows
        same(rows.local if sharded else rows, own(world, whole) if sharded else whole, 1e-8)
        if not sharded:
            assert len(set(world.all_gather_object(checksum(queue)))) == 1, (
                f"{name}: the replicas differ"
            )


CASES = {case.__name__: case for case in (method_losses, steps)}
