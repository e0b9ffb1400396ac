"""The teacher: a copy of the student that follows it as an exponential moving average (EMA)."""

from __future__ import annotations

import copy

import torch
from torch import nn


def make_teacher(student: nn.Module) -> nn.Module:
    """Return a frozen deep copy of ``student`` in train mode.

    Its parameters require no gradient and change through ``update_teacher`` alone. Train mode is
    kept on purpose: the teacher's batch norm normalises by the statistics of its own batch, and
    keeps its own running statistics (MoCo, ASCL).
    """
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher.train()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """theta_teacher <- momentum * theta_teacher + (1 - momentum) * theta_student, in place.

    Parameters only: buffers, such as the running statistics of batch norm, stay the teacher's own.
    Call it before the forward passes of a step (MoCo, ASCL).

    Raises:
        ValueError: momentum is outside [0, 1], or the two modules differ in their parameters.
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    targets, sources = list(teacher.parameters()), list(student.parameters())
    if [p.shape for p in targets] != [p.shape for p in sources]:
        raise ValueError(
            f"teacher and student must have the same parameters, got {len(targets)} and "
            f"{len(sources)} tensors or different shapes"
        )
    if targets:
        torch._foreach_lerp_(targets, sources, 1.0 - momentum)


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
    """
    device = images.device if generator is None else generator.device
    order = torch.randperm(images.shape[0], generator=generator, device=device).to(images.device)
    return teacher(images[order])[order.argsort()]
