"""One step: its order, its randomness, its learning rate."""

from __future__ import annotations

import ast
import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import softcl
from softcl.data import ImageSet
from softcl.methods import ASCL, METHODS
from softcl.methods import method as method_module
from softcl.nn import MemoryQueue, make_teacher
from softcl.train import loop as loop_module
from softcl.train.__main__ import main
from softcl.train.images import BatchFeed
from softcl.train.loop import Loop
from softcl.train.step import (
    MEASURES,
    StepRandom,
    TrainState,
    derived_seed,
    learning_rate,
    train_step,
)

CPU = torch.device("cpu")


def make_state(**settings) -> TrainState:
    method = ASCL(queue_size=24, projection_dim=6, num_splits=1, **settings)
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 16), nn.ReLU(), nn.Linear(16, 6))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9)
    queues = nn.ModuleDict({"queue": MemoryQueue(24, 6)})
    return TrainState(method, student, make_teacher(student), queues, optimizer)


def noisy_view(images: Tensor, generator: torch.Generator) -> Tensor:
    return images.float() / 64 - 2 + 0.1 * torch.randn(images.shape, generator=generator)


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (8, 3, 4, 4), generator=generator, dtype=torch.uint8)


def take_step(state: TrainState, number: int = 0, seed: int = 7) -> Tensor:
    views = {name: noisy_view for name in state.method.views()}
    return train_step(state, batch(number), views, seed=seed, backend="reference")


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_order_of_a_step(monkeypatch):
    """The loss sees the updated teacher and the old queue; the keys enter the queue after it."""
    state = make_state(momentum=0.5)
    take_step(state)
    student, teacher, rows = (
        weights(state.student),
        weights(state.teacher),
        state.queues["queue"].rows.clone(),
    )
    seen = {}
    original = method_module.soft_contrastive_loss

    def spy(query, key, queue, rule, **options):
        seen.update(
            key=key, rows=queue.clone(), options=options, pointer=state.queues["queue"].pointer
        )
        seen.update(teacher=weights(state.teacher), student=weights(state.student))
        assert query.requires_grad and not key.requires_grad
        return original(query, key, queue, rule, **options)

    monkeypatch.setattr(method_module, "soft_contrastive_loss", spy)
    take_step(state, 1)
    assert torch.equal(seen["rows"], rows) and seen["pointer"] == 8
    assert all(map(torch.equal, seen["student"], student))
    for now, old, new in zip(seen["teacher"], teacher, student, strict=True):
        torch.testing.assert_close(now, 0.5 * old + 0.5 * new)
    assert all(map(torch.equal, weights(state.teacher), seen["teacher"]))
    assert not any(map(torch.equal, weights(state.student), student))
    unit = nn.functional.normalize(seen["key"], dim=1)
    torch.testing.assert_close(state.queues["queue"].rows[8:16], unit)
    assert torch.equal(state.queues["queue"].rows[:8], rows[:8])
    assert torch.equal(state.queues["queue"].rows[16:], rows[16:])
    assert seen["options"]["normalize"] and seen["options"]["temperature"] == 0.1
    assert seen["options"]["teacher_temperature"] == 0.05 and state.step == 2


def test_measures_agree_with_the_operator():
    measures = dict(zip(MEASURES, take_step(make_state()).tolist(), strict=True))
    assert math.isfinite(measures["loss"]) and 0 <= measures["confidence"] <= 1
    expected = 1 - measures["entropy"] / math.log(24)
    assert measures["confidence"] == pytest.approx(expected, abs=1e-5)
    without = dict(zip(MEASURES, take_step(make_state(labels="normal")).tolist(), strict=True))
    assert math.isnan(without["confidence"]) and math.isfinite(without["loss"])


def test_a_step_depends_on_seed_and_step_and_on_no_earlier_draw():
    first, second = make_state(), make_state()
    torch.rand(1000)  # somebody else's draw
    assert torch.equal(take_step(first), take_step(second))
    torch.rand(1000)
    assert torch.equal(take_step(first, 1), take_step(second, 1))
    assert all(map(torch.equal, weights(first.student), weights(second.student)))
    assert not torch.equal(take_step(first, 2, seed=8), take_step(second, 2, seed=9))


def test_state_round_trip_continues_to_the_last_bit():
    whole, parts = make_state(), make_state()
    for number in range(3):
        take_step(whole, number)
        take_step(parts, number)
    stored = copy.deepcopy(parts.state_dict())
    resumed = make_state()
    resumed.load_state_dict(stored)
    for number in range(3, 6):
        assert torch.equal(take_step(whole, number), take_step(resumed, number))
    assert all(map(torch.equal, weights(whole.student), weights(resumed.student)))
    assert (
        torch.equal(whole.queues["queue"].rows, resumed.queues["queue"].rows) and resumed.step == 6
    )


def test_training_lowers_the_loss():
    state = make_state(labels="normal")
    # Eight batches in turn, so that no image meets its own key in a queue of three batches.
    losses = [float(take_step(state, number % 8)[0]) for number in range(120)]
    assert max(losses) > 1.0 and sum(losses[-8:]) / 8 < 0.4


def test_derived_seeds():
    seeds = {derived_seed(s, k, p) for s in range(5) for k in range(50) for p in ("a", "b")}
    assert len(seeds) == 500 and all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, 23) != derived_seed(12, 3)
    random = StepRandom(3, 4, CPU)
    assert torch.equal(
        torch.rand(3, generator=random("x")), torch.rand(3, generator=StepRandom(3, 4, CPU)("x"))
    )


def test_learning_rate_is_the_published_schedule():
    settings = dict(peak=2.0, steps_per_epoch=10, epochs=6, warmup_epochs=2)
    rates = [learning_rate(step, **settings) for step in range(61)]
    assert rates[0] == 0.0 and rates[10] == pytest.approx(1.0) and rates[20] == 2.0
    assert rates[40] == pytest.approx(1.0) and rates[60] == pytest.approx(0.0, abs=1e-12)
    assert rates[25] == pytest.approx(1 + math.cos(math.pi * 0.125))
    assert learning_rate(0, peak=2.0, steps_per_epoch=10, epochs=6, warmup_epochs=0) == 2.0
    rates = [
        learning_rate(step, peak=1.0, steps_per_epoch=4, epochs=2, warmup_epochs=2)
        for step in range(9)
    ]
    assert rates == pytest.approx([step / 8 for step in range(8)] + [1.0])


def test_other_schedules_of_the_learning_rate():
    settings = dict(peak=2.0, steps_per_epoch=10, epochs=10, warmup_epochs=1)
    steps = [learning_rate(step, **settings, schedule="steps") for step in range(100)]
    assert steps[5] == 1.0 and set(steps[10:60]) == {2.0}
    assert set(steps[60:80]) == {0.2} and set(steps[80:]) == {0.02}
    constant = [learning_rate(step, **settings, schedule="constant") for step in range(100)]
    assert constant[:10] == steps[:10] and set(constant[10:]) == {2.0}


def test_temperatures_move_on_a_half_cosine(flags: list[str], monkeypatch, capsys):
    seen, original = [], loop_module.train_step

    def watched(state, *rest, **options):
        seen.append((state.method.temperature, state.method.teacher_temperature))
        return original(state, *rest, **options)

    monkeypatch.setattr(loop_module, "train_step", watched)
    line = "--temperature 0.2 --final-temperature 0.1 --final-teacher-temperature 0.03 --out run"
    assert main([*flags, *line.split(), "--max-steps", "5"]) == 0
    assert main(["--resume", "run"]) == 0
    shares = [(1 - math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    expected = [(0.2 - 0.1 * share, 0.05 - 0.02 * share) for share in shares]
    assert seen == [pytest.approx(pair) for pair in expected]
    assert main([*flags, "--method", "moco", "--final-teacher-temperature", "0"]) == 2
    assert main(["--method", "nnclr", "--final-teacher-temperature", "0.1"]) == 2
    assert "method nnclr has no --teacher-temperature" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- no waiting


@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_nothing_back_from_the_device(name, monkeypatch):
    """On the meta device, whose tensors have no values: reading one, or copying it, is an error.

    What is copied there comes out of pinned memory: with pageable memory the host would wait.
    """
    method = METHODS[name](queue_size=24, num_splits=1)
    meta = torch.device("meta")
    with meta:
        student = nn.Sequential(nn.Flatten(), nn.Linear(48, method.projection_dim))
        sizes = method.queues()
        queues = {key: MemoryQueue(size, method.projection_dim) for key, size in sizes.items()}
        heads = nn.ModuleDict(method.heads())
        if method.predictor_hidden:
            heads["predictor"] = nn.Linear(method.projection_dim, method.projection_dim)
        teacher = make_teacher(student)
    trained = [*student.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, foreach=True)
    state = TrainState(method, student, teacher, nn.ModuleDict(queues), optimizer, heads)
    drawn = StepRandom.__call__
    drawn = StepRandom.__call__  # no generator of that device can be made; None is its global one
    monkeypatch.setattr(
        StepRandom, "__call__", lambda *a: drawn(*a) if len(a) > 2 and a[2] == CPU else None
    )
    monkeypatch.setattr(MemoryQueue, "_check", lambda *_: None)  # it refuses that device
    views = {key: lambda images, _: images.float() / 64 for key in method.views()}
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x.as_subclass(_Pinned))
    pixels = torch.empty(8, 3, 4, 4, dtype=torch.uint8, device=meta)
    resident = ImageSet(pixels, None, [], (0.5,) * 3, (0.5,) * 3, "resident")
    with _PinnedCopies():
        for images in BatchFeed(resident, 8, 0, meta).batches(0, 2):
            measures = train_step(state, images, views, seed=1, backend="auto")
    assert measures.is_meta and measures.shape == (len(MEASURES),) and state.step == 2


class _Pinned(Tensor):
    pass


class _PinnedCopies(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "copy" in str(function) and result.is_meta:
            assert all(x.is_meta or type(x) is _Pinned for x in args if isinstance(x, Tensor))
        return result


# ------------------------------------------------------------------------------------ its files

HOME = Path(softcl.__file__).parent
MOST_FILES = 15  # that one step of ASCL on the CPU enters


def test_a_step_can_be_read_in_one_sitting(flags: list[str], monkeypatch):
    """The way of a batch, as CONTRIBUTING.md walks it: few files, and of softcl.train two."""
    entered: set[str] = set()
    original = Loop._one_step

    def profile(frame, event: str, _argument) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(HOME)):
            entered.add(Path(path).relative_to(HOME).as_posix())

    def profiled(run: Loop, images: Tensor) -> None:
        sys.setprofile(profile if run.state.step == 2 else None)  # what is lazy was made before
        try:
            original(run, images)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(Loop, "_one_step", profiled)
    assert main([*flags, "--num-splits", "1", "--max-steps", "3", "--out", "run"]) == 0
    own = {path.removeprefix("train/") for path in entered if path.startswith("train/")}
    assert own == {"loop.py", "step.py"}
    assert len(entered) <= MOST_FILES, "\n".join(sorted(entered))


def test_no_folder_imports_what_imports_it():
    """train uses evaluation and no other way round, and its own files have no circles."""
    imports: dict[str, set[str]] = {}
    for path in HOME.rglob("*.py"):
        name = ".".join(path.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")
        nodes = ast.walk(ast.parse(path.read_text()))
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        imports[name] = {x.removeprefix("softcl.") for x in names if x.startswith("softcl.")}
    for name, used in imports.items():
        if name.startswith(("evaluation", "data", "methods", "nn", "ops", "distributed")):
            assert not [x for x in used if x.startswith(("train", "reporting"))], name

    def reachable(name: str, seen: set[str]) -> set[str]:
        for other in imports.get(name, set()):
            if other not in seen:
                seen.add(other)
                reachable(other, seen)
        return seen

    for name in imports:
        if name.startswith("train."):
            assert name not in reachable(name, set()), name
