"""The student, an encoder made of a backbone and a projector, and its teacher.

The teacher is a copy that follows the student as an exponential moving average (EMA).
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from softcl.nn.arguments import as_float

# Parts of a parameter's name that wrappers put there: DDP (in front), torch.compile, FSDP,
# activation checkpointing.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Encoder(nn.Module):
    """projector(backbone(images)): (N, 3, H, W) -> (N, D), not normalised.

    ``features`` gives the backbone's output (N, F), which is what evaluation reads.

    Attributes:
        precision: what autocast computes ``forward`` in; None for none. ``features`` has none, and
            the projections come out in float32.
    """

    precision: torch.dtype | None = None

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        for name, module in (("backbone", backbone), ("projector", projector)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a module, got {module!r}")
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.precision is None:
            return self.projector(self.backbone(images))
        with torch.autocast(images.device.type, self.precision):
            projections = self.projector(self.backbone(images))
        return projections.float()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, F), before the projector."""
        return self.backbone(images)


def make_teacher(student: nn.Module) -> nn.Module:
    """Return a frozen deep copy of ``student`` in train mode.

    Its parameters require no gradient and change through ``update_teacher`` alone. Train mode is
    kept on purpose: the teacher's batch norm normalises by the statistics of its own batch, and
    keeps its own running statistics (MoCo, ASCL). The teacher of a student in half precision is
    ``make_teacher(student).float()``, see `update_teacher`.

    Raises:
        TypeError: student is no module.
    """
    _check_module("student", student)
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher.train()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float | Tensor) -> None:
    """theta_teacher <- momentum * theta_teacher + (1 - momentum) * theta_student, in place.

    Parameters only: buffers, such as the running statistics of batch norm, stay the teacher's own.
    Call it before the forward passes of a step (MoCo, ASCL).

    The teacher's parameters are float32 or wider. A step of (1 - momentum) times the distance is
    less than half of what bfloat16 and float16 can tell apart, is rounded away, and the teacher
    stands still: after 2,000 steps at 0.999 four fifths of the distance are left in bfloat16, where
    0.135 should be. The float32 teacher is itself what a checkpoint must hold; a copy of it kept
    aside would be lost with the first one that is saved without. Compute with it under
    torch.autocast. The student's parameters may be narrower: they are widened, which is exact.

    Args:
        momentum: in [0, 1]; a number, or a 0-dim tensor on the CPU.

    Raises:
        TypeError: an argument is of another kind, or a parameter is too narrow.
        ValueError: momentum is outside [0, 1], or the two modules differ in their parameters
            (names, order, shapes, devices), or share one.
    """
    _check_module("teacher", teacher)
    _check_module("student", student)
    if not isinstance(momentum, float):
        momentum = as_float("momentum", momentum)
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    targets, sources = dict(teacher.named_parameters()), dict(student.named_parameters())
    _check_names(targets, sources)
    pairs = list(zip(targets.values(), sources.values(), strict=True))
    for name, (target, source) in zip(targets, pairs, strict=True):
        _check_pair(name, target, source)
    if pairs:
        widened = [s if s.dtype is t.dtype else s.to(t.dtype) for t, s in pairs]
        torch._foreach_lerp_([target for target, _ in pairs], widened, 1.0 - momentum)


def _check_module(name: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a module, got {module!r}")


def _check_names(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    """Refuse modules whose parameters have other names, or the same in another order."""
    if list(targets) == list(sources):
        return
    names, others = ([_unwrapped(name) for name in named] for named in (targets, sources))
    for name, other in itertools.zip_longest(names, others):
        if name != other:
            ours, theirs = ("no more" if x is None else repr(x) for x in (name, other))
            raise ValueError(
                "teacher and student must have the same parameters in the same order; the first "
                f"that differs: the teacher has {ours}, the student {theirs}"
            )


def _unwrapped(name: str) -> str:
    parts = (part for part in name.split(".") if part not in _WRAPPERS)
    return ".".join(parts).removeprefix("module.")


def _check_pair(name: str, target: Tensor, source: Tensor) -> None:
    """Refuse a parameter that the average cannot be taken of, by its name."""
    shared = target is source
    if not shared and not torch.compiler.is_compiling():  # no address can be read there
        shared = target.data_ptr() == source.data_ptr() != 0
    if shared:
        raise ValueError(
            f"teacher and student share the parameter {name!r}: make the teacher by make_teacher"
        )
    if target.shape != source.shape or target.device != source.device:
        ours, theirs = ((tuple(x.shape), str(x.device)) for x in (target, source))
        raise ValueError(
            "teacher and student must have the same parameters; the first that differs: "
            f"{name!r} is {ours[0]} on {ours[1]} in the teacher, {theirs[0]} on {theirs[1]} in "
            "the student"
        )
    if target.dtype not in _WIDE:
        raise TypeError(
            f"the teacher's parameter {name!r} is {target.dtype}, in which its average would stand "
            "still: keep the teacher in float32 (make_teacher(student).float(), torch.autocast)"
        )
    same = target.dtype is source.dtype
    if not same and torch.promote_types(target.dtype, source.dtype) != target.dtype:
        raise TypeError(
            f"the parameter {name!r} is {target.dtype} in the teacher and {source.dtype} in the "
            "student, whose values it cannot hold"
        )


@torch.no_grad()
def shuffled(
    teacher: nn.Module, images: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return ``teacher(images)``, computed on a random permutation of the batch, in batch order.

    With split batch norm this gives the teacher other groups of images than the student, so the
    loss cannot be lowered through the statistics that two views of one image share (MoCo, ASCL).

    Args:
        images: (N, C, H, W).
        generator: source of the permutation, on any device; None takes PyTorch's global one.

    Returns:
        (N, D), row i belongs to images[i]; no gradient.

    Raises:
        TypeError: images is no tensor, or generator no generator.
        ValueError: images has no dimension, or the teacher does not give a row for each image.
    """
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.ndim == 0:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
    device = images.device if generator is None else generator.device
    order = torch.randperm(images.shape[0], generator=generator, device=device).to(images.device)
    rows = teacher(images[order])
    if not isinstance(rows, torch.Tensor) or rows.ndim == 0 or rows.shape[0] != len(order):
        found = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise ValueError(f"teacher must give a row for each of {len(order)} images, got {found}")
    return rows[order.argsort()]
