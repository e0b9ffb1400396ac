"""Which tensor of a run is the first that is no longer finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from softcl.training.step import Images, StepRandom, TrainState, View, device_of, make_view


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def stored_tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint keeps of the networks, with a name for each."""
    for who in ("student", "teacher", "heads"):
        module = getattr(state, who)
        for name, tensor in module.named_parameters():
            yield f"parameter {name} of the {who}", tensor
        for name, tensor in module.named_buffers():
            yield f"buffer {name} of the {who}", tensor


def first_damaged(state: TrainState) -> str | None:
    """The first parameter or buffer that is not finite, or None."""
    return next((name for name, x in stored_tensors(state) if not _finite(x)), None)


def first_non_finite(
    state: TrainState, images: Images, views: Mapping[str, View], seed: int
) -> str:
    """A clause that names the tensor in which the numbers first fail, for an error message.

    Gradients of the last backward pass first, then parameters and buffers, then the output of each
    module for this batch. Changes the running statistics of batch norm: for a run that has failed.
    """
    for name, parameter in state.student.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name} is not finite"
    damaged = first_damaged(state)
    if damaged is not None:
        return f"{damaged} is not finite"
    name = state.method.student_sees()[0]
    random = StepRandom(seed, state.step, device_of(images))
    view = make_view(views, name, images, random(f"view {name}"))
    found = _first_bad_output(state.student, view)
    if found is not None:
        return f"the output of {found} of the student is not finite"
    return "every parameter and the student's outputs are finite"


@torch.no_grad()
def _first_bad_output(module: nn.Module, images: Tensor) -> str | None:
    """The name of the first submodule, in the order of computation, with such an output."""
    bad: list[str] = []
    hooks = []

    def watch(name: str) -> None:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not _finite(output):
                bad.append(name)

        hooks.append(module.get_submodule(name).register_forward_hook(look))

    for name, part in module.named_modules():
        if name and not any(part.children()):
            watch(name)
    try:
        module(images)
    except (ValueError, RuntimeError):  # a later module may refuse such numbers
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None
